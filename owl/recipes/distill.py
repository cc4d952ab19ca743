"""Distillation of decoders: a smaller decoder learns to decode the same latents."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from owl.distributed.sharding import shard
from owl.errors import OwlError, at_least
from owl.latents import check_encoder, described, encoder_of, load_latent_stats
from owl.losses.lpips import LPIPS
from owl.losses.reconstruction import ReconstructionLoss, ReconstructionWeights, weighted_sum
from owl.metrics.psnr import MeanPSNR
from owl.models.discriminators import Discriminator
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_decoder import ImageDecoder
from owl.nn.frozen import freeze
from owl.optim.stepping import manual_step
from owl.recipes.adversarial import TrainsAgainstDiscriminator, adversarial_loss, ramped, refuse_penalties
from owl.recipes.arguments import fractions, not_negative, store_arguments
from owl.recipes.decoders import (
    DecoderFactory,
    DecoderMetrics,
    built,
    compared,
    latents,
    load_autoencoder,
    with_noise,
)
from owl.recipes.hooks import ChecksEncoder, MeasuresBatches
from owl.recipes.images import images
from owl.recipes.logging import log_losses
from owl.rollout.episodes import load_decoder


@dataclass
class Weights(ReconstructionWeights):
    """Weights of the reconstruction terms and of the adversarial loss.

    Args:
        adversarial: Relativistic loss of the decoder; used only with a discriminator.
    """

    adversarial: float = 0.1


class Distill(ChecksEncoder, MeasuresBatches, TrainsAgainstDiscriminator):
    """Train a small decoder to decode the latents of a frozen encoder like a larger decoder, its teacher.

    loss = sum of weight * term over `Weights`, where each reconstruction term is
    (1 - truth) * term(student, teacher) + truth * term(student, true frame).

    The student takes the same latents, and its checkpoint stores the same fingerprint, so it replaces the teacher
    wherever that decodes. The teacher can be any decoder of the latents, such as a GAN or diffusion decoder.

    Needs frames and their latents: from `owl.callbacks.frozen_encoder.FrozenEncoder`, or from a dataset that
    `data encode --keep rgb` wrote.

    Args:
        autoencoder: Checkpoint or export of the image autoencoder whose latents are decoded.
        network: Architecture of the student.
        teacher: Checkpoint or export of the decoder that is imitated. None: the autoencoder's own.
        truth: Share of the true frames in the target, from 0 (the teacher's output only) to 1 (the teacher is not
            used). The teacher's output holds no detail that the latent does not determine, so it is learnt in fewer
            steps.
        weights: Weight of every term.
        lpips: The perceptual distance, as a loss and as a metric.
        lpips_crop: Side in pixels of random squares on which LPIPS is estimated in training, at a lower cost. None:
            whole frames.
        lpips_samples: With ``lpips_crop``: number of frames of a batch that are cropped. None: all.
        discriminator: Distinguishes true and decoded frames, or runs of frames. None: no adversarial term.
        adversarial_ramp: Steps in which the adversarial term grows linearly to its weight.
        gamma: Weight of the gradient penalties R1 and R2 (`owl.losses.adversarial`); 0 disables them, as FSDP2
            requires.
        penalty_every: The penalties are computed at every n-th step, n times as strong.
        noise: Noise augmentation: the student's latents get noise of up to this many of their standard deviations, the
            teacher's do not, so that the student tolerates the errors of generated latents.
        optimizer: Called with the student's parameters.
        discriminator_optimizer: Called with those of the discriminator.
        clip: Maximum norm of the gradients of each network. None: no clipping.
        accumulate: Batches per step.
        warmup_steps: Steps of linear warm-up of both learning rates; a cosine follows until training ends.
        final_lr: Learning rates at the end, as a fraction of their peaks.

    Raises:
        OwlError: An argument is out of range, ``autoencoder`` is none, or ``teacher`` decodes other latents.
    """

    exports = ("network",)  # the discriminator is neither averaged nor exported
    network: Any  # a decoder
    teacher: Any

    def __init__(
        self,
        autoencoder: str,
        network: DecoderFactory,
        teacher: str | None = None,
        truth: float = 0.0,
        weights: Weights = Weights(),  # noqa: B008 (a dataclass of floats, never changed)
        lpips: LPIPS | None = None,
        lpips_crop: int | None = None,
        lpips_samples: int | None = None,
        discriminator: Discriminator | None = None,
        adversarial_ramp: int = 1000,
        gamma: float = 1.0,
        penalty_every: int = 4,
        noise: float = 0.0,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=3e-4, weight_decay=1e-4),
        discriminator_optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=2e-4, weight_decay=0.0),
        clip: float | None = 1.0,
        accumulate: int = 1,
        warmup_steps: int = 100,
        final_lr: float = 0.0,
    ) -> None:
        super().__init__()
        at_least(1, penalty_every=penalty_every, accumulate=accumulate)
        fractions(truth=truth)
        not_negative(gamma=gamma, noise=noise)
        store_arguments(self)
        self.automatic_optimization = False
        source = load_autoencoder(autoencoder)
        self.teacher = freeze(_teacher(source, teacher))
        self.network = built(network, source)
        self.discriminator = discriminator
        self.truth = truth
        self.weights = weights
        lpips = lpips or LPIPS()
        self.reconstruction_loss = ReconstructionLoss(weights, lpips, lpips_crop, lpips_samples)
        self.metrics, self.teacher_psnr = DecoderMetrics(lpips), MeanPSNR()
        self.adversarial_ramp, self.gamma, self.penalty_every = adversarial_ramp, gamma, penalty_every
        self.noise = noise
        self.optimizer, self.discriminator_optimizer = optimizer, discriminator_optimizer
        self.clip, self.accumulate = clip, accumulate
        self.warmup_steps, self.final_lr = warmup_steps, final_lr

    def configure_model(self) -> None:
        """Set the memory format of convolutions; spread the weights under FSDP2.

        Raises:
            OwlError: FSDP2 is used with penalties of the discriminator.
        """
        if self.device_mesh is not None and self.discriminator is not None:
            refuse_penalties(self.gamma, "model.init_args.gamma")
        networks = [n for n in (self.network, self.teacher, self.discriminator) if n is not None]
        for network in networks:
            network.to(memory_format=torch.channels_last)
            if self.device_mesh is not None:
                shard(network, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Read the latents' statistics, which the student stores, and check that the teacher decodes these latents."""
        self._described = described(self.trainer.datamodule)  # type: ignore[attr-defined]
        load_latent_stats(self.network, *self._described)
        check_encoder(self.teacher, *self._described)

    @torch.no_grad()
    def taught(self, latent: Tensor) -> Tensor:
        """Decode float[B, c, h, w] with the teacher: float[B, 3, H, W] in [-1, 1], without gradient."""
        image: Tensor = self.teacher.decode(latent)
        return image.clamp(-1, 1)

    def compare(self, decoded: Tensor, latent: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Compute the reconstruction terms.

        Args:
            decoded: float[B, 3, H, W], of the student.
            latent: float[B, c, h, w] without noise, from which the teacher decodes its target.
            image: float[B, 3, H, W] in [-1, 1], the true frames.
        """
        terms: dict[str, Tensor] = {}
        for share, target in ((1 - self.truth, lambda: self.taught(latent)), (self.truth, lambda: image)):
            if share:
                for name, term in self.reconstruction_loss(decoded, target()).items():
                    terms[name] = terms.get(name, 0.0) + share * term
        return terms

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Step the discriminator, if there is one, and the student."""
        image, latent = images(batch), latents(batch)
        with manual_step(self, self.accumulate) as step:
            decoded = self.network.decode(with_noise(latent, self.network.latent_std, self.noise))
            judged: dict[str, Tensor] = {}
            terms, weight = self.compare(decoded, latent, image), 0.0
            if self.discriminator is not None:
                true, generated = (frames.unflatten(0, batch["rgb"].shape[:2]) for frames in (image, decoded))
                real, _, judged = self.step_discriminator(step, true, generated, self.gamma, self.penalty_every)
                terms["adversarial"] = adversarial_loss(self.discriminator, true, generated, real)
                weight = self.weights.adversarial * ramped(step.number, 0, self.adversarial_ramp)
            loss = weighted_sum(terms, replace(self.weights, adversarial=weight))
            step(self.trainer.optimizers[0], loss, self.clip)
        log_losses(self, loss, terms | judged)
        return loss

    def measure(self, batch: dict[str, Tensor], split: str) -> None:
        """Update and log every metric of the student, and the teacher's PSNR."""
        image, latent = images(batch), latents(batch)
        self.metrics.update(self.network.decode(latent), image, batch.get("flow"))
        self.teacher_psnr.update((self.taught(latent).float() + 1) / 2, (image + 1) / 2)
        metrics = self.metrics.named(split) | {f"{split}/psnr_teacher": self.teacher_psnr}
        self.log_dict(metrics, on_epoch=True, batch_size=len(image))

    @torch.no_grad()
    def media(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Draw frames of up to 4 windows, and the first window if it is long enough, as decoded by both."""
        image, latent = images(batch), latents(batch)
        versions = {"original": image, "teacher": self.taught(latent), "student": self.network.decode(latent)}
        return compared(versions, batch["rgb"].shape[1])


def _teacher(autoencoder: ImageAutoencoder, path: str | None) -> nn.Module:
    """Load the decoder that is imitated; without a path, the autoencoder's own.

    Raises:
        OwlError: The file holds no decoder, or one of other latents.
    """
    own = ImageDecoder.of(autoencoder)
    if path is None:
        return own
    teacher = load_decoder(path)
    if isinstance(teacher, ImageAutoencoder):
        teacher = ImageDecoder.of(teacher)
    found, expected = encoder_of(teacher), encoder_of(own)
    if found != expected:
        raise OwlError(
            "latents.encoder",
            f"the teacher of {path} decodes latents of encoder {found}, model.init_args.autoencoder has encoder "
            f"{expected}; give the autoencoder that the teacher was trained on",
        )
    return teacher
