"""Meters: a world that follows its controls agrees, another one does not; drift is 1 for what is true."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from owl.metrics.frechet import EfficientNetLite0Features
from owl.models.inverse_dynamics import AFTER, BEFORE
from owl.play import meters
from owl.play.beside import SideBySide
from owl.play.meters import Drift, Reading, Shown, agreement, read
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from tests.helpers.play import Canvas, connected, playing, serving
from tests.helpers.rollouts import Painted
from tests.play.test_server import run


@pytest.fixture(autouse=True)
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure often."""
    monkeypatch.setattr(meters, "PERIOD", 0.1)
    monkeypatch.setattr(meters, "REST", 0.0)
    monkeypatch.setattr(meters, "NICENESS", 0)


def test_worlds_side_by_side_are_measured_for_subscribed_clients(tmp_path: Path) -> None:
    async def test() -> None:
        world = SideBySide([Canvas(follows=True), Canvas(follows=False)])
        async with serving(world, tmp_path) as served, playing(served) as player, connected(served) as viewer:
            assert player.state["meters"] == ["agreement", "drift"]
            await player.hold(False, True, moved=[0.0, 0.0])
            await player.command("resume")
            await player.until(lambda c: c.frames and c.frames[-1][0] >= 20)
            assert not served.session.meters._stretch.frames  # no viewer
            await viewer.command("meters", on=True)
            await viewer.until(lambda c: len(c.meters) >= 2)
            following, ignoring = viewer.meters[-1]
            assert (following["agreement"], following["controls"]) == (1.0, {"fire": 1.0})
            assert (ignoring["agreement"], ignoring["controls"]) == (0.0, {"fire": 0.0})
            assert following["drift"] > 0
            for command, fields in (("rewind", {"moment": player.state["moments"][0]["number"]}), ("reset", {})):
                before = served.session.meters._stretch
                await player.command(command, **fields)
                await player.until(lambda c, b=before: served.session.meters._stretch is not b)  # the frames jump
            await player.command("resume")
            await viewer.command("meters", on=False)
            await player.until(lambda c: not served.session.meters._watched)
            await player.command("reset", start=1)
            await player.until(lambda c: c.state["start"] == 1 and c.frames[-1][0] >= 5)
            assert not player.meters
            assert not served.session.meters._stretch.frames
            await viewer.command("meters", on=True)  # a viewer who leaves looks no longer
            await viewer.until(lambda c: len(c.meters) >= 4)
            await viewer.socket.close()
            await player.until(lambda c: c.state["viewers"] == 1)
            assert not served.session.meters._watched

    run(test)


def test_each_frame_is_compared_with_the_controls_that_led_to_it() -> None:
    shown = []
    for fire in np.random.default_rng(0).random(12) < 0.5:
        rgb = np.zeros((4, 4, 3), np.uint8)
        rgb[0, 0, 0] = 255 * fire
        shown.append(Shown(rgb, np.array([False, fire]), np.zeros(2, np.float32)))
    clip = torch.from_numpy(np.stack([frame.rgb for frame in shown])).movedim(-1, 1)
    readings = read(InverseDynamicsReader(Painted(), 1.0), clip, shown)  # type: ignore[arg-type]
    assert len(readings) == len(shown) - BEFORE - AFTER
    assert all(torch.equal(each.buttons, each.read_buttons) for each in readings)


def reading(buttons: list[list[int]], axes: list[list[float]]) -> tuple[Tensor, Tensor]:
    return torch.tensor(buttons).bool(), torch.tensor(axes)


def test_agreement_by_hand() -> None:
    given = reading([[0, 1], [0, 1], [0, 0], [0, 0]], [[0, 3], [0, 0.5], [0, -2], [0, -2]])
    seen = reading([[0, 1], [0, 0], [0, 0], [0, 0]], [[0.5, 2], [0, 0], [0, 2], [0, 0]])
    reader = InverseDynamicsReader(Painted(), 1.0)  # type: ignore[arg-type]
    assert agreement(reader, Reading(*given, *seen)) == {"y": 0.5, "fire": 0.75}  # of pressed frames 1/2, of others 1
    held = (torch.ones_like(given[0]), given[1])
    assert agreement(reader, Reading(*held, *seen)) == {"y": 0.5, "jump": 0.0, "fire": 0.25}
    idle = reading([[0, 0]] * 4, [[0, 0]] * 4)
    assert agreement(reader, Reading(*idle, *idle)) == {}


def test_drift_is_the_distance_to_the_data_in_units_of_its_own() -> None:
    frames, episodes = Canvas(follows=True).true_frames()
    features = EfficientNetLite0Features()
    drift = Drift(features, frames, episodes)
    assert drift.of(frames) == pytest.approx([0.0] * len(frames), abs=1e-3)
    between = torch.cdist(*(features(part / 255) for part in (frames[:2], frames[2:])))
    assert drift.typical == pytest.approx(float(torch.cat([between.amin(0), between.amin(1)]).mean()), rel=1e-3)
    fresh = torch.from_numpy(np.random.default_rng(9).integers(0, 255, (1, 3, 16, 24), np.uint8))
    flat = fresh.float().mean((2, 3), keepdim=True).byte().expand_as(fresh)
    near, far = drift.of(torch.cat([fresh, flat]))
    assert 0.5 < near < 1.5 < far
    assert not np.isfinite(Drift(features, frames, torch.zeros(4)).typical)
