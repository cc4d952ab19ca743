"""Stage 2: a decoder trained adversarially on the latents of a frozen encoder."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from owl.distributed.sharding import shard
from owl.errors import OwlError, at_least
from owl.latents import check_encoder, described, load_latent_stats
from owl.losses.adversarial import adaptive_weight, annealed, generator_loss
from owl.losses.lpips import LPIPS
from owl.losses.reconstruction import ReconstructionLoss, ReconstructionWeights, weighted_sum
from owl.losses.temporal import temporal
from owl.metrics.latents import LatentStatistics
from owl.models.discriminators import Discriminator
from owl.models.image_decoder import ImageDecoder, decode_clips
from owl.nn.bottleneck import Encoding
from owl.nn.frozen import freeze
from owl.optim.stepping import manual_step
from owl.recipes.adversarial import TrainsAgainstDiscriminator, adversarial_loss, ramped, refuse_penalties
from owl.recipes.arguments import not_negative, store_arguments
from owl.recipes.decoders import (
    DecoderFactory,
    DecoderMetrics,
    built,
    compared,
    flow_of,
    latents,
    load_autoencoder,
    with_noise,
)
from owl.recipes.hooks import ChecksEncoder, MeasuresBatches
from owl.recipes.images import images
from owl.recipes.logging import log_losses


@dataclass
class Weights(ReconstructionWeights):
    """Weights of the reconstruction terms and of the adversarial loss.

    Args:
        adversarial: Relativistic loss of the generator, after its ramp.
        temporal: Change of the error from frame to frame along the flow (`owl.losses.temporal`); needs ``flow`` and
            windows of at least two frames.
        kl: Only with ``train_encoder``: divergence of the posterior from N(0, 1), nats per latent element.
    """

    adversarial: float = 0.1
    temporal: float = 0.0
    kl: float = 1e-6


class GANDecoder(ChecksEncoder, MeasuresBatches, TrainsAgainstDiscriminator):
    """Train a decoder with reconstruction losses and the adversarial loss of R3GAN; the encoder is frozen.

    loss = sum of weight * term over `Weights`. The discriminator trains from the first step on the decoder's outputs,
    and the weight of the adversarial term is raised from zero once it has learnt something: a discriminator that knows
    nothing yet would ruin what the decoder has learnt. See `owl.losses.adversarial` for the losses.

    Needs frames and their latents: from `owl.callbacks.frozen_encoder.FrozenEncoder`, or from a dataset that
    `data encode --keep rgb` wrote. ``global_step`` counts steps of decoder and discriminator together.

    Args:
        autoencoder: Checkpoint or export of the image autoencoder whose latents are decoded.
        discriminator: Distinguishes true and decoded frames, or runs of frames.
        network: Another architecture, trained from scratch. None: the autoencoder's decoder.
        pretrained: Whether training starts from the autoencoder's weights, if ``network`` is None.
        previous: Whether the autoencoder's decoder is extended so that it also takes the frame that it decoded before,
            which steadies detail; see `owl.models.image_decoder.ImageDecoder`. Needs windows of at least two frames.
        train_encoder: Trains the whole autoencoder instead, and exports it: the control experiment for the frozen
            encoder. Batches need frames only.
        weights: Weight of every term.
        lpips: The perceptual distance, as a loss and as a metric.
        lpips_crop: Side in pixels of random squares on which LPIPS is estimated in training, at a lower cost. None:
            whole frames.
        lpips_samples: With ``lpips_crop``: number of frames of a batch that are cropped. None: all.
        adversarial_start: Steps before the adversarial term has any weight.
        adversarial_ramp: Steps in which it then grows linearly to its full weight.
        adaptive: Whether the adversarial weight is also multiplied by the ratio of the norms of both gradients (VQGAN,
            Esser et al. 2021, equation 7), here those at the decoder's output, so that it suits every architecture.
        gamma: Weight of the gradient penalties R1 and R2 at the beginning, for all elements of an input; 0 disables
            them, as FSDP2 requires.
        final_gamma: Weight of the penalties at the end, as a fraction of ``gamma``, reached by a cosine.
        penalty_every: The penalties are computed at every n-th step, n times as strong.
        noise: Noise augmentation: latents get noise of up to this many of their standard deviations in training, so
            that the decoder tolerates the errors of generated latents.
        optimizer: Called with the decoder's parameters; R3GAN uses Adam with the first beta 0.
        discriminator_optimizer: Called with those of the discriminator; likewise.
        beta2: Second beta of both optimisers at the beginning and at the end, joined by a cosine. None: as they have
            it.
        clip: Maximum norm of the decoder's gradients. None: no clipping. Those of the discriminator are never clipped:
            steps with the penalties have the largest, and clipping would take their strength.
        accumulate: Batches per step.
        warmup_steps: Steps of linear warm-up of both learning rates; a cosine follows until training ends.
        final_lr: Learning rates at the end, as a fraction of their peaks.

    Raises:
        OwlError: An argument is out of range, or ``autoencoder`` is none.
    """

    exports = ("network",)  # neither averages nor exports the discriminator
    network: Any  # a decoder or, with train_encoder, an ImageAutoencoder
    original: Any

    def __init__(
        self,
        autoencoder: str,
        discriminator: Discriminator,
        network: DecoderFactory | None = None,
        pretrained: bool = True,
        previous: bool = False,
        train_encoder: bool = False,
        weights: Weights = Weights(),  # noqa: B008 (a dataclass of floats, never changed)
        lpips: LPIPS | None = None,
        lpips_crop: int | None = None,
        lpips_samples: int | None = None,
        adversarial_start: int = 0,
        adversarial_ramp: int = 1000,
        adaptive: bool = False,
        gamma: float = 10.0,
        final_gamma: float = 0.1,
        penalty_every: int = 4,
        noise: float = 0.0,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=2e-4, weight_decay=0.0),
        discriminator_optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=2e-4, weight_decay=0.0),
        beta2: tuple[float, float] | None = None,
        clip: float | None = 1.0,
        accumulate: int = 1,
        warmup_steps: int = 100,
        final_lr: float = 0.25,
    ) -> None:
        super().__init__()
        at_least(1, penalty_every=penalty_every, accumulate=accumulate)
        at_least(0, adversarial_start=adversarial_start, adversarial_ramp=adversarial_ramp)
        not_negative(gamma=gamma, noise=noise)
        if sum((train_encoder, previous, network is not None)) > 1:
            raise OwlError(
                "recipe.arguments",
                f"network is {'set' if network else 'not set'}, train_encoder {train_encoder} and previous {previous}, "
                "expected one of them: train_encoder trains the whole autoencoder, previous extends its decoder; a "
                "network of your own has an argument previous itself",
            )
        store_arguments(self)
        self.automatic_optimization = False
        source = load_autoencoder(autoencoder)
        original = source if train_encoder else ImageDecoder.of(source, previous)
        if network is not None:
            self.network = built(network, source)
        else:
            self.network = copy.deepcopy(original) if pretrained else type(original)(**original.config)
        self.original = freeze(original)
        self.discriminator = discriminator
        self.train_encoder = train_encoder
        self.weights = weights
        lpips = lpips or LPIPS()
        self.reconstruction_loss = ReconstructionLoss(weights, lpips, lpips_crop, lpips_samples)
        self.metrics = DecoderMetrics(lpips)
        self.latents = LatentStatistics(source.latent_channels)  # used with train_encoder only
        self.adversarial_start, self.adversarial_ramp, self.adaptive = adversarial_start, adversarial_ramp, adaptive
        self.gamma, self.final_gamma, self.penalty_every = gamma, final_gamma, penalty_every
        self.noise = noise
        self.optimizer, self.discriminator_optimizer, self.beta2 = optimizer, discriminator_optimizer, beta2
        self.clip, self.accumulate = clip, accumulate
        self.warmup_steps, self.final_lr = warmup_steps, final_lr

    def configure_model(self) -> None:
        """Set the memory format of convolutions; spread the weights under FSDP2.

        Raises:
            OwlError: FSDP2 is used with penalties.
        """
        networks = (self.network, self.discriminator, self.original)
        for network in networks:
            network.to(memory_format=torch.channels_last)
        if self.device_mesh is not None:
            refuse_penalties(self.gamma, "model.init_args.gamma")
            for network in networks:
                shard(network, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Read the latents' statistics, which the decoder stores, and check that they come from the autoencoder."""
        if self.train_encoder:
            return
        self._described = described(self.trainer.datamodule)  # type: ignore[attr-defined]
        load_latent_stats(self.network, *self._described)
        check_encoder(self.original, *self._described)

    def check_latents_of_network(self) -> None:
        """Check the network unless it has an encoder of its own."""
        if not self.train_encoder:
            super().check_latents_of_network()

    def reconstruct(self, batch: dict[str, Tensor]) -> tuple[Tensor, Encoding | None]:
        """Decode the latents of a batch, in training with their noise.

        Returns:
            float[B * T, 3, H, W] and, with ``train_encoder``, the encoding.
        """
        if self.train_encoder:
            encoding = self.network.encode(images(batch))
            return self.network.decode(encoding.sample() if self.training else encoding.mean), encoding
        latent = latents(batch)
        if self.training:
            latent = with_noise(latent, self.network.latent_std, self.noise)
        return decode_clips(self.network, latent.unflatten(0, batch["latent"].shape[:2])).flatten(0, 1), None

    def adversarial_weight(self, number: int) -> float:
        """Return the weight of the adversarial term at a step, before the adaptive factor."""
        return self.weights.adversarial * ramped(number, self.adversarial_start, self.adversarial_ramp)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Step the discriminator and the decoder."""
        with manual_step(self, self.accumulate) as step:
            progress = self.lr_schedulers()[0].progress(step.number)  # type: ignore[index,union-attr]
            self.anneal(progress)
            gamma = annealed(self.gamma, self.final_gamma * self.gamma, progress)
            image, (reconstruction, encoding) = images(batch), self.reconstruct(batch)
            true, decoded = (frames.unflatten(0, batch["rgb"].shape[:2]) for frames in (image, reconstruction))
            real, fake, judged = self.step_discriminator(step, true, decoded, gamma, self.penalty_every)
            terms = self.reconstruction_loss(reconstruction, image)
            if self.weights.temporal:
                terms["temporal"] = temporal(decoded, true, flow_of(batch))
            if encoding is not None:
                terms["kl"] = encoding.kl()  # type: ignore[attr-defined]
            weight: Any = self.adversarial_weight(step.number)
            adversarial = (
                adversarial_loss(self.discriminator, true, decoded, real) if weight else generator_loss(fake, real)
            )
            if self.adaptive and weight:
                rest = weighted_sum(terms, self.weights)
                weight = weight * adaptive_weight(rest, adversarial, [reconstruction])
            terms["adversarial"] = adversarial
            loss = weighted_sum(terms, replace(self.weights, adversarial=weight))
            step(self.trainer.optimizers[0], loss, self.clip)
        settings = {"gamma": gamma, "adversarial_weight": weight}
        log_losses(self, loss, terms | judged | settings)
        return loss

    def anneal(self, progress: float) -> None:
        """Set the second beta of both optimisers."""
        if self.beta2 is not None:
            for group in (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups):
                group["betas"] = (group["betas"][0], annealed(*self.beta2, progress))

    def measure(self, batch: dict[str, Tensor], split: str) -> None:
        """Update and log every metric."""
        reconstruction, encoding = self.reconstruct(batch)
        self.metrics.update(reconstruction, images(batch), batch.get("flow"))
        if encoding is not None:
            self.latents.update(encoding)
        self.log_dict(self.metrics.named(split), on_epoch=True, batch_size=len(batch["rgb"]))

    def on_validation_epoch_end(self) -> None:
        """Store the statistics of an autoencoder's latents in it, as stage 1 does."""
        if self.train_encoder:
            statistics = self.latents.compute()
            self.latents.reset()
            self.network.latent_mean.copy_(statistics["mean"])
            self.network.latent_std.copy_(statistics["std"])

    @torch.no_grad()
    def media(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Draw original frames, the autoencoder's reconstructions, and those of this decoder.

        Returns:
            ``decoders``, uint8[H, W, 3], and ``clip``, uint8[T, H, W, 3], of windows that are long enough.
        """
        image = images(batch)
        before = self.original(image, sample=False)[0] if self.train_encoder else self.original.decode(latents(batch))
        rows = {"original": image, "stage 1": before, "trained adversarially": self.reconstruct(batch)[0]}
        return compared(rows, batch["rgb"].shape[1])
