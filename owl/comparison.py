"""Decoders of the same latents side by side: on held-out clips, by quality, flicker along the flow, and speed."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image import StructuralSimilarityIndexMeasure

from owl import models
from owl.data.shards import DatasetInfo
from owl.data.windows import WindowDataset
from owl.errors import OwlError
from owl.latents import UNKNOWN, LoadedEncoder, encoder_of, load_encoder
from owl.losses.lpips import LPIPS
from owl.metrics.flicker import FlickerAlongFlow
from owl.metrics.frechet import EfficientNetLite0Features, FrechetDistance, frechet_distance
from owl.metrics.perceptual import PerceptualDistance
from owl.metrics.psnr import HIGHEST, MeanPSNR
from owl.models.image_decoder import decode_clips
from owl.nn.placement import placement
from owl.pixels import to_float
from owl.rollout.episodes import DECODED_TOGETHER, load_decoder

FLICKER = "flicker"
MOST_TURNS, LEAST_TURNS, PATIENCE = 200, 5, 20.0
"""Maximum and minimum number of frames that each decoder is timed on, and seconds after which timing ends."""


@dataclass(frozen=True)
class Clip:
    """Consecutive frames.

    Attributes:
        true: uint8[T, 3, H, W].
        latent: float[T, c, h, w], not standardised.
        flow: float[T, 2, h', w'], back to the frame before, in pixels of the frames; None if the dataset has none.
        source: Episode and frames.
    """

    true: Tensor
    latent: Tensor
    flow: Tensor | None
    source: str


def find_checkpoint(run: str) -> str:
    """Return the last checkpoint of a run folder; checkpoints and exports are returned unchanged."""
    if run.endswith(models.CHECKPOINT_SUFFIX) or (Path(run) / models.WEIGHTS).exists():
        return run
    return str(Path(run) / "checkpoints" / f"last{models.CHECKPOINT_SUFFIX}")


def run_folder(run: str) -> Path:
    """Return the folder of a run, of a checkpoint's run, or of an export."""
    path = Path(run)
    if path.suffix != models.CHECKPOINT_SUFFIX:
        return path
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent / path.stem


def load_decoders(runs: list[str]) -> dict[str, nn.Module]:
    """Load decoders of the same latents.

    Args:
        runs: Run folders, checkpoints or exports, of autoencoders or of decoders that were trained on their latents.

    Returns:
        The networks, named as their run folders, or by ``runs`` where two are named alike.

    Raises:
        OwlError: A file is missing or damaged, contains another kind of network, or two decode latents of different
            encoders.
    """
    names = [run_folder(run).name for run in runs]
    names = [name if names.count(name) == 1 else run for name, run in zip(names, runs, strict=True)]
    decoders: dict[str, nn.Module] = {}
    for name, run in zip(names, runs, strict=True):
        if name in decoders:
            raise OwlError("compare.repeated", f"{run} was given twice, expected different decoders; give it once")
        decoders[name] = load_decoder(find_checkpoint(run))
    first, expected = runs[0], encoder_of(next(iter(decoders.values())))
    for run, decoder in zip(runs, decoders.values(), strict=True):
        if (found := encoder_of(decoder)) != expected or found == UNKNOWN:
            raise OwlError(
                "latents.encoder",
                f"{run} decodes latents of encoder {found}, {first} latents of encoder {expected}; compare decoders "
                "that were trained on the same encoder",
            )
    return decoders


