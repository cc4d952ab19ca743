"""Evaluation of the rollouts of a world model: metrics, pictures, videos and a report."""

import json
import shlex
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from torch import Tensor, nn
from tqdm import tqdm

from owl.atomic import atomic_write
from owl.comparison.rollouts import decoded_rollouts, flat, measure_on_rollouts, section, write_page
from owl.comparison.scripted import ScriptedEvaluation
from owl.hardware import device_name
from owl.losses.lpips import LPIPS
from owl.metrics.frechet import FrechetDistance
from owl.models.sampling import Sampling
from owl.pixels import flow_scale
from owl.rollout.engine import Engine
from owl.rollout.episodes import Batch, Episodes
from owl.rollout.evaluation import (
    Clips,
    Drift,
    DriftMeter,
    action_following,
    audio_latent_mse,
    flicker,
    horizon_curves,
    latency,
    long_rollout,
    roll_out,
)
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from owl.rollout.motion import decode_motion, end_point_curves, warp_curves
from owl.rollout.report import MEASURED, at_horizons, following_table, horizon_table, sound_section, value_table
from owl.rollout.sound import mel_curves, onset_agreement
from owl.version import code_version
from owl.viz import rollouts as pictures
from owl.viz.film import write_film
from owl.viz.pictures import png

TIMED_FRAMES = 100

Precision = Literal["bf16", "fp32", "fp8_weight_only", "fp8_dynamic"]


@dataclass(frozen=True)
class Settings:
    """Arguments of an evaluation; see `owl.commands.rollout.main`."""

    checkpoint: str
    data: str
    split: str
    decoder: list[str]
    audio_decoder: str | None
    motion_decoder: str | None
    inverse_dynamics: str | None
    frames: int
    clips: int
    horizon: int
    context: int
    side_by_side: int
    sampling: Sampling
    inner_guidance: float
    starts: int
    scripts: str | None
    game: bool
    stride: int
    precision: Precision
    compile: bool
    seed: int

    def command(self, out: Path) -> str:
        """Return the command line that repeats the evaluation."""
        words = ["python", "-m", "owl", "rollout", self.checkpoint, "--data", self.data, "--out", str(out)]
        named = ("checkpoint", "data", "sampling")
        for name, value in {**vars(self), **vars(self.sampling)}.items():
            if name in named or value in (None, []) or (value is False and name == "compile"):
                continue
            values = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
            words += [f"--{name}", *map(str, values)]
        return shlex.join(words)


