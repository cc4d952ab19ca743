"""Stage 1 of sound: an audio VAE trained with reconstruction losses only."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer

from owl.distributed.sharding import shard
from owl.errors import at_least
from owl.losses.audio import AudioLoss, AudioWeights
from owl.losses.reconstruction import weighted_sum
from owl.metrics.audio import AudioMetrics
from owl.metrics.latents import LatentStatistics
from owl.models.audio_autoencoder import AudioAutoencoder
from owl.nn.frozen import trained
from owl.nn.prior import CausalPrior
from owl.optim.configuration import with_schedule
from owl.recipes.arguments import any_weight, store_arguments
from owl.recipes.compilation import compile_for_training
from owl.recipes.hooks import DescribesLatents
from owl.recipes.logging import log_losses
from owl.recipes.sounds import check_sample_rate, draw_segments, listen, sounds


def adamw(parameters: Iterable) -> Optimizer:
    """Return the default optimiser; the command line can read no lambda with a tuple."""
    return AdamW(parameters, lr=1e-4, betas=(0.8, 0.99))


@dataclass
class Weights(AudioWeights):
    """Weights of the reconstruction terms and of the bottleneck's loss.

    Args:
        kl: Kullback-Leibler divergence of the posterior from N(0, 1), nats per latent element.
        prior: Squared error of a small causal model that predicts each latent from those before it, after a ramp
            (`owl.nn.prior.CausalPrior`); its authors use 4.
    """

    kl: float = 1e-4
    prior: float = 0.0


class AudioVAE(DescribesLatents):
    """Train encoder and decoder of sound end to end on reconstruction, without a discriminator.

    loss = sum of weight * term over `Weights`, where the terms compare decode(sample of encode(x)) with x. Losses of
    the network's bottleneck without a weight are added with weight 1.

    Args:
        network: The autoencoder.
        weights: Weight of every term.
        segments: Number of segments of each batch that are trained on, of which loud ones are drawn more often
            (`owl.recipes.sounds.draw_segments`). None: whole windows.
        segment_samples: Samples of a segment.
        prior_ramp: Steps in which the weight of the prior grows linearly from zero.
        sample: Whether to decode a sample of the posterior in training, or its mean.
        frechet: Whether validation measures the Fréchet distance, which needs ``pip install 'owl-platform[audio]'`` and
            validation windows of at least 0.8 seconds.
        optimizer: Called with the parameters. Others report NaN at the usual rate of 3e-4 with small batches; the
            default is a third of it.
        warmup_steps: Steps of linear warm-up; a cosine follows until training ends.
        final_lr: Learning rate at the end, as a fraction of its peak.
        compile: Whether encoder and decoder run through ``torch.compile``.

    Raises:
        OwlError: Every weight is 0, or ``frechet`` needs packages that are not installed.
    """

    exports = ("network",)  # without the prior

    def __init__(
        self,
        network: AudioAutoencoder,
        weights: Weights = Weights(),  # noqa: B008 (a dataclass of floats, never changed)
        segments: int | None = None,
        segment_samples: int = 17_640,
        prior_ramp: int = 1000,
        sample: bool = True,
        frechet: bool = False,
        optimizer: Callable[[Iterable], Optimizer] = adamw,
        warmup_steps: int = 100,
        final_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        any_weight(weights)
        at_least(1, segments=1 if segments is None else segments, segment_samples=segment_samples)
        at_least(0, prior_ramp=prior_ramp)
        store_arguments(self)
        self.network = network
        self.weights = weights
        self.audio_loss = AudioLoss(weights)
        self.prior = CausalPrior(network.latent_channels) if weights.prior else None
        self.prior_ramp = prior_ramp
        self.segments, self.segment_samples = segments, segment_samples
        self.sample = sample
        if not (sample or weights.kl):  # it has no gradient, for which DDP would wait
            network.encoder.logvar.requires_grad_(False)
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.final_lr = final_lr
        self.compile_network = compile
        self.metrics = AudioMetrics(network.sample_rate, frechet)
        self.latents = LatentStatistics(network.latent_channels, network.losses)

    @property
    def sample_rate(self) -> int:
        """Samples per second of the sounds of `media`."""
        return self.network.sample_rate

    def configure_model(self) -> None:
        """Compile in place, which keeps the names in checkpoints; shard the network."""
        if self.compile_network:
            compile_for_training(self, self.network.encoder, self.network.decoder)
        if self.device_mesh is not None:
            for part in (self.network, *([] if self.prior is None else [self.prior])):
                shard(part, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Check the sample rate of the dataset."""
        check_sample_rate(getattr(self.trainer, "datamodule", None), self.network.sample_rate)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Reconstruct, return the weighted sum of the terms, and log each of them unweighted."""
        audio = sounds(batch)
        if self.segments is not None:
            audio = draw_segments(audio, self.segment_samples, self.segments)
        reconstruction, encoding = self.network(audio, sample=self.sample)
        wanted = [name for name in self.network.losses if getattr(self.weights, name, 1.0)]
        terms = self.audio_loss(reconstruction, audio) | {name: getattr(encoding, name)() for name in wanted}
        weights = self.weights
        if self.prior is not None:
            terms["prior"], relative = self.prior.error(encoding.mean)
            ramp = min(1.0, self.global_step / self.prior_ramp) if self.prior_ramp else 1.0
            weights = replace(weights, prior=weights.prior * ramp)
        loss = weighted_sum(terms, weights)
        log_losses(self, loss, terms if self.prior is None else terms | {"prior_relative": relative})
        return loss

    def measure(self, batch: dict[str, Tensor], split: str) -> None:
        """Update and log every metric, of reconstructions of latents without noise."""
        audio = sounds(batch)
        reconstruction, encoding = self.network(audio, sample=False)
        self.metrics.update(reconstruction, audio)
        self.latents.update(encoding)
        self.log_dict(self.metrics.named(split), on_epoch=True, batch_size=len(audio))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the reconstruction float[B, C, n] in [-1, 1] and the latent's mean float[B, c, N]."""
        reconstruction, encoding = self.network(sounds(batch), sample=False)
        return {"reconstruction": reconstruction.clamp(-1, 1), "latent": encoding.mean}

    @torch.no_grad()
    def media(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Return the loudest sounds of a batch, their reconstructions, and the spectrograms of both."""
        audio = sounds(batch)
        reconstruction, _ = self.network(audio, sample=False)
        return listen({"original": audio, "reconstruction": reconstruction}, self.network.sample_rate)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser with warm-up and cosine."""
        optimizer = self.optimizer([*trained(self).values()])
        return with_schedule(self, optimizer, self.warmup_steps, self.final_lr)
