"""Rollouts under scripted controls: whether and how soon controls are followed, and whether the world returns."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from owl.data.continued import RecordedGame
from owl.data.windows import WindowDataset
from owl.errors import OwlError
from owl.losses.lpips import LPIPS
from owl.models.inverse_dynamics import BEFORE
from owl.pixels import to_float
from owl.rollout.engine import Engine
from owl.rollout.episodes import Batch, Episodes, as_bytes
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from owl.rollout.scripts import Script


@dataclass(frozen=True)
class Scripted:
    """Rollouts of one script from several starts.

    Attributes:
        script: The script.
        onset: First frame in which a control is used.
        buttons: float[T, number of buttons], its controls.
        axes: float[T, number of axes].
        before: uint8[S, n, 3, h, w], the last true frames before the rollouts.
        generated: uint8[S, T, 3, h, w].
        true: The frames of the real game under the same controls, of the same shape; None if it cannot be replayed.
    """

    script: Script
    onset: int
    buttons: Tensor
    axes: Tensor
    before: Tensor
    generated: Tensor
    true: Tensor | None

    @property
    def sides(self) -> dict[str, Tensor]:
        """Return the frames by the suffix of their metrics: "" for generated ones, "_true" for those of the game."""
        return {"": self.generated} | ({} if self.true is None else {"_true": self.true})

    @property
    def moments(self) -> tuple[int, int, int]:
        """Return the frame before the first movement, the one half-way from there to the end, and the last one."""
        start, end = self.onset - 1, self.generated.shape[1] - 1
        return start, (start + end) // 2, end


def play_script(
    engine: Engine,
    episodes: Episodes,
    script: Script,
    windows: Batch,
    context: int,
    seed: int = 0,
    true: Tensor | None = None,
) -> Scripted:
    """Roll out a script from several starts.

    Streams that are given beside the controls are replaced by their mean.

    Args:
        engine: With a decoder for "video".
        episodes: Source of the windows.
        script: The script.
        windows: From `Episodes.windows`; each rollout starts after the first ``context`` frames of one.
        context: Number of given frames, at least 1.
        seed: Seed of all noise.
        true: From `GameTruth`.
    """
    network, rows = engine.network, len(windows["buttons"])
    buttons, axes = script.played(network.buttons, network.axes, episodes.fps)
    engine.wait_compiled(rows)
    episodes.start(engine, windows, context, seed)
    shown = [
        as_bytes(engine.step(held.expand(rows, -1), moved.expand(rows, -1)).decoded["video"])
        for held, moved in tqdm(list(zip(buttons, axes, strict=True)), script.name, unit="frame")
    ]
    known = {
        name: values[:, max(0, context - BEFORE) : context] for name, values in windows.items() if name != "window"
    }
    return Scripted(
        script, script.onset(episodes.fps), buttons, axes, episodes.pictures(known), torch.stack(shown, 1), true
    )


@dataclass(frozen=True)
class GameTruth:
    """What the real game shows when a script is played from starts in recorded episodes.

    Attributes:
        recorded: The game.
        dataset: The dataset.
        windows: Windows of the dataset; a script is played after the first ``context`` frames of each.
        context: Number of these frames.
    """

    recorded: RecordedGame
    dataset: WindowDataset
    windows: Batch
    context: int

    def frames(self, script: Script) -> Tensor:
        """Return uint8[S, T, 3, h, w].

        Raises:
            OwlError: The game cannot be replayed, or is another one than was recorded.
        """
        stride, info = self.dataset.stride, self.dataset.info
        names = info.modalities["controls"]
        held, moved = script.played(names["buttons"], names["axes"], info.fps / stride)
        controls = torch.cat([held, moved / stride], 1).repeat_interleave(stride, 0).double().numpy()
        return torch.stack([self._play(row, controls) for row in range(len(self.windows["window"]))])

    def _play(self, row: int, controls: np.ndarray) -> Tensor:
        dataset = self.dataset
        place = dataset.describe(int(self.windows["window"][row]))
        last = place["frames"][0] + (self.context - 1) * dataset.stride
        pictures, turned = [], np.zeros(self.windows["axes"].shape[-1])
        for position, frame in enumerate(self.recorded.play(place["episode"], last, controls)):
            if last - dataset.stride < position <= last:
                turned += frame.axes
            elif position > last and (position - last) % dataset.stride == 0:
                pictures.append(frame.rgb)
        expected = self.windows["axes"][row, self.context - 1].tolist()
        if self.context > 1 and not np.allclose(turned, expected, atol=1e-3):
            raise OwlError(
                "game.replay",
                f"{place['episode']} has other controls when it is played again ({turned.tolist()}) than in "
                f"{dataset.path} ({expected}); give a dataset that was recorded with this version of OWL",
            )
        return torch.from_numpy(np.stack(pictures)).movedim(-1, 1)


def control_metrics(scripted: Scripted, reader: InverseDynamicsReader) -> dict[str, float]:
    """Measure how the controls of a script are followed, as an inverse dynamics model reads them from the frames.

    An axis that never moves by the reader's dead zone in a frame has ``_moved`` only: such a movement is read as none.

    Returns:
        For each control of the script, with the prefix ``script_<script>_<control>`` and for the game's frames with the
        suffix ``_true``: ``_accuracy``, the mean of the shares of frames that are read correctly while the control
        is used and while it is not; ``_latency``, the mean number of frames from its first use to its first reading (0:
        the frame that it leads to), if it was read in any rollout; ``_missed``, the share of rollouts in which it was
        not read at all; and for an axis ``_moved``, the mean total movement read.
    """
    script, values = scripted.script, {}
    for suffix, frames in scripted.sides.items():
        video, skip = torch.cat([scripted.before, frames], 1), scripted.before.shape[1]
        read = [reader.read(clip, skip) for clip in video]
        buttons, axes = (torch.stack(part) for part in zip(*read, strict=True))
        network = reader.network
        for name in script.controls:
            if name in network.buttons:
                column = network.buttons.index(name)
                given, found = scripted.buttons[:, column], buttons[..., column]
            else:
                column = network.axes.index(name)
                given, found = (reader.direction(side[..., column]) for side in (scripted.axes, axes))
                values[f"script_{script.name}_{name}_moved{suffix}"] = float(axes[..., column].sum(1).mean())
                if not given.any():
                    continue
            values |= {
                f"script_{script.name}_{name}_{metric}{suffix}": value
                for metric, value in followed(given, found).items()
            }
    return values


def followed(given: Tensor, read: Tensor) -> dict[str, float]:
    """Compare a control with its reading.

    Args:
        given: float[T], 0 where the control is not used; it is used in some frame.
        read: float[S, T], the same values.

    Returns:
        ``accuracy``, ``latency`` and ``missed``, see `control_metrics`.
    """
    used, right = given != 0, read == given
    values = {"accuracy": float((right[:, used].double().mean() + right[:, ~used].double().mean()) / 2)}
    hits, frames = right[:, used], used.nonzero()[:, 0]
    noticed = hits.any(1)
    if noticed.any():
        first = frames[hits[noticed].int().argmax(1)]
        values["latency"] = float((first - frames[0]).double().mean())
    return values | {"missed": 1 - float(noticed.double().mean())}


def revisit_metrics(scripted: Scripted, lpips: LPIPS) -> dict[str, float]:
    """Measure whether the world returns at the end of a script that does.

    Returns:
        With the prefix ``revisit_<script>``: ``_frames``, the length of the loop; ``_lpips`` of the last frame and the
        one before the first movement, and ``_away_lpips`` of the frame half-way and that one, which is small if the
        world does not move at all, each also of the game's frames with the suffix ``_true``; and ``_game_lpips`` of the
        last frame and the game's last frame, if it is known.
    """

    def distance(one: Tensor, other: Tensor) -> float:
        device = lpips.shift.device
        return float(lpips(to_float(one.to(device)), to_float(other.to(device))).mean())

    prefix, (start, middle, end) = f"revisit_{scripted.script.name}", scripted.moments
    values: dict[str, float] = {f"{prefix}_frames": end - start}
    for suffix, frames in scripted.sides.items():
        values[f"{prefix}_lpips{suffix}"] = distance(frames[:, end], frames[:, start])
        values[f"{prefix}_away_lpips{suffix}"] = distance(frames[:, middle], frames[:, start])
    if scripted.true is not None:
        values[f"{prefix}_game_lpips"] = distance(scripted.generated[:, end], scripted.true[:, end])
    return values
