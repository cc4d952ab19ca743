"""Distillation of encoders: a smaller encoder learns to give the same latents."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric

from owl import models
from owl.distributed.sharding import shard
from owl.losses.lpips import LPIPS
from owl.metrics.psnr import MeanPSNR
from owl.models.image_encoder import ImageEncoder
from owl.nn.frozen import freeze, trained
from owl.nn.posterior import Posterior
from owl.optim.configuration import with_schedule
from owl.recipes.arguments import store_arguments
from owl.recipes.decoders import DecoderMetrics, few, load_autoencoder
from owl.recipes.hooks import MeasuresBatches
from owl.recipes.images import images
from owl.recipes.logging import log_losses
from owl.viz.pictures import comparison_grid

EncoderFactory = Callable[[int, tuple[int, int], tuple[int, int], int], ImageEncoder]
"""An encoder without its geometry: called with channels, size, latent_size and latent_channels of an autoencoder."""


@dataclass
class Weights:
    """Weights of the loss.

    Args:
        mean: Mean squared error of the posterior's mean, in units of the latents' variance.
        logvar: Mean squared error of its log-variance.
    """

    mean: float = 1.0
    logvar: float = 0.01


class DistillEncoder(MeasuresBatches):
    """Train a small encoder to give the posteriors of a larger one, its teacher.

    loss = weights.mean * |(mean - teacher's mean) / std|^2 + weights.logvar * |logvar - teacher's logvar|^2, each
    averaged over its elements, with the standard deviation of each channel as the autoencoder stores it.

    The student's checkpoint stores the fingerprint of the teacher: its latents may be used wherever the teacher's are.
    They are not equal, so validation also measures what the teacher's decoder makes of them.

    Args:
        autoencoder: Checkpoint or export of the image autoencoder whose encoder is imitated.
        network: Architecture of the student.
        weights: Weight of every term.
        lpips: The perceptual distance, as a metric.
        optimizer: Called with the student's parameters.
        warmup_steps: Steps of linear warm-up; a cosine follows until training ends.
        final_lr: Learning rate at the end, as a fraction of its peak.

    Raises:
        OwlError: ``autoencoder`` is none.
    """

    def __init__(
        self,
        autoencoder: str,
        network: EncoderFactory,
        weights: Weights = Weights(),  # noqa: B008 (a dataclass of floats, never changed)
        lpips: LPIPS | None = None,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=3e-4, weight_decay=1e-4),
        warmup_steps: int = 100,
        final_lr: float = 0.0,
    ) -> None:
        super().__init__()
        store_arguments(self)
        teacher = load_autoencoder(autoencoder)
        self.network = network(teacher.channels, teacher.size, teacher.latent_size, teacher.latent_channels)
        fingerprint = bytes.fromhex(models.fingerprint(teacher.encoder))
        self.network.latent_encoder.copy_(torch.tensor(list(fingerprint), dtype=torch.uint8))
        self.teacher = freeze(teacher)
        self.weights = weights
        self.optimizer = optimizer
        self.warmup_steps, self.final_lr = warmup_steps, final_lr
        self.metrics, self.teacher_psnr = DecoderMetrics(lpips or LPIPS()), MeanPSNR()
        self.mean_error, self.logvar_error = (MeanMetric(nan_strategy="disable") for _ in range(2))

    def configure_model(self) -> None:
        """Set the memory format of convolutions; spread the weights under FSDP2."""
        for network in (self.network, self.teacher):
            network.to(memory_format=torch.channels_last)
            if self.device_mesh is not None:
                shard(network, self.device_mesh["data_parallel"])

    def terms(self, image: Tensor) -> tuple[Posterior, Posterior, dict[str, Tensor]]:
        """Encode float[B, 3, H, W] in [-1, 1] with both; return student's and teacher's posterior, and each term."""
        with torch.no_grad():
            target = self.teacher.encode(image)
        posterior = self.network.encode(image)
        error = (posterior.mean - target.mean) / self.teacher.latent_std[:, None, None]
        terms = {"mean": error.square().mean(), "logvar": (posterior.logvar - target.logvar).square().mean()}
        return posterior, target, terms

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the weighted sum of the terms, and log each of them unweighted."""
        _, _, terms = self.terms(images(batch))
        loss = self.weights.mean * terms["mean"] + self.weights.logvar * terms["logvar"]
        log_losses(self, loss, terms)
        return loss

    def measure(self, batch: dict[str, Tensor], split: str) -> None:
        """Update and log both errors, and metrics of what the teacher's decoder makes of the student's means."""
        image = images(batch)
        posterior, target, terms = self.terms(image)
        self.metrics.update(self.teacher.decode(posterior.mean), image, batch.get("flow"))
        decoded = self.teacher.decode(target.mean).float().clamp(-1, 1)
        self.teacher_psnr.update((decoded + 1) / 2, (image + 1) / 2)
        self.mean_error.update(terms["mean"], len(image))
        self.logvar_error.update(terms["logvar"], len(image))
        own = {"mean": self.mean_error, "logvar": self.logvar_error, "psnr_teacher": self.teacher_psnr}
        metrics = self.metrics.named(split) | {f"{split}/{name}": metric for name, metric in own.items()}
        self.log_dict(metrics, on_epoch=True, batch_size=len(image))

    @torch.no_grad()
    def media(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Draw original frames, and the teacher's decodings of both latents, uint8[H, W, 3]."""
        image = few(images(batch))
        posterior, target, _ = self.terms(image)
        decoded = {"teacher": self.teacher.decode(target.mean), "student": self.teacher.decode(posterior.mean)}
        return {"encoders": comparison_grid({"original": image, **decoded})}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser with warm-up and cosine."""
        optimizer = self.optimizer(trained(self.network).values())
        return with_schedule(self, optimizer, self.warmup_steps, self.final_lr)