class HeldOutClips:
    """Clips of a split with their latents, from the dataset or from an encoder.

    Args:
        url: The dataset's folder, any fsspec URL.
        split: "train", "validation" or "test".
        clips: Largest number of clips; they are evenly spaced and do not overlap.
        length: Frames in a clip.
        fingerprint: Of the encoder whose latents are needed.
        encoder: Autoencoder that encodes the pictures; None: the dataset contains latents.
        device: Device of the encoder.

    Raises:
        OwlError: The dataset has no pictures, has no latents and there is no encoder, its latents or the encoder are
            other ones, or it has no clip of this length.
    """

    def __init__(
        self,
        url: str,
        split: str,
        clips: int,
        length: int,
        fingerprint: str,
        encoder: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        info = DatasetInfo.load(url)
        if "rgb" not in info.modalities:
            raise OwlError(
                "dataset.modalities",
                f"{url} has no rgb, it holds {', '.join(info.modalities)}; give the footage, or a dataset of latents "
                "that was encoded with --keep rgb,flow",
            )
        self.encoder: LoadedEncoder | None = None
        if encoder is not None:
            self.encoder = load_encoder(find_checkpoint(encoder))
            self._check(f"the encoder of {encoder}", self.encoder.fingerprint, fingerprint)
            self.encoder.network.to(device).requires_grad_(False)
        elif "latent" in info.modalities:
            self._check(f"latent of {url}", info.modalities["latent"]["encoder"]["fingerprint"], fingerprint)
        else:
            raise OwlError(
                "compare.encoder",
                f"{url} has no latents, it holds {', '.join(info.modalities)}, and none of the decoders is an "
                f"autoencoder; give the checkpoint of the autoencoder with encoder {fingerprint} with --encoder",
            )
        needed = ["rgb", *(["flow"] if "flow" in info.modalities else []), *([] if self.encoder else ["latent"])]
        size = self.encoder.size if self.encoder else None
        self.dataset = WindowDataset(url, split, needed, length=length, hop=length, size=size)
        self.device = torch.device(device)
        last = len(self.dataset) - 1
        chosen = torch.linspace(0, last, min(clips, last + 1), dtype=torch.float64).round().long()
        self.windows: list[int] = chosen.tolist()

    @staticmethod
    def _check(what: str, found: str, expected: str) -> None:
        if found != expected:
            raise OwlError(
                "latents.encoder",
                f"{what} is of encoder {found}, the decoders were trained on latents of encoder {expected}; give "
                "footage without latents, or the autoencoder that the decoders were trained on",
            )

    @property
    def latent_shape(self) -> list[int]:
        """[c, h, w] of a frame's latent."""
        return self.encoder.latent_shape if self.encoder else list(self.dataset.info.modalities["latent"]["shape"])

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[Clip]:
        for window in self.windows:
            sample = self.dataset[window]
            place = self.dataset.describe(int(sample["window"]))
            latent = sample["latent"] if self.encoder is None else self._encode(sample["rgb"])
            first, end = place["frames"]
            source = f"{place['episode']}, frames {first} to {end}"
            yield Clip(sample["rgb"], latent.float(), sample.get("flow"), source)

    @torch.no_grad()
    def _encode(self, rgb: Tensor) -> Tensor:
        """Encode uint8[T, 3, H, W] to the means of the posteriors, float[T, c, h, w] on the CPU."""
        assert self.encoder is not None
        network = self.encoder.network
        parts = rgb.to(self.device).split(DECODED_TOGETHER)
        return torch.cat([network.encode(to_float(part)).mean.float().cpu() for part in parts])


@torch.no_grad()
def decode(decoder: nn.Module, latent: Tensor) -> Tensor:
    """Decode latents float[T, c, h, w] to float32[T, 3, H, W], clipped to [-1, 1], on the decoder's device."""
    device, dtype = placement(decoder)
    return decode_clips(decoder, latent[None].to(device, dtype), DECODED_TOGETHER)[0].float().clamp(-1, 1)


def check_sizes(decoders: dict[str, nn.Module], clip: Clip) -> None:
    """Check that every decoder delivers pictures of the true frames' size.

    Raises:
        OwlError: One does not.
    """
    expected = tuple(clip.true.shape[1:])
    for name, decoder in decoders.items():
        found = tuple(decode(decoder, clip.latent[:1]).shape[1:])
        if found != expected:
            raise OwlError(
                "compare.size",
                f"{name} decodes to {'x'.join(map(str, found))}, the frames are {'x'.join(map(str, expected))}; give a "
                "dataset of that size, or compare decoders of one size",
            )


@torch.no_grad()
def quality(decoded: Tensor, true: Tensor, lpips: LPIPS) -> tuple[float, float]:
    """Return PSNR in dB and LPIPS of one clip, means over its frames; both are float[T, 3, H, W] in [-1, 1]."""
    error = ((decoded - true) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).clamp(max=HIGHEST).mean()), float(lpips(decoded, true).mean())


