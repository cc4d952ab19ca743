"""Stage 1: an image VAE trained with reconstruction losses only, so that its latent stays image-like."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics.image import StructuralSimilarityIndexMeasure

from owl.distributed.sharding import shard
from owl.errors import OwlError
from owl.losses import pixel
from owl.losses.equivariance import draw
from owl.losses.lpips import LPIPS, SMALLEST, random_crops
from owl.losses.wavelet import dwt
from owl.metrics.frechet import FrechetDistance
from owl.metrics.latents import LatentStatistics
from owl.metrics.perceptual import PerceptualDistance
from owl.metrics.psnr import MeanPSNR
from owl.models.image_autoencoder import ImageAutoencoder
from owl.nn.frozen import trained
from owl.nn.posterior import Posterior
from owl.optim.configuration import with_schedule
from owl.recipes.compilation import compile_for_training
from owl.recipes.logging import log_losses
from owl.viz.pictures import reconstruction_grid


@dataclass
class Weights:
    """Weight of every term of the loss; a term of weight 0 is not computed.

    Args:
        l1: Mean absolute error of the pixels.
        l2: Mean squared error of the pixels.
        logit_laplace: Negative log-likelihood under the logit-Laplace distribution (DALL-E's dVAE).
        lpips: Learned perceptual distance.
        dwt: L1 over the subbands of an orthonormal Haar wavelet transform (LTX-Video).
        kl: Kullback-Leibler divergence of the posterior from N(0, 1), nats per latent element.
    """

    l1: float = 1.0
    l2: float = 0.0
    logit_laplace: float = 0.0
    lpips: float = 0.5
    dwt: float = 0.0
    kl: float = 1e-4


class ImageVAE(LightningModule):
    """Trains encoder and decoder end to end on reconstruction, without a discriminator.

    loss = sum of weight * term over `Weights`, the terms comparing decode(sample of encode(x)) with x.

    Args:
        network: The autoencoder.
        weights: Weight of every term.
        lpips: The perceptual distance, as a loss and as a metric.
        lpips_crop: Side in pixels of random squares on which LPIPS is computed in training, which costs less and
            estimates the same. None: whole frames.
        lpips_samples: With ``lpips_crop``: how many samples of a batch are cropped. None: all.
        equivariance: Probability with which a step fits decode(T z) to T x for a random scaling and rotation T
            (EQ-VAE, Kouzelis et al. 2025); 0 costs nothing.
        sample: Whether to decode a sample of the posterior in training, or its mean.
        optimizer: Called with the parameters; e.g. ``owl.optim.MuonAdamW``.
        warmup_steps: Steps of linear warm-up; a cosine follows until training ends.
        final_lr: Learning rate at the end, as a fraction of its peak.
        compile: Whether encoder and decoder run through ``torch.compile``.
    """

    def __init__(
        self,
        network: ImageAutoencoder,
        weights: Weights = Weights(),  # noqa: B008 (a dataclass of floats, never changed)
        lpips: LPIPS | None = None,
        lpips_crop: int | None = None,
        lpips_samples: int | None = None,
        equivariance: float = 0.0,
        sample: bool = True,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=3e-4, weight_decay=1e-4),
        warmup_steps: int = 100,
        final_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not any(asdict(weights).values()):
            raise OwlError(
                "recipe.weights", "every weight of the loss is 0, expected at least one above; set one in model.weights"
            )
        self.save_hyperparameters()
        self.network = network
        self.weights = weights
        self.lpips = lpips or LPIPS()
        self.lpips_crop = lpips_crop
        self.lpips_samples = lpips_samples
        self.equivariance = equivariance
        self.sample = sample
        if not (sample or weights.kl):  # it has no gradient, which DDP would wait for
            network.encoder.logvar.requires_grad_(False)
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.final_lr = final_lr
        self.compile_network = compile
        self.psnr = MeanPSNR()
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.perceptual = PerceptualDistance(self.lpips)
        self.frechet = FrechetDistance()
        self.latents = LatentStatistics(network.latent_channels)

    def configure_model(self) -> None:
        """Lay the weights out as convolutions like them; compile in place, which keeps the names in checkpoints."""
        self.network.to(memory_format=torch.channels_last)
        if self.compile_network:
            compile_for_training(self, self.network.encoder, self.network.decoder)
        if self.device_mesh is not None:
            shard(self.network, self.device_mesh["data_parallel"])

    def images(self, batch: dict[str, Tensor]) -> Tensor:
        """Flatten the frames of a batch.

        Args:
            batch: ``rgb``: uint8[B, T, 3, H, W].

        Returns:
            float[B * T, 3, H, W] in [-1, 1].

        Raises:
            OwlError: The data module delivers no pictures, or in another form.
        """
        rgb = batch.get("rgb")
        if rgb is None or rgb.ndim != 5 or rgb.shape[2] != 3 or rgb.dtype != torch.uint8:
            found = "missing" if rgb is None else f"{rgb.dtype}{list(rgb.shape)}"
            raise OwlError(
                "recipe.dataset",
                f"rgb of a batch is {found}, uint8[B, T, 3, H, W] was expected; set data.init_args.modalities to "
                "[rgb], or change your data module",
            )
        frames = batch["rgb"].flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return frames.float() / 127.5 - 1

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor, Posterior]:
        """Reconstruct for training.

        Returns:
            The reconstruction, the image it should equal (transformed alike where equivariance is drawn), and the
            posterior.
        """
        posterior = self.network.encode(image)
        latent = posterior.sample() if self.sample else posterior.mean
        if self.equivariance and torch.rand(()).item() < self.equivariance:
            fixed_size = not isinstance(self.network.encoder.resize, nn.Identity)
            transform = draw(image, latent, fixed_size, smallest=SMALLEST)
            # in one layout, whatever the turn: compiled code is made for each layout, and for sizes once
            transformed = transform(latent).contiguous(memory_format=torch.channels_last)
            return self.network.decoder(transformed).float(), transform(image), posterior
        return self.network.decode(latent), image, posterior

    def terms(self, reconstruction: Tensor, image: Tensor, posterior: Posterior) -> dict[str, Tensor]:
        """Compute every term of the loss whose weight is not zero, each a scalar."""
        computed: dict[str, Callable[[], Tensor]] = {
            "l1": lambda: pixel.l1(reconstruction, image),
            "l2": lambda: pixel.l2(reconstruction, image),
            "logit_laplace": lambda: pixel.logit_laplace(reconstruction, image),
            "lpips": lambda: self.lpips_loss(reconstruction, image),
            "dwt": lambda: dwt(reconstruction, image),
            "kl": lambda: posterior.kl(),
        }
        return {name: computed[name]() for name, weight in asdict(self.weights).items() if weight}

    def lpips_loss(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        """Mean LPIPS over random crops of some of the batch: an unbiased, cheaper estimate of the whole."""
        if self.lpips_crop is not None:
            reconstruction, image = random_crops(reconstruction, image, self.lpips_crop, self.lpips_samples)
        return self.lpips(reconstruction, image).mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step: reconstruct, weigh the terms, log each of them unweighted."""
        reconstruction, image, posterior = self.reconstruct(self.images(batch))
        terms = self.terms(reconstruction, image, posterior)
        loss = torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()
        log_losses(self, loss, terms)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure reconstructions of the posterior's mean."""
        self.measure(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure reconstructions of the posterior's mean."""
        self.measure(batch, "test")

    def measure(self, batch: dict[str, Tensor], split: str) -> None:
        """Update and log every metric; images are compared in [0, 1] after clipping, as they are shown."""
        image = self.images(batch)
        reconstruction, posterior = self.network(image, sample=False)
        reconstruction = reconstruction.float().clamp(-1, 1)
        original, shown = (image + 1) / 2, (reconstruction + 1) / 2
        self.psnr.update(shown, original)
        self.ssim.update(shown, original)
        self.perceptual.update(reconstruction, image)
        self.frechet.update(original, shown)
        self.latents.update(posterior)
        self.log_dict(
            {
                f"{split}/psnr": self.psnr,
                f"{split}/ssim": self.ssim,
                f"{split}/{self.lpips.name}": self.perceptual,
                f"{split}/{self.frechet.name}": self.frechet,
            },
            on_epoch=True,
            batch_size=len(image),
        )

    def on_validation_epoch_end(self) -> None:
        """Keep the latent's statistics in the network, for whoever has no dataset of latents with better ones."""
        statistics = self.log_latents("val")
        self.network.latent_mean.copy_(statistics["mean"])
        self.network.latent_std.copy_(statistics["std"])

    def on_test_epoch_end(self) -> None:
        """Log the latent's statistics."""
        self.log_latents("test")

    def log_latents(self, split: str) -> dict[str, Tensor]:
        """Log the statistics of all latents of a pass, return them, and begin anew."""
        statistics = self.latents.compute()
        self.latents.reset()
        scalars = {f"{split}/latent_{name}": value for name, value in statistics.items() if value.ndim == 0}
        # already the same in every process, which Lightning cannot know
        self.log_dict({**scalars, f"{split}/tsr": self.network.tsr}, sync_dist=True)
        return statistics

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the reconstruction float[B, 3, H, W] in [-1, 1] and the latent's mean float[B, c, h, w]."""
        reconstruction, posterior = self.network(self.images(batch), sample=False)
        return {"reconstruction": reconstruction.clamp(-1, 1), "latent": posterior.mean}

    @torch.no_grad()
    def media(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Draw originals, reconstructions, errors and latents of up to 6 frames, uint8[H, W, 3]."""
        image = self.images(batch)
        image = image[:: max(1, len(image) // 6)][:6]
        reconstruction, posterior = self.network(image, sample=False)
        return {"reconstruction": reconstruction_grid(image, reconstruction, posterior.mean)}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser with warm-up and cosine."""
        optimizer = self.optimizer(trained(self.network).values())
        return with_schedule(self, optimizer, self.warmup_steps, self.final_lr)