class Evaluation:
    """One evaluation: computes metrics and writes the results.

    Args:
        settings: Its arguments.
        engine: Engine of the world model, with the first decoder for "video".
        decoders: Decoders of the video by name; if there are several, they are compared.
        motion_decoder: Decoder of the motion, or None.
        episodes: Ground truth.
        reader: Inverse dynamics model, or None.
        fingerprint: Of the world model as it is stored, see `owl.models.fingerprint`.
        out: Folder for the results.

    Attributes:
        clips: The short rollouts, after `run`.
    """

    clips: Clips

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        decoders: dict[str, nn.Module],
        motion_decoder: nn.Module | None,
        episodes: Episodes,
        reader: InverseDynamicsReader | None,
        fingerprint: str,
        out: Path,
    ) -> None:
        self.settings, self.engine, self.decoders = settings, engine, decoders
        self.motion_decoder = motion_decoder
        self.episodes, self.reader, self.fingerprint, self.out = episodes, reader, fingerprint, out
        self.lpips = LPIPS().to(engine.device)
        if reader is not None:
            reader.network.to(engine.device)
        decoder = engine.decoders.get("audio")
        self.sample_rate = None if decoder is None else int(decoder.sample_rate)  # type: ignore[arg-type]

    def run(self, scripted: ScriptedEvaluation | None) -> dict[str, float]:
        """Compute metrics, write pictures and videos, and finally the report; return the metrics.

        Args:
            scripted: Scripted controls, or None.
        """
        start, settings, network = time.monotonic(), self.settings, self.engine.network
        (self.out / MEASURED).unlink(missing_ok=True)  # of earlier results
        clips = self.clips = roll_out(
            self.engine,
            self.episodes,
            self.episodes.windows(settings.clips, measured=True),
            settings.context,
            settings.seed,
            quiet=False,
        )
        curves = horizon_curves(clips, self.lpips)
        if "audio" in network.generated:
            curves["audio_latent_mse"] = audio_latent_mse(clips, network)
        if clips.sound is not None:
            curves |= mel_curves(clips.sound)
        if clips.flow is not None:
            curves |= warp_curves(clips)
        if self.motion_decoder is not None:
            scale = flow_scale(
                self.episodes.dataset.info.modalities[network.latent_modalities["motion"]], settings.data
            )
            motion = decode_motion(self.motion_decoder, clips.latents["motion"], scale)
            curves |= end_point_curves(clips, motion)
        metrics = at_horizons(curves) | flicker(clips)
        if clips.sound is not None:
            metrics |= onset_agreement(clips.sound, clips.buttons, network.buttons)
        if self.reader is not None:
            metrics |= action_following(clips, self.reader)
        atomic_write(self.out / "horizon.png", pictures.horizon_chart(curves, self.lpips.name))
        atomic_write(self.out / "strip.png", png(pictures.strip(clips)))
        film = pictures.comparison_film(clips, network.buttons, network.axes)
        sound = pictures.comparison_sound(clips)
        write_film(self.out / "comparison.mp4", film, self.episodes.fps, sound, self.sample_rate)
        decoders = self.compare_decoders(clips) if len(self.decoders) > 1 else {}
        metrics |= flat(decoders)
        drift = self.long_rollout(pictures.axis_scales(clips.axes))
        if drift is not None:
            atomic_write(self.out / "drift.png", pictures.drift_chart(drift, FrechetDistance.name))
            metrics |= drift.metrics()
        if scripted is not None:
            metrics |= scripted.run(self.engine, self.episodes, self.reader, self.lpips, settings.seed, self.out)
        metrics |= latency(self.engine, self.episodes, min(TIMED_FRAMES, settings.frames), settings.context)
        metrics["clips"] = len(clips.true)
        metrics["seconds"] = round(time.monotonic() - start, 1)
        atomic_write(self.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        scripts = None if scripted is None else scripted.section(metrics, settings.inverse_dynamics)
        atomic_write(self.out / "report.md", self.report(metrics, drift is not None, decoders, scripts))
        measured = {"checkpoint": settings.checkpoint, "fingerprint": self.fingerprint}
        atomic_write(self.out / MEASURED, yaml.safe_dump(measured, sort_keys=False))
        return metrics

    def compare_decoders(self, clips: Clips) -> dict[str, dict[str, float]]:
        """Measure all decoders on the generated latents, and write decoders.html and decoders.png."""
        settings = self.settings
        facts = {
            "world model": settings.checkpoint,
            "dataset": f"{settings.data}, {settings.split} split",
            "device": device_name(self.engine.device),
        }
        values = measure_on_rollouts(self.decoders, clips, self.lpips)
        shown = decoded_rollouts(self.decoders, clips)
        write_page(self.out, values, shown, self.lpips, facts, self.episodes.fps, settings.command(self.out))
        return values

    def long_rollout(self, scales: list[float]) -> Drift | None:
        """Generate the long rollouts, write their video and measure their drift."""
        settings, network = self.settings, self.engine.network
        meter = DriftMeter(self.episodes, settings.frames, self.engine.device)
        heard: deque[Tensor] | None = None if self.sample_rate is None else deque()

        def measured() -> Iterator[tuple[Tensor, Batch]]:
            rollout = long_rollout(
                self.engine,
                self.episodes,
                settings.frames,
                settings.side_by_side,
                settings.context,
                settings.seed,
                heard,
            )
            for generated, given in tqdm(rollout, "long rollouts", settings.frames, unit="frame"):
                meter.update(generated, given)
                yield generated, given

        fps = self.episodes.fps
        film = pictures.rollout_film(measured(), network.buttons, network.axes, scales, fps)
        sound = () if heard is None else (part[0].numpy() for part in iter(heard.popleft, None))  # of the first row
        write_film(self.out / "rollout.mp4", film, fps, sound, self.sample_rate)
        return meter.compute()

    def report(
        self, metrics: dict[str, float], drifts: bool, decoders: dict[str, dict[str, float]], scripts: str | None
    ) -> str:
        """Return the text of report.md."""
        settings = self.settings
        truth = (
            "the dataset's own pictures; errors of the autoencoder count as errors of the world model"
            if self.episodes.truth == "rgb"
            else "the dataset's latents, decoded by the same autoencoder as the generated ones"
        )
        heard_truth = self.episodes.sound_truth
        sides = "" if heard_truth is None else ", with the true sound on the left and the generated on the right"
        sections = [
            f"# Rollouts of {settings.checkpoint}",
            f"On the {settings.split} split of {settings.data}, {self.episodes.fps:g} frames per second. Written "
            f"{time.strftime('%Y-%m-%d %H:%M')} by OWL {code_version()} on {device_name(self.engine.device)}, in "
            f"{settings.precision}{', compiled' if self.engine.wait_compiled() else ''}. Repeat with:",
            f"    {settings.command(self.out)}",
            "## Accuracy",
            f"{metrics['clips']:.0f} clips, {settings.context} frames of context, then {settings.horizon} generated "
            f"with the true controls. True frames are {truth}. The baseline repeats the last frame of the context.",
            horizon_table(metrics, self.lpips.name),
            "![PSNR and LPIPS against the horizon](horizon.png)",
            "![True frames above generated ones](strip.png)",
            f"Video, true beside generated: [comparison.mp4](comparison.mp4){sides}",
            *([section(decoders, self.lpips)] if decoders else []),
            *(["## Sound", sound_section(metrics, heard_truth)] if heard_truth is not None else []),
            "## Action following",
            following_table(metrics, settings.inverse_dynamics),
            *([] if scripts is None else [scripts]),
            "## Long rollouts",
            f"{settings.side_by_side} rollouts of {settings.frames} frames, with the controls of the split's episodes "
            "one after another: [rollout.mp4](rollout.mp4)",
            *(["![Drift](drift.png)"] if drifts else []),
            value_table(
                {
                    name: value
                    for name, value in metrics.items()
                    if name.startswith((FrechetDistance.name, "drift", "flicker"))
                }
            ),
            f"`{FrechetDistance.name}` is the Frechet distance of a segment to true frames of the split: compare "
            "segments of equal length only. `flicker` is the energy of fine detail that changes from frame to frame, "
            "generated minus true.",
            "## Speed",
            f"Batch 1, {settings.sampling.steps} steps per frame, in seconds, after a warm-up:",
            value_table({n: v for n, v in metrics.items() if n.startswith(("latency", "frames_per_second"))}),
        ]
        return "\n\n".join(sections) + "\n"