class ComparisonMetrics:
    """PSNR, SSIM, LPIPS, the Frechet distance and, where flow is known, the flicker along it, of several decoders.

    The same values as `owl.recipes.decoders.DecoderMetrics` for each, but features of true frames are computed once.

    Args:
        names: Of the decoders.
        lpips: The perceptual distance.
    """

    def __init__(self, names: list[str], lpips: LPIPS) -> None:
        device = lpips.shift.device
        self.features = EfficientNetLite0Features().to(device)
        self.true: list[Tensor] = []
        self.decoded: dict[str, list[Tensor]] = {name: [] for name in names}
        self.metrics: dict[str, dict[str, Metric]] = {
            name: {
                "psnr": MeanPSNR().to(device),
                "ssim": StructuralSimilarityIndexMeasure(data_range=1.0).to(device),
                lpips.name: PerceptualDistance(lpips),
                FLICKER: FlickerAlongFlow().to(device),
            }
            for name in names
        }
        self.lpips = lpips

    @torch.no_grad()
    def update(self, decoded: dict[str, Tensor], true: Tensor, flow: Tensor | None = None) -> None:
        """Add a clip.

        Args:
            decoded: By decoder, float[T, 3, H, W] in [-1, 1].
            true: float[T, 3, H, W] in [-1, 1].
            flow: float[T, 2, h, w], see `owl.metrics.flicker.FlickerAlongFlow`.
        """
        original = (true + 1) / 2
        self.true.append(self.features(original))
        for name, images in decoded.items():
            shown, metrics = (images + 1) / 2, self.metrics[name]
            self.decoded[name].append(self.features(shown))
            metrics["psnr"].update(shown, original)
            metrics["ssim"].update(shown, original)
            metrics[self.lpips.name].update(images, true)
            if flow is not None and len(true) > 1:
                metrics[FLICKER].update(shown[None], original[None], flow[None])

    def compute(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each decoder, by the names under which recipes log them."""
        true = torch.cat(self.true)
        return {
            name: {key: float(metric.compute()) for key, metric in metrics.items() if metric.update_called}
            | {FrechetDistance.name: float(frechet_distance(true, torch.cat(self.decoded[name])))}
            for name, metrics in self.metrics.items()
        }


@torch.no_grad()
def measure_speed(decoders: dict[str, nn.Module], latent: Tensor) -> dict[str, dict[str, float]]:
    """Time the decoders in turns, a frame each, and use the shortest time of each: other programs only add to it.

    Args:
        decoders: By name.
        latent: float[N, c, h, w], decoded one after another.

    Returns:
        By name: ``frames_per_second``, and ``speed``, relative to the first decoder.
    """
    seconds = dict.fromkeys(decoders, float("inf"))
    begin = time.perf_counter()
    for turn in range(MOST_TURNS):
        for name, decoder in decoders.items():
            device, dtype = placement(decoder)
            frame = latent[turn % len(latent)][None].to(device, dtype)
            start = time.perf_counter()
            decoder.decode(frame)  # type: ignore[operator]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
        if turn + 1 >= LEAST_TURNS and time.perf_counter() - begin > PATIENCE:
            break
    first = next(iter(seconds.values()))
    return {name: {"frames_per_second": 1 / least, "speed": first / least} for name, least in seconds.items()}


def count_parameters(decoder: nn.Module) -> int:
    """Count the parameters of a decoder, of an autoencoder only those of its ``decoder``."""
    part = getattr(decoder, "decoder", decoder) if hasattr(decoder, "encoder") else decoder
    return sum(p.numel() for p in part.parameters())
