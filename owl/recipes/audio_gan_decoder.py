"""Stage 2 of sound: a decoder trained adversarially on the latents of a frozen encoder."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from owl.distributed.sharding import shard
from owl.errors import OwlError, at_least
from owl.latents import check_encoder, datasets, described, load_latent_stats
from owl.losses.adversarial import OBJECTIVES, ObjectiveName
from owl.losses.audio import AudioLoss, AudioWeights
from owl.losses.balancer import GradientBalancer
from owl.losses.feature_matching import feature_matching
from owl.losses.reconstruction import weighted_sum
from owl.metrics.audio import AudioMetrics
from owl.models.audio_autoencoder import AudioAutoencoder
from owl.models.audio_decoder import AudioDecoder
from owl.models.audio_discriminators import AudioDiscriminator, Judgement
from owl.nn.frozen import freeze
from owl.optim.stepping import manual_step, only_towards, with_gradient
from owl.recipes.adversarial import TrainsAgainstDiscriminator, ramped
from owl.recipes.arguments import any_weight, not_negative, store_arguments
from owl.recipes.decoders import load_network, with_noise
from owl.recipes.hooks import ChecksEncoder, MeasuresBatches
from owl.recipes.images import form
from owl.recipes.logging import log_losses
from owl.recipes.sounds import check_sample_rate, draw_segments, listen, sounds

LATENT = "audio_latent"


@dataclass
class Weights(AudioWeights):
    """Weights of the reconstruction terms and of the adversarial terms; of gradients, if they are balanced.

    Args:
        adversarial: Loss of the decoder against the discriminator, after its ramp.
        features: Feature matching, after the same ramp.
    """

    adversarial: float = 0.1
    features: float = 5.0


class AudioGANDecoder(ChecksEncoder, MeasuresBatches, TrainsAgainstDiscriminator):
    """Train a decoder of sound with reconstruction, adversarial and feature matching losses; the encoder is frozen.

    loss = sum of weight * term over `Weights`. The discriminator trains from the first step on the decoder's outputs,
    and the weights of both adversarial terms are raised from zero once it has learnt something. Each of its networks
    has the same share of these terms.

    Needs sound and its latents: from `owl.callbacks.frozen_encoder.FrozenEncoder`, or from a dataset that
    `data encode --keep audio` wrote. ``global_step`` counts steps of decoder and discriminator together.

    Args:
        autoencoder: Checkpoint or export of the audio autoencoder whose latents are decoded.
        discriminator: Distinguishes true and decoded sound.
        pretrained: Whether training starts from the weights of the autoencoder's decoder.
        weights: Weight of every term.
        objective: Adversarial losses: ``hinge``, ``lsgan`` (least squares) or ``relativistic`` (R3GAN's, without its
            penalties).
        balance: Whether a weight is the share of the gradient at the decoder's output instead of a factor of the loss
            (`owl.losses.balancer.GradientBalancer`). EnCodec uses 3 for both adversarial terms, 1 for its spectral term
            and 0.1 for its waveform term.
        adversarial_start: Steps before the adversarial terms have any weight.
        adversarial_ramp: Steps in which it then grows linearly to its full weight.
        segments: Number of segments of each batch that are judged in training, of which loud ones are drawn more often
            (`owl.recipes.sounds.draw_segments`). None: whole windows.
        segment_samples: Samples of a segment.
        noise: Noise augmentation: latents get noise of up to this many of their standard deviations in training, so
            that the decoder tolerates the errors of generated latents.
        frechet: Whether validation measures the Fréchet distance, see `owl.recipes.audio_vae.AudioVAE`.
        optimizer: Called with the decoder's parameters.
        discriminator_optimizer: Called with those of the discriminator.
        clip: Maximum norm of the decoder's gradients. None: no clipping. Those of the discriminator are not clipped.
        accumulate: Batches per step.
        warmup_steps: Steps of linear warm-up of both learning rates; a cosine follows until training ends.
        final_lr: Learning rates at the end, as a fraction of their peaks.

    Raises:
        OwlError: An argument is out of range, or ``autoencoder`` is none.
    """

    exports = ("network",)  # neither averages nor exports the discriminator

    def __init__(
        self,
        autoencoder: str,
        discriminator: AudioDiscriminator,
        pretrained: bool = True,
        weights: Weights = Weights(),  # noqa: B008 (a dataclass of floats, never changed)
        objective: ObjectiveName = "hinge",
        balance: bool = False,
        adversarial_start: int = 0,
        adversarial_ramp: int = 1000,
        segments: int | None = None,
        segment_samples: int = 17_640,
        noise: float = 0.0,
        frechet: bool = False,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=1e-4, weight_decay=0.0),
        discriminator_optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=1e-4, weight_decay=0.0),
        clip: float | None = 1.0,
        accumulate: int = 1,
        warmup_steps: int = 100,
        final_lr: float = 0.1,
    ) -> None:
        super().__init__()
        any_weight(weights)
        if adversarial_start and not (weights.stft or weights.l1 or weights.l2):
            raise OwlError(
                "recipe.weights",
                f"stft, l1 and l2 are 0 and adversarial_start is {adversarial_start}, so the first steps have no loss, "
                "expected a term that starts at once; set one of them in model.init_args.weights, or adversarial_start "
                "to 0",
            )
        at_least(1, accumulate=accumulate, segments=segments, segment_samples=segment_samples)
        at_least(0, adversarial_start=adversarial_start, adversarial_ramp=adversarial_ramp)
        not_negative(noise=noise)
        store_arguments(self)
        self.automatic_optimization = False
        original = AudioDecoder.of(load_network(autoencoder, AudioAutoencoder, "owl.recipes.audio_vae.AudioVAE"))
        self.network = copy.deepcopy(original) if pretrained else AudioDecoder(**original.config)
        self.original = freeze(original)
        self.discriminator = discriminator
        self.weights, self.objective = weights, OBJECTIVES[objective]
        self.audio_loss = AudioLoss(weights)
        self.balancer = GradientBalancer(list(asdict(weights))) if balance else None
        self.metrics = AudioMetrics(original.sample_rate, frechet)
        self.adversarial_start, self.adversarial_ramp, self.noise = adversarial_start, adversarial_ramp, noise
        self.segments, self.segment_samples = segments, segment_samples
        self.optimizer, self.discriminator_optimizer = optimizer, discriminator_optimizer
        self.clip, self.accumulate = clip, accumulate
        self.warmup_steps, self.final_lr = warmup_steps, final_lr

    @property
    def sample_rate(self) -> int:
        """Samples per second of the sounds of `media`."""
        return self.network.sample_rate

    def configure_model(self) -> None:
        """Spread the weights under FSDP2.

        Raises:
            OwlError: FSDP2 is used with ``balance``.
        """
        if self.device_mesh is not None:
            if self.balancer is not None:
                raise OwlError(
                    "trainer.strategy",
                    "balance is true, but FSDP2 frees weights that the gradient of the next term needs; set "
                    "trainer.strategy to ddp, or model.init_args.balance to false",
                )
            for network in (self.network, self.discriminator, self.original):
                shard(network, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Read the latents' statistics, which the decoder stores, and check that sound and latents fit it.

        Raises:
            OwlError: The latents come from another encoder, or are stored without a whole number for each frame.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._described = modalities, url = described(data)
        load_latent_stats(self.network, modalities, url)
        check_encoder(self.original, modalities, url)
        check_sample_rate(data, self.network.sample_rate)
        stored = any(LATENT in getattr(dataset, "modalities", ()) for dataset in datasets(data))
        if stored and "rate" in modalities[LATENT]:
            raise OwlError(
                "recipe.dataset",
                f"{LATENT} of {url} has {modalities[LATENT]['rate']:g} tokens per second, not the same number in every "
                "frame, so its windows do not start with the sound; leave it out of data.init_args.modalities and add "
                "owl.callbacks.frozen_encoder.FrozenEncoder to trainer.callbacks",
            )

    def reconstruct(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Decode the latents of a batch, in training with their noise.

        Returns:
            The true and the decoded sound, float[B, C, N * hop]; samples after the last whole latent are left out.

        Raises:
            OwlError: The batch has no latents, or they do not cover its sound.
        """
        audio, latent = sounds(batch), _latents(batch)
        samples = latent.shape[-1] * self.network.hop
        if not 0 <= audio.shape[-1] - samples < self.network.hop:
            raise OwlError(
                "recipe.dataset",
                f"{LATENT} of a batch covers {samples} of {audio.shape[-1]} samples, expected all whole multiples of "
                f"the hop, {self.network.hop}; set data.init_args.stride to 1",
            )
        if self.training:
            latent = with_noise(latent[..., None], self.network.audio_latent_std, self.noise).squeeze(-1)
        return audio[..., :samples], self.network.decode(latent)

    def adversarial_share(self, number: int) -> float:
        """Return the share of their full weight that the adversarial terms have at a step."""
        return ramped(number, self.adversarial_start, self.adversarial_ramp)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Step the discriminator and the decoder."""
        with manual_step(self, self.accumulate) as step:
            decoder, discriminator = self.trainer.optimizers
            audio, decoded = self.reconstruct(batch)
            if self.segments is not None:
                pairs = draw_segments(torch.cat([audio, decoded], 1), self.segment_samples, self.segments)
                audio, decoded = pairs[:, : audio.shape[1]].detach(), pairs[:, audio.shape[1] :]

            real, fake = self.discriminator(audio), self.discriminator(decoded.detach())
            judged = _mean(self.objective.discriminator(r.logits, f.logits) for r, f in zip(real, fake, strict=True))
            step(discriminator, judged)
            real = [Judgement(r.logits.detach(), [layer.detach() for layer in r.features]) for r in real]

            share = self.adversarial_share(step.number)
            adversarial, features = share * self.weights.adversarial, share * self.weights.features
            weights = replace(self.weights, adversarial=adversarial, features=features)
            terms: dict[str, Tensor] = {}

            def loss_of(decoded: Tensor) -> Tensor:
                terms.update(self.audio_loss(decoded, audio))
                if adversarial or features:
                    terms.update(self.adversarial_terms(decoded, real))
                return weighted_sum(terms, weights)

            if self.balancer is None:
                loss = only_towards(decoded, loss_of)
            else:
                leaf = decoded.detach().requires_grad_()
                loss = loss_of(leaf.view_as(leaf))  # see `only_towards`
                loss = with_gradient(loss, decoded, self.balancer(leaf, terms, asdict(weights)))
            step(decoder, loss, self.clip)

        settings: dict[str, Any] = {"adversarial_share": share}
        balance = {
            "accuracy": _mean((r.logits > f.logits).float().mean() for r, f in zip(real, fake, strict=True)),
            "logit_gap": _mean((r.logits - f.logits).mean() for r, f in zip(real, fake, strict=True)),
        }
        log_losses(self, loss, terms | {"discriminator": judged} | balance | settings)
        return loss

    def adversarial_terms(self, decoded: Tensor, real: list[Judgement]) -> dict[str, Tensor]:
        """Compute the adversarial terms of the decoder.

        Args:
            decoded: float[B, C, n].
            real: Judgements of the true sound.

        Returns:
            ``adversarial`` and ``features``, scalars.
        """
        fake = self.discriminator(decoded)
        pairs = zip(fake, real, strict=True)
        return {
            "adversarial": _mean(self.objective.generator(f.logits, r.logits) for f, r in pairs),
            "features": feature_matching([f.features for f in fake], [r.features for r in real]),
        }

    def measure(self, batch: dict[str, Tensor], split: str) -> None:
        """Update and log every metric."""
        audio, decoded = self.reconstruct(batch)
        self.metrics.update(decoded, audio)
        self.log_dict(self.metrics.named(split), on_epoch=True, batch_size=len(audio))

    @torch.no_grad()
    def media(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Return the loudest sounds of a batch, as decoded by the autoencoder and by this decoder, and spectrograms."""
        audio, decoded = self.reconstruct(batch)
        before = self.original.decode(_latents(batch))
        return listen({"original": audio, "stage_1": before, "adversarial": decoded}, self.network.sample_rate)


def _latents(batch: dict[str, Tensor]) -> Tensor:
    """Return the latents of a batch as one sequence each, float[B, c, N].

    Args:
        batch: ``audio_latent``: float[B, T, k, c] or float[B, N, c].
    """
    latent = batch.get(LATENT)
    if latent is None or latent.ndim not in (3, 4) or not latent.is_floating_point():
        raise OwlError(
            "recipe.dataset",
            f"{LATENT} of a batch is {form(latent)}, expected float[B, T, k, c] or float[B, tokens, c]; add "
            "owl.callbacks.frozen_encoder.FrozenEncoder to trainer.callbacks, or use a dataset of `data encode` with "
            "audio and audio_latent in data.init_args.modalities",
        )
    return latent.flatten(1, -2).transpose(1, 2).float()


def _mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()
