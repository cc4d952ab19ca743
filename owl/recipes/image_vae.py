"""Stage 1: an image VAE trained with reconstruction losses only, so that its latent stays image-like."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from owl.distributed.sharding import shard
from owl.errors import OwlError
from owl.losses.equivariance import draw
from owl.losses.lpips import LPIPS, SMALLEST
from owl.losses.reconstruction import ReconstructionLoss, ReconstructionWeights, weighted_sum
from owl.metrics.latents import LatentStatistics
from owl.metrics.reconstruction import ReconstructionMetrics
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_decoder import ImageDecoder
from owl.nn.bottleneck import Encoding
from owl.nn.frozen import trained
from owl.optim.configuration import with_schedule
from owl.recipes.arguments import any_weight, store_arguments
from owl.recipes.compilation import compile_for_training
from owl.recipes.hooks import DescribesLatents
from owl.recipes.images import images
from owl.recipes.logging import log_losses
from owl.viz.pictures import reconstruction_grid


@dataclass
class Weights(ReconstructionWeights):
    """Weights of the reconstruction terms and of the bottleneck's loss.

    Args:
        kl: Kullback-Leibler divergence of the posterior from N(0, 1), nats per latent element.
    """

    kl: float = 1e-4


class ImageVAE(DescribesLatents):
    """Train encoder and decoder end to end on reconstruction, without a discriminator.

    loss = sum of weight * term over `Weights`, where the terms compare decode(sample of encode(x)) with x. Losses of
    the network's bottleneck without a weight are added with weight 1.

    With an auxiliary decoder the encoder learns from that decoder's reconstruction terms only: the gradient of the
    network's own decoder ends at the latent. The latent is then shaped by one architecture and loss, and the images by
    another (De Fauw et al. 2019, "Hierarchical Autoregressive Image Models with Auxiliary Decoders"). The auxiliary
    decoder is not exported.

    Args:
        network: The autoencoder.
        weights: Weight of every term.
        lpips: The perceptual distance, as a loss and as a metric.
        lpips_crop: Side in pixels of random squares on which LPIPS is estimated in training, at a lower cost. None:
            whole frames.
        lpips_samples: With ``lpips_crop``: number of samples of a batch that are cropped. None: all.
        equivariance: Probability that a step fits decode(T z) to T x for a random scaling and rotation T (EQ-VAE,
            Kouzelis et al. 2025).
        sample: Whether to decode a sample of the posterior in training, or its mean.
        auxiliary: Architecture of the decoder through which the encoder learns, called with the network's geometry.
            None: it learns through the network's decoder.
        auxiliary_weights: Weights of the auxiliary decoder's terms. None: as ``weights``.
        optimizer: Called with the parameters; e.g. ``owl.optim.MuonAdamW``.
        warmup_steps: Steps of linear warm-up; a cosine follows until training ends.
        final_lr: Learning rate at the end, as a fraction of its peak.
        compile: Whether encoder and decoder run through ``torch.compile``.
    """

    exports = ("network",)  # without the auxiliary decoder

    def __init__(
        self,
        network: ImageAutoencoder,
        weights: Weights = Weights(),  # noqa: B008 (a dataclass of floats, never changed)
        lpips: LPIPS | None = None,
        lpips_crop: int | None = None,
        lpips_samples: int | None = None,
        equivariance: float = 0.0,
        sample: bool = True,
        auxiliary: Callable[[int, tuple[int, int], tuple[int, int], int], ImageDecoder] | None = None,
        auxiliary_weights: ReconstructionWeights | None = None,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=3e-4, weight_decay=1e-4),
        warmup_steps: int = 100,
        final_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        any_weight(weights)
        if weights.kl and "kl" not in network.losses:
            raise OwlError(
                "recipe.weights",
                f"weights.kl is {weights.kl}, but the bottleneck of {type(network).__name__} has no posterior with "
                "a divergence; set model.init_args.weights.kl to 0",
            )
        store_arguments(self)
        self.network = network
        self.weights = weights
        lpips = lpips or LPIPS()
        self.reconstruction_loss = ReconstructionLoss(weights, lpips, lpips_crop, lpips_samples)
        self.auxiliary: ImageDecoder | None = None
        if auxiliary is not None:
            self.auxiliary = auxiliary(network.channels, network.size, network.latent_size, network.latent_channels)
            self.auxiliary_loss = ReconstructionLoss(auxiliary_weights or weights, lpips, lpips_crop, lpips_samples)
        self.equivariance = equivariance
        self.sample = sample
        if not (sample or weights.kl):  # it has no gradient, for which DDP would wait
            network.encoder.logvar.requires_grad_(False)
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.final_lr = final_lr
        self.compile_network = compile
        self.metrics = ReconstructionMetrics(lpips)
        self.latents = LatentStatistics(network.latent_channels, network.losses)

    def configure_model(self) -> None:
        """Set the memory format of convolutions; compile in place, which keeps the names in checkpoints."""
        auxiliary = [] if self.auxiliary is None else [self.auxiliary]
        for network in (self.network, *auxiliary):
            network.to(memory_format=torch.channels_last)
        if self.compile_network:
            parts = (self.network.encoder, self.network.decoder, *(network.decoder for network in auxiliary))
            compile_for_training(self, *parts)
        if self.device_mesh is not None:
            for network in (self.network, *auxiliary):
                shard(network, self.device_mesh["data_parallel"])

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor, Encoding, Tensor | None]:
        """Reconstruct for training.

        Returns:
            The reconstruction, the target image (with the same transform if equivariance is drawn), the encoding, and
            the auxiliary decoder's reconstruction (None without one).
        """
        encoding = self.network.encode(image)
        latent = encoding.sample() if self.sample else encoding.mean
        transformed = bool(self.equivariance) and torch.rand(()).item() < self.equivariance
        if transformed:
            fixed_size = not isinstance(self.network.encoder.resize, nn.Identity)
            transform = draw(image, latent, fixed_size, smallest=SMALLEST)
            # in one memory format for every rotation, since each format is compiled separately
            latent = transform(latent).contiguous(memory_format=torch.channels_last)
            image = transform(image)

        def decode(network: ImageAutoencoder | ImageDecoder, latent: Tensor) -> Tensor:
            return network.decoder(latent).float() if transformed else network.decode(latent)

        if self.auxiliary is None:
            return decode(self.network, latent), image, encoding, None
        return decode(self.network, latent.detach()), image, encoding, decode(self.auxiliary, latent)

    def terms(self, reconstruction: Tensor, image: Tensor, encoding: Encoding) -> dict[str, Tensor]:
        """Compute every term of the loss whose weight is not zero, each a scalar."""
        terms = self.reconstruction_loss(reconstruction, image)
        wanted = [name for name in self.network.losses if getattr(self.weights, name, 1.0)]
        return terms | {name: getattr(encoding, name)() for name in wanted}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Reconstruct, return the weighted sum of the terms, and log each of them unweighted."""
        reconstruction, image, encoding, auxiliary = self.reconstruct(images(batch))
        terms = self.terms(reconstruction, image, encoding)
        loss = weighted_sum(terms, self.weights)
        if auxiliary is not None:
            own = self.auxiliary_loss(auxiliary, image)
            loss = loss + weighted_sum(own, self.auxiliary_loss.weights)
            terms |= {f"auxiliary_{name}": term for name, term in own.items()}
        log_losses(self, loss, terms)
        return loss

    def measure(self, batch: dict[str, Tensor], split: str) -> None:
        """Update and log every metric, of reconstructions of latents without noise."""
        image = images(batch)
        reconstruction, encoding = self.network(image, sample=False)
        self.metrics.update(reconstruction, image)
        self.latents.update(encoding)
        self.log_dict(self.metrics.named(split), on_epoch=True, batch_size=len(image))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the reconstruction float[B, 3, H, W] in [-1, 1] and the latent's mean float[B, c, h, w]."""
        reconstruction, encoding = self.network(images(batch), sample=False)
        return {"reconstruction": reconstruction.clamp(-1, 1), "latent": encoding.mean}

    @torch.no_grad()
    def media(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Draw originals, reconstructions, errors and latents of up to 6 frames, uint8[H, W, 3]."""
        image = images(batch)
        image = image[:: max(1, len(image) // 6)][:6]
        reconstruction, encoding = self.network(image, sample=False)
        return {"reconstruction": reconstruction_grid(image, reconstruction, encoding.mean)}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser with warm-up and cosine."""
        parameters = [*trained(self.network).values()]
        if self.auxiliary is not None:
            parameters += trained(self.auxiliary).values()
        optimizer = self.optimizer(parameters)
        return with_schedule(self, optimizer, self.warmup_steps, self.final_lr)
