"""Stage 1 with depth and optical flow: a VAE whose latent holds picture, depth and motion."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics import Metric

from owl import models
from owl.distributed.sharding import shard
from owl.latents import described
from owl.losses.lpips import LPIPS
from owl.losses.reconstruction import ReconstructionLoss, ReconstructionWeights, weighted_sum
from owl.metrics.latents import LatentStatistics
from owl.metrics.modalities import DepthMetrics, FlowMetrics
from owl.metrics.psnr import MeanPSNR, psnr_of
from owl.metrics.reconstruction import ReconstructionMetrics
from owl.models.multimodal_autoencoder import MultimodalAutoencoder
from owl.nn.frozen import trained
from owl.optim.configuration import with_schedule
from owl.pixels import UNKNOWN
from owl.recipes.arguments import any_weight, fractions, store_arguments
from owl.recipes.compilation import compile_for_training
from owl.recipes.decoders import few
from owl.recipes.hooks import DescribesLatents
from owl.recipes.images import images, of_modality
from owl.recipes.logging import log_losses
from owl.viz.modalities import Row, colour_depth, colour_flow, depth_legend, draw_rows, flow_legend
from owl.viz.pictures import tile_size, to_bytes

FROM_RGB = "_from_rgb"
"""End of the names of metrics of what is predicted from rgb alone."""


@dataclass
class Weights(ReconstructionWeights):
    """Weights of the terms of the rgb, of the other modalities and of the bottleneck's loss.

    Args:
        depth: Mean absolute error of the logarithm of distance, scaled to [-1, 1], over measured pixels.
        flow: Mean absolute error of the colours of the flow, over measured pixels.
        kl: Kullback-Leibler divergence of the posterior from N(0, 1), nats per latent element.
    """

    depth: float = 1.0
    flow: float = 1.0
    kl: float = 1e-4


class MultimodalVAE(DescribesLatents):
    """Train an autoencoder of rgb with depth, optical flow or both, on reconstruction.

    loss = sum of weight * term over `Weights`. Perceptual and other image terms compare the rgb only; depth and flow
    have one L1 each over the pixels where they were measured. With modality dropout some frames are encoded from rgb
    alone and still compared with all modalities, so the network can also encode footage without depth and flow.
    Validation measures both ways of encoding.

    The range of depth and the scale of flow are read from the dataset and stored with the network. A checkpoint that
    was trained with others is refused.

    Args:
        network: The autoencoder.
        weights: Weight of every term.
        lpips: The perceptual distance, as a loss and as a metric.
        lpips_crop: Side in pixels of random squares on which LPIPS is estimated in training, at a lower cost. None:
            whole frames.
        lpips_samples: With ``lpips_crop``: number of samples of a batch that are cropped. None: all.
        modality_dropout: Probability that a frame is encoded from rgb alone.
        start: Checkpoint or export of an autoencoder with fewer modalities, such as one that `ImageVAE` trained, whose
            weights training starts from: latents and rgb are its own at first. None: from random weights.
        sample: Whether to decode a sample of the posterior in training, or its mean.
        optimizer: Called with the parameters; e.g. ``owl.optim.MuonAdamW``.
        warmup_steps: Steps of linear warm-up; a cosine follows until training ends.
        final_lr: Learning rate at the end, as a fraction of its peak.
        compile: Whether encoder and decoder run through ``torch.compile``.

    Raises:
        OwlError: An argument is out of range, or ``start`` has another architecture.
    """

    def __init__(
        self,
        network: MultimodalAutoencoder,
        weights: Weights = Weights(),  # noqa: B008 (a dataclass of floats, never changed)
        lpips: LPIPS | None = None,
        lpips_crop: int | None = None,
        lpips_samples: int | None = None,
        modality_dropout: float = 0.1,
        start: str | None = None,
        sample: bool = True,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=3e-4, weight_decay=1e-4),
        warmup_steps: int = 100,
        final_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        any_weight(weights)
        fractions(modality_dropout=modality_dropout)
        store_arguments(self)
        self.network = network
        if start is not None:
            network.widen(models.load(start), start)
        self.weights = weights
        lpips = lpips or LPIPS()
        self.reconstruction_loss = ReconstructionLoss(weights, lpips, lpips_crop, lpips_samples)
        self.modality_dropout = modality_dropout
        self.sample = sample
        if not (sample or weights.kl):  # it has no gradient, for which DDP would wait
            network.encoder.logvar.requires_grad_(False)
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.final_lr = final_lr
        self.compile_network = compile
        self.metrics = ReconstructionMetrics(lpips)
        self.psnr_from_rgb = MeanPSNR()
        measures = {"depth": DepthMetrics, "flow": FlowMetrics}
        others = [name for name in network.places if name != "rgb"]
        self.others = nn.ModuleDict({name: measures[name]() for name in others})
        self.others_from_rgb = nn.ModuleDict({name: measures[name]() for name in others})
        self.latents = LatentStatistics(network.latent_channels, network.losses)

    def configure_model(self) -> None:
        """Set the memory format of convolutions; compile in place, which keeps the names in checkpoints."""
        self.network.to(memory_format=torch.channels_last)
        if self.compile_network:
            compile_for_training(self, self.network.encoder, self.network.decoder)
        if self.device_mesh is not None:
            shard(self.network, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Read the range of depth and the scale of flow from the dataset; checkpoints store them."""
        self.network.read_scales(*described(self.trainer.datamodule))  # type: ignore[attr-defined]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a resumed checkpoint was trained with the same range of depth and scale of flow.

        Without a dataset, as in ``load_from_checkpoint``, they are taken over.
        """
        stored = checkpoint.get("owl", {}).get("networks", {}).get("network", {}).get("init_args", {})
        self.network.take_scales(stored, "the checkpoint")

    def picture(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the pictures of a batch as the network takes them, float[B * T, channels, H, W].

        Raises:
            OwlError: The batch lacks a modality, or has one in another form.
        """
        others = (
            of_modality(batch, name, channels) for name, channels in self.network.modalities.items() if name != "rgb"
        )
        return self.network.picture(images(batch), *others)

    def terms(self, picture: Tensor) -> dict[str, Tensor]:
        """Reconstruct pictures for training and compute every term whose weight is not zero, each a scalar."""
        dropped = torch.rand(len(picture), 1, 1, 1, device=picture.device) < self.modality_dropout
        shown = torch.where(dropped, self.network.rgb_only(picture), picture)
        reconstruction, posterior = self.network(shown, self.sample)
        rgb = self.network.places["rgb"]
        terms = self.reconstruction_loss(reconstruction[:, rgb], picture[:, rgb])
        for name in self.others:
            if getattr(self.weights, name):
                place = self.network.places[name]
                terms[name] = l1_where_known(reconstruction[:, place], picture[:, place])
        return terms | ({"kl": posterior.kl()} if self.weights.kl else {})

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Reconstruct, return the weighted sum of the terms, and log each of them unweighted."""
        terms = self.terms(self.picture(batch))
        loss = weighted_sum(terms, self.weights)
        log_losses(self, loss, terms)
        return loss

    def measure(self, batch: dict[str, Tensor], split: str) -> None:
        """Update and log every metric, of latents without noise: from all modalities and from rgb alone."""
        picture = self.picture(batch)
        original = picture[:, self.network.places["rgb"]]
        reconstruction, posterior = self.network(picture, sample=False)
        from_rgb, _ = self.network(self.network.rgb_only(picture), sample=False)
        values, alone = self.network.values(reconstruction), self.network.values(from_rgb)
        true = {name: self.true(batch, picture, name) for name in self.others}
        self.metrics.update(values["rgb"], original)
        self.psnr_from_rgb.update((alone["rgb"].clamp(-1, 1) + 1) / 2, (original + 1) / 2)
        self.latents.update(posterior)
        metrics: dict[str, Metric] = self.metrics.named(split) | {f"{split}/psnr{FROM_RGB}": self.psnr_from_rgb}
        for measures, found, end in ((self.others, values, ""), (self.others_from_rgb, alone, FROM_RGB)):
            for name, measure in measures.items():
                measure.update(found[name], *true[name])  # type: ignore[operator]
                named = measure.named().items()  # type: ignore[operator]
                metrics |= {f"{split}/{metric}{end}": value for metric, value in named}
        self.log_dict(metrics, on_epoch=True, batch_size=len(picture))

    def true(self, batch: dict[str, Tensor], picture: Tensor, name: str) -> tuple[Tensor, ...]:
        """Return what the metrics of a modality compare with: distances and where they are known, or flow."""
        stored = of_modality(batch, name, self.network.modalities[name])
        if name == "flow":
            return (stored,)
        return self.network.depth_scale.distance(stored), picture[:, self.network.places[name]] != UNKNOWN

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the latent's mean float[B, c, h, w], and the reconstruction of each modality.

        ``rgb``: float[B, 3, H, W] in [-1, 1], ``depth``: float[B, 1, H, W], distances; ``flow``: float[B, 2, H, W],
        pixels.
        """
        reconstruction, posterior = self.network(self.picture(batch), sample=False)
        return self.network.values(reconstruction.clamp(-1, 1)) | {"latent": posterior.mean}

    @torch.no_grad()
    def media(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Draw up to 6 frames, uint8[H, W, 3]: originals, reconstructions, and what is predicted from rgb alone."""
        picture = few(self.picture(batch))
        versions = {"original": picture}
        versions["reconstruction"], _ = self.network(picture, sample=False)
        versions["from rgb alone"], _ = self.network(self.network.rgb_only(picture), sample=False)
        return {"reconstruction": draw_versions(self.network, versions)}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser with warm-up and cosine."""
        optimizer = self.optimizer([*trained(self.network).values()])
        return with_schedule(self, optimizer, self.warmup_steps, self.final_lr)


def l1_where_known(reconstruction: Tensor, picture: Tensor) -> Tensor:
    """Compute the mean absolute difference over the measured elements, float[]; 0 without any.

    Args:
        reconstruction: float[B, C, H, W].
        picture: The same shape; `owl.pixels.UNKNOWN` where nothing was measured.
    """
    known = picture != UNKNOWN
    error = torch.where(known, (reconstruction - picture).abs(), 0.0)
    return error.sum() / known.sum().clamp(min=1)


def draw_versions(network: MultimodalAutoencoder, versions: dict[str, Tensor]) -> np.ndarray:
    """Draw versions of the same frames below each other, each modality with its legend, and its error in each frame.

    Pixels that were not measured are grey in all versions.

    Args:
        network: Converts pictures to values.
        versions: float[B, channels, H, W] by caption; the first are the originals.

    Returns:
        uint8[height, width, 3], RGB.
    """
    values = {caption: network.values(picture.float()) for caption, picture in versions.items()}
    first, original = next(iter(values.items()))
    height = tile_size(*network.size)[0]
    rows = []
    for name, place in network.places.items():
        known = versions[first][:, place] != UNKNOWN
        for caption, found in values.items():
            title = f"{name}: {caption}" if caption == first else caption
            true, value = original[name], found[name]
            if name == "rgb":
                errors = [f"{error:.1f} dB" for error in psnr(value, true)]
                tiles, legend = to_bytes(value.cpu()), None
            elif name == "depth":
                relative = torch.where(known, (value / true - 1).abs(), 0.0).sum((1, 2, 3)) / known.sum((1, 2, 3))
                errors = [f"AbsRel {error:.3f}" for error in relative.tolist()]
                near, far = network.depth_scale.near, network.depth_scale.far
                shown = torch.where(known, value, torch.nan)[:, 0].cpu().numpy()
                tiles, legend = colour_depth(shown, near, far), depth_legend(height, near, far)
            else:
                seen = known.all(1)
                distance = torch.where(seen, (value - true).norm(dim=1), 0.0).sum((1, 2)) / seen.sum((1, 2))
                errors = [f"EPE {error:.2f} px" for error in distance.tolist()]
                speed = fastest(true.norm(dim=1)[seen])
                shown = torch.where(seen[:, None], value, torch.nan).movedim(1, -1).cpu().numpy()
                tiles, legend = colour_flow(shown, speed), flow_legend(height, speed)
            rows.append(Row(title, tiles, errors if caption != first else (), legend if caption == first else None))
    return draw_rows(rows)


def psnr(images: Tensor, true: Tensor) -> list[float]:
    """Compute the PSNR of each pair of images float[B, C, H, W], clipped to [-1, 1], in dB."""
    error = (images.clamp(-1, 1) - true).square().mean((1, 2, 3)) / 4
    return psnr_of(error).tolist()


def fastest(speeds: Tensor) -> float:
    """Return the 98th percentile of speeds float[n], rounded up to an integer of at least 1, for the legend."""
    return max(1.0, float(torch.quantile(speeds[:: 1 + len(speeds) // 10**6], 0.98).ceil())) if len(speeds) else 1.0
