"""Pictures of scripted rollouts: the game beside the world model, and the three moments of a loop."""

import torch

from owl.rollout.scripted import Scripted
from owl.rollout.scripts import Move, Script
from owl.viz.film import CAPTION
from owl.viz.scripts import film, first_row, loop_row

LEVELS = torch.tensor([0, 50, 100, 150, 200], dtype=torch.uint8)  # of the frames; the loop starts at the second


def scripted(true: bool) -> Scripted:
    script = Script("around", (Move(2), Move(3, axes={"x": 360.0})), returns=True)
    buttons, axes = script.played(["jump"], ["x"], 1.0)
    generated = LEVELS.view(1, 5, 1, 1, 1).expand(2, 5, 3, 40, 320)
    return Scripted(script, 2, buttons, axes, generated[:, :1], generated, generated + 55 if true else None)


def test_a_film_shows_the_game_on_the_left_with_the_controls_below() -> None:
    frames = list(film(first_row(scripted(True)), ["jump"], ["x"]))
    assert len(frames) == 5
    for level, frame in zip(LEVELS.tolist(), frames, strict=True):
        row = frame[CAPTION + 20]
        assert (row[5] == level + 55).all()
        assert (row[-5] == level).all()
    below = [frame[CAPTION + 80 :] for frame in frames]
    assert (below[0] == below[1]).all()
    assert (below[1] != below[2]).any()  # the axis moves


def test_a_loop_is_drawn_at_its_start_half_way_and_at_its_end() -> None:
    alone, both = loop_row(scripted(False)), loop_row(scripted(True))
    width = alone.shape[1] // 3
    assert [int(alone[-10, width * k + 100, 0]) for k in range(3)] == [50, 100, 200]
    width = both.shape[1] // 6
    assert [int(both[-10, width * k + 100, 0]) for k in range(6)] == [105, 155, 255, 50, 100, 200]
