"""Evaluate the rollouts of a world model: distance to true frames, action accuracy and drift."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from owl.losses.lpips import LPIPS
from owl.metrics.flicker import Flicker
from owl.metrics.frechet import EfficientNetLite0Features, FrechetDistance, frechet_distance
from owl.metrics.psnr import psnr_of
from owl.models.inverse_dynamics import BEFORE
from owl.models.world_model import Streams, WorldTransformer
from owl.nn.placement import placement
from owl.pixels import to_float
from owl.rollout.engine import Engine
from owl.rollout.episodes import Batch, Episodes, as_bytes
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from owl.rollout.sound import Sound, decode_sound
from owl.spacing import evenly_spaced

SEGMENT = 100  # frames per segment of a long rollout
REFERENCE = 1000  # true frames with which each segment is compared


@dataclass(frozen=True)
class Clips:
    """Short rollouts and the true frames under the same controls.

    Attributes:
        true: uint8[B, context + H, 3, h, w].
        generated: uint8[B, H, 3, h, w], the frames after the context.
        buttons: float[B, context + H, number of buttons], the recorded controls.
        axes: float[B, context + H, number of axes].
        true_latents: Encoded latents of the frames after the context: "video" float[B, H, c, h, w], ...
        latents: Generated latents.
        reconstructed: If ``true`` are pictures of the dataset, the autoencoder's reconstruction of the frames after the
            context, uint8[B, H, 3, h, w]: the best that a perfect world model could reach.
        sound: The sound, if it is decoded.
        flow: True flow of the frames after the context back to the frame before, float[B, H, 2, h', w'] in pixels, if
            the dataset has it.
    """

    true: Tensor
    generated: Tensor
    buttons: Tensor
    axes: Tensor
    true_latents: Streams
    latents: Streams
    reconstructed: Tensor | None = None
    sound: Sound | None = None
    flow: Tensor | None = None

    @property
    def context(self) -> int:
        """Number of given frames."""
        return self.true.shape[1] - self.horizon

    @property
    def horizon(self) -> int:
        """Number of generated frames."""
        return self.generated.shape[1]

    @property
    def future(self) -> Tensor:
        """The true frames after the context, uint8[B, H, 3, h, w]."""
        return self.true[:, self.context :]


def roll_out(
    engine: Engine, episodes: Episodes, windows: Batch, context: int, seed: int = 0, quiet: bool = True
) -> Clips:
    """Continue windows from their first ``context`` frames, under the controls of the others.

    Args:
        engine: With a decoder for "video".
        episodes: Source of the windows.
        windows: Windows from `Episodes.windows`, longer than ``context``; with ``measured`` for flow and sound.
        context: Number of given frames, at least 1.
        seed: Seed of all noise.
        quiet: Whether to hide the progress bar.
    """
    rows, length = windows["buttons"].shape[:2]
    engine.wait_compiled(rows)
    episodes.start(engine, windows, context, seed)
    pictures, latents = [], []
    for t in tqdm(range(context, length), desc="short rollouts", unit="frame", disable=quiet):
        frame = engine.step(
            *episodes.given({name: values[:, t] for name, values in windows.items() if name != "window"})
        )
        pictures.append(as_bytes(frame.decoded["video"]))
        latents.append({name: x.float().cpu() for name, x in frame.latents.items()})
    true_latents = episodes.latents(windows, slice(context, None))
    generated = {name: torch.stack([frame[name] for frame in latents], 1) for name in latents[0]}
    return Clips(
        true=episodes.pictures(windows),
        generated=torch.stack(pictures, 1),
        buttons=windows["buttons"],
        axes=windows["axes"],
        true_latents=true_latents,
        latents=generated,
        reconstructed=episodes.decode(true_latents["video"]) if episodes.truth == "rgb" else None,
        sound=None if episodes.sound_truth is None else clip_sound(episodes, windows, generated["audio"], context),
        flow=windows["flow"][:, context:] if "flow" in windows else None,
    )


@torch.no_grad()
def clip_sound(episodes: Episodes, windows: Batch, generated: Tensor, context: int) -> Sound:
    """Decode the sound of short rollouts.

    Args:
        episodes: Source of the windows, with a decoder of sound.
        windows: The windows that were continued.
        generated: Generated latents, float[B, H, k, c].
        context: Number of given frames.
    """
    decoder = episodes.sound_decoder
    assert decoder is not None
    given = episodes.latents(windows, slice(context))["audio"]
    continued = decode_sound(decoder, torch.cat([given, generated], 1))  # the decoder needs the sound before
    return Sound(episodes.sound(windows), continued[:, context:], int(decoder.sample_rate))  # type: ignore[arg-type]


def horizon_curves(clips: Clips, lpips: LPIPS) -> dict[str, list[float]]:
    """Compute PSNR and LPIPS to true frames, for the rollouts and for repeating the last frame of the context.

    Args:
        clips: The rollouts.
        lpips: The perceptual distance; the clips are moved to its device.

    Returns:
        ``psnr`` (dB; 100 where equal), ``lpips``, ``repeat_psnr`` and ``repeat_lpips``: the mean over clips of frame 1,
        2, ... after the context. With ``clips.reconstructed``, also ``reconstruction_psnr`` and
        ``reconstruction_lpips``, the error of the autoencoder.
    """
    device = lpips.shift.device
    sides = {"": clips.generated, "repeat_": clips.true[:, [clips.context - 1] * clips.horizon]}
    if clips.reconstructed is not None:
        sides["reconstruction_"] = clips.reconstructed
    curves: dict[str, list[float]] = {f"{side}{name}": [] for name in ("psnr", "lpips") for side in sides}
    for h in range(clips.horizon):
        true = clips.future[:, h].to(device)
        for side, frames in sides.items():
            frame = frames[:, h].to(device)
            # no metric objects: in training only one process measures, and synchronizing them would deadlock
            error = ((frame.float() - true.float()) / 255).square().mean((1, 2, 3))
            curves[f"{side}psnr"].append(float(psnr_of(error).mean()))
            curves[f"{side}lpips"].append(float(lpips(to_float(frame), to_float(true)).mean()))
    return curves


def audio_latent_mse(clips: Clips, network: WorldTransformer) -> list[float]:
    """Compute the MSE of standardised audio latents of frame 1, 2, ... after the context; independent ones give 2."""
    device = placement(network).device
    generated, true = (
        network.standardize({"audio": side["audio"].to(device)})["audio"]
        for side in (clips.latents, clips.true_latents)
    )
    return (generated - true).square().mean((0, 2, 3)).tolist()


def flicker(clips: Clips) -> dict[str, float]:
    """Compute `owl.metrics.flicker.Flicker`; empty for clips of fewer than two frames."""
    if clips.horizon < 2:
        return {}
    metric = Flicker()
    for generated, true in zip(clips.generated.split(1), clips.future.split(1), strict=True):
        metric.update(generated.float() / 255, true.float() / 255)
    return {name: float(value) for name, value in metric.compute().items()}


def action_following(clips: Clips, reader: InverseDynamicsReader) -> dict[str, float]:
    """Compute how often the controls predicted from generated frames match the given ones.

    The reader also makes errors on true frames, so both are measured on the same windows.

    Returns:
        Every accuracy on generated frames as ``<name>`` and on true frames as ``<name>_true``; for ``axis_accuracy``,
        ``button_accuracy`` and their mean, ``action_accuracy``, also generated over true as ``<name>_ratio``: 1 is the
        best measurable value.
    """
    skip = min(BEFORE, clips.context)  # frames of the context, so that the first generated frame has neighbours
    begin = clips.context - skip
    played = (clips.buttons[:, begin:], clips.axes[:, begin:])
    continued = torch.cat([clips.true[:, begin : clips.context], clips.generated], 1)
    generated = with_mean(reader.accuracy(continued, *played, skip))
    true = with_mean(reader.accuracy(clips.true[:, begin:], *played, skip))
    values = dict(generated)
    for name, value in true.items():
        if not name.startswith("axis_chance"):  # the chance level depends only on the controls
            values[f"{name}_true"] = value
    for name in ("action_accuracy", "axis_accuracy", "button_accuracy"):
        if true.get(name):
            values[f"{name}_ratio"] = generated[name] / true[name]
    return values


def with_mean(values: dict[str, float]) -> dict[str, float]:
    """Return accuracies with ``action_accuracy`` first, the mean of the available axis and button accuracies."""
    parts = [values[name] for name in ("axis_accuracy", "button_accuracy") if name in values]
    return ({"action_accuracy": sum(parts) / len(parts)} if parts else {}) | values


def long_rollout(
    engine: Engine,
    episodes: Episodes,
    frames: int,
    side_by_side: int,
    context: int,
    seed: int = 0,
    heard: deque[Tensor] | None = None,
) -> Iterator[tuple[Tensor, Batch]]:
    """Roll out several rows of frames under the controls of consecutive episodes of the split.

    Args:
        engine: With a decoder for "video".
        episodes: Source of context and controls.
        frames: Number of frames per row.
        side_by_side: Number of rows, S, which start at different positions of the split.
        context: Number of given frames per row.
        seed: Seed of all noise.
        heard: Where to append the decoded sound of each frame, float[S, channels, samples]; the engine needs a decoder
            for "audio".

    Yields:
        The frame of every row, uint8[S, 3, h, w], and the recorded frame with its controls.
    """
    begin = episodes.starts(side_by_side)
    engine.wait_compiled(side_by_side)
    episodes.start(engine, begin, context, seed)
    for _, given in zip(range(frames), episodes.stream(side_by_side, context), strict=False):
        frame = engine.step(*episodes.given(given))
        if heard is not None:
            heard.append(frame.decoded["audio"].cpu())
        yield as_bytes(frame.decoded["video"]), given


@dataclass(frozen=True)
class Drift:
    """Distance of generated frames to true frames over the course of a long rollout.

    Attributes:
        segment: Frames of each row per segment.
        distances: Frechet distance of segment 1, 2, ... to true frames of the split.
        true: Frechet distance of the true frames under the first segment's controls: the value of a perfect model.
    """

    segment: int
    distances: list[float]
    true: float

    @property
    def ratio(self) -> float:
        """Distance of the last segment over that of the first; 1 means no drift."""
        return self.distances[-1] / self.distances[0]

    def metrics(self) -> dict[str, float]:
        """Return the distance of each segment and of true frames, and ``drift``, the ratio."""
        values = {
            f"{FrechetDistance.name}_{n * self.segment + 1}_{(n + 1) * self.segment}": distance
            for n, distance in enumerate(self.distances)
        }
        return values | {f"{FrechetDistance.name}_true": self.true, "drift": self.ratio}


class DriftMeter:
    """Measure the drift of a long rollout.

    Args:
        episodes: Source of the true frames.
        frames: Length of the rollout; it is divided into segments of 100 frames, a short one into halves.
        device: Device for computing features.
    """

    def __init__(self, episodes: Episodes, frames: int, device: torch.device | str = "cpu") -> None:
        self.segment = max(1, min(SEGMENT, frames // 2))
        self._features = EfficientNetLite0Features().to(device)
        self._episodes = episodes
        self._generated: list[Tensor] = []
        self._true: list[Tensor] = []

    def update(self, generated: Tensor, given: Batch) -> None:
        """Add a pair from `long_rollout`."""
        self._generated.append(self._features.of_pictures(generated))
        if len(self._true) < self.segment:
            batch = {name: values[:, None] for name, values in given.items()}
            self._true.append(self._features.of_pictures(self._episodes.pictures(batch)[:, 0]))

    def compute(self) -> Drift | None:
        """Compute the distances; None if a segment has fewer than two frames."""
        if self.segment * len(self._generated[0]) < 2:
            return None
        reference = self._reference()
        whole = len(self._generated) // self.segment
        segments = [self._generated[n * self.segment : (n + 1) * self.segment] for n in range(whole)]
        distances = [float(frechet_distance(reference, torch.cat(part))) for part in segments]
        return Drift(self.segment, distances, float(frechet_distance(reference, torch.cat(self._true))))

    def _reference(self) -> Tensor:
        """Compute features of true frames, evenly spaced over the split."""
        dataset = self._episodes.dataset
        total = len(dataset) * dataset.length
        chosen = np.array(evenly_spaced(total, REFERENCE))
        found = []
        for window in np.unique(chosen // dataset.length).tolist():
            frames = chosen[chosen // dataset.length == window] % dataset.length
            batch = {name: x[:, frames] for name, x in self._episodes.batch([window]).items() if name != "window"}
            found.append(self._features.of_pictures(self._episodes.pictures(batch)[0]))
        return torch.cat(found)


def latency(engine: Engine, episodes: Episodes, frames: int, context: int, warmup: int = 10) -> dict[str, float]:
    """Measure the time per frame at batch size 1, from the controls to the decoded picture.

    Args:
        engine: With a decoder for "video".
        episodes: Source of context and controls.
        frames: Number of timed frames.
        context: Number of given frames.
        warmup: Number of untimed frames before them.

    Returns:
        ``latency_<part>_p50`` and ``latency_<part>_p95`` in seconds for the parts commit, denoise, decode and total,
        and ``frames_per_second``, 1 over the mean total.
    """
    begin = episodes.starts(1)
    engine.wait_compiled(1)
    episodes.start(engine, begin, context)
    parts: list[dict[str, float]] = []
    for _, given in zip(range(warmup + frames), episodes.stream(1, context), strict=False):
        parts.append(engine.step(*episodes.given(given)).seconds)
    return latency_of(parts[warmup:])


def latency_of(times: list[dict[str, float]]) -> dict[str, float]:
    """Compute percentiles over frames of the seconds of each part, as returned by `latency`."""
    timed = {name: np.array([seconds[name] for seconds in times]) for name in times[0]}
    timed["total"] = np.sum(list(timed.values()), axis=0)
    values = {
        f"latency_{name}_p{percentile}": float(np.percentile(seconds, percentile))
        for name, seconds in timed.items()
        for percentile in (50, 95)
    }
    return values | {"frames_per_second": float(1 / timed["total"].mean())}
