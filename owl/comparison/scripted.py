"""Scripted controls in the evaluation of a world model: metrics, a film, a picture and a section of the report."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from owl.atomic import atomic_write
from owl.data.continued import RecordedGame
from owl.errors import OwlError
from owl.losses.lpips import LPIPS
from owl.rollout.engine import Engine
from owl.rollout.episodes import Episodes
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from owl.rollout.scripted import GameTruth, control_metrics, play_script, revisit_metrics
from owl.rollout.scripts import Script
from owl.viz import scripts as pictures
from owl.viz.film import write_film
from owl.viz.numbers import format_number


class ScriptedEvaluation:
    """Scripts, and what the real game shows when they are played from the starts.

    Args:
        scripts: The scripts.
        episodes: Source of the starts, of any of the world models.
        starts: Number of starts, evenly spaced over the split.
        context: Number of given frames.
        game: Whether the real game is played too, if the dataset is a recording of it.

    Attributes:
        true: uint8[S, T, 3, h, w], the game's frames by script; empty if it is not played.
        reason: Why the game is not played; empty if it is.
    """

    def __init__(self, scripts: Sequence[Script], episodes: Episodes, starts: int, context: int, game: bool) -> None:
        self.scripts, self.context = list(scripts), context
        self.starts = min(starts, len(episodes.dataset))
        self.true: dict[str, Tensor] = {}
        self.reason = "" if game else "it was not requested"
        if not game:
            return
        try:
            recorded = RecordedGame.find(episodes.dataset.path)
            truth = GameTruth(recorded, episodes.dataset, episodes.windows(starts), context)
            progress = tqdm(self.scripts, "real game", unit="script")
            self.true = {script.name: truth.frames(script) for script in progress}
        except OwlError as error:
            self.reason = str(error)

    def run(
        self,
        engine: Engine,
        episodes: Episodes,
        reader: InverseDynamicsReader | None,
        lpips: LPIPS,
        seed: int,
        out: Path,
    ) -> dict[str, float]:
        """Play all scripts, write scripts.mp4 and, if there are loops, revisit.png; return the metrics.

        Args:
            engine: Engine of a world model, with a decoder for "video".
            episodes: Source of its starts.
            reader: Inverse dynamics model, or None.
            lpips: The perceptual distance.
            seed: Seed of all noise.
            out: Folder.
        """
        metrics: dict[str, float] = {}
        network, films, loops = engine.network, [], []
        windows = episodes.windows(self.starts)
        for script in self.scripts:
            true = self.true.get(script.name)
            played = play_script(engine, episodes, script, windows, self.context, seed, true)
            if script.returns:
                metrics |= revisit_metrics(played, lpips)
                loops.append(pictures.loop_row(played))
            elif reader is not None:
                metrics |= control_metrics(played, reader)
            films.append(pictures.first_row(played))
        for suffix in ("", "_true"):
            read = [v for n, v in metrics.items() if n.startswith("script_") and n.endswith(f"_accuracy{suffix}")]
            seen = [metrics.get(f"revisit_{script.name}_lpips{suffix}") for script in self.scripts]
            for mean, found in (("scripts_accuracy", read), ("revisit_lpips", [v for v in seen if v is not None])):
                if found:
                    metrics[f"{mean}{suffix}"] = float(np.mean(found))
        frames = (picture for film in films for picture in pictures.film(film, network.buttons, network.axes))
        if films:
            write_film(out / "scripts.mp4", frames, episodes.fps)
        if loops:
            atomic_write(out / "revisit.png", pictures.loops(loops))
        return metrics

    def section(self, metrics: dict[str, float], reader: str | None) -> str:
        """Return the sections of a Markdown report."""
        if not self.scripts:
            return (
                "## Scripted controls\n\nNo script fits the controls of this world model; give some with `--scripts`."
            )
        game = (
            f"Without the real game: {self.reason}."
            if self.reason
            else "The real game was played with the same controls from the same starts."
        )
        lines = [
            "## Scripted controls",
            f"{len(self.scripts)} scripts, each played from {self.starts} starts: [scripts.mp4](scripts.mp4) "
            f"(the first start). {game}",
            self._controls_table(metrics) if reader else "Give `--inverse_dynamics` to read the controls back.",
        ]
        if any(script.returns for script in self.scripts):
            lines += ["## Revisit", self._revisit_table(metrics), "![Start, half-way and end of loops](revisit.png)"]
        return "\n\n".join(lines)

    def _controls_table(self, metrics: dict[str, float]) -> str:
        rows = [
            "Accuracy is the mean of the shares of frames that are read correctly while the control is used and while "
            "it is not (0.5: chance for a button); latency is the mean number of frames from its first use to its "
            "first reading; missed is the share of rollouts in which it was not read at all. An axis slower than the "
            "reader's dead zone is not compared.",
            "",
            "| script | control | accuracy | game | latency | game | missed | game | moved | game |",
            "| --- | --- |" + " ---: |" * 8,
        ]
        for script in self.scripts:
            for control in () if script.returns else script.controls:
                prefix = f"script_{script.name}_{control}"
                names = [f"{prefix}_{m}{s}" for m in ("accuracy", "latency", "missed", "moved") for s in ("", "_true")]
                rows.append(f"| {script.name} | {control} | {_cells(metrics, names)} |")
        return "\n".join(rows)

    def _revisit_table(self, metrics: dict[str, float]) -> str:
        rows = [
            "LPIPS of the frame before the first movement and the last one, which show the same place; half-way, where "
            "it must be larger, or the world does not move; and of the last frame and the game's last frame.",
            "",
            "| loop | frames | return | game | half-way | game | return against the game's |",
            "| --- |" + " ---: |" * 6,
        ]
        for script in self.scripts:
            if script.returns:
                parts = ("frames", "lpips", "lpips_true", "away_lpips", "away_lpips_true", "game_lpips")
                names = [f"revisit_{script.name}_{part}" for part in parts]
                rows.append(f"| {script.name} | {_cells(metrics, names)} |")
        return "\n".join(rows)


def _cells(metrics: dict[str, float], names: list[str]) -> str:
    return " | ".join(format_number(metrics[name]) if name in metrics else "" for name in names)
