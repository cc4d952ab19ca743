"""Scripts of controls: as long and as far at any frame rate, and refused where they make no sense."""

from pathlib import Path

import pytest

from owl.data import game
from owl.rollout.scripts import load_scripts
from tests.helpers.errors import refused
from tests.helpers.tiny import REPOSITORY
from tests.test_docs import blocks


@pytest.mark.parametrize("fps", [10.0, 17.5, 35.0, 60.0])
def test_shipped_scripts_do_the_same_at_any_frame_rate(fps: float) -> None:
    scripts = {script.name: script for script in load_scripts(None, game.BUTTONS, game.AXES)}
    assert len(scripts) == 12
    for script in scripts.values():
        buttons, axes = script.played(game.BUTTONS, game.AXES, fps)
        assert len(buttons) / fps == pytest.approx(
            sum(move.seconds for move in script.moves), abs=len(script.moves) / fps
        )
        used = buttons.any(1) | axes.any(1)
        assert script.onset(fps) == used.int().argmax() == round(0.5 * fps)
    turned = scripts["turn_right_90"].played(game.BUTTONS, game.AXES, fps)[1]
    assert turned.sum() == pytest.approx(90)
    assert turned.max() * fps / game.FPS < 7  # degrees a tic, as in recorded footage
    assert scripts["turn_360_in_4s"].played(game.BUTTONS, game.AXES, fps)[1].sum() == pytest.approx(360)
    buttons = scripts["out_and_back_2s"].played(game.BUTTONS, game.AXES, fps)[0]
    out, back = (buttons[:, game.BUTTONS.index(name)].sum() for name in ("MOVE_FORWARD", "MOVE_BACKWARD"))
    assert out == back


def test_scripts_with_other_controls_are_left_out_of_the_shipped_ones() -> None:
    names = [script.name for script in load_scripts(None, ["ATTACK"], ["mouse_x", "mouse_y"])]
    assert names == ["turn_right_90", "turn_left_90", "shoot", "turn_360_in_2s", "turn_360_in_4s"]
    assert load_scripts(None, ["W"], []) == []


def test_the_file_of_the_how_to_page_describes_scripts(tmp_path: Path) -> None:
    (page,) = (b.content for b in blocks(REPOSITORY / "docs/how-to/rollout.md") if "moves:" in b.content)
    (tmp_path / "scripts.yaml").write_text(page)
    turn, walk = load_scripts(str(tmp_path / "scripts.yaml"), ["W", "S"], ["mouse_x"])
    assert turn.played(["W", "S"], ["mouse_x"], 30)[1].sum() == pytest.approx(300)
    assert walk.returns
    assert walk.controls == ["W", "S"]


@pytest.mark.parametrize(
    ("content", "token"),
    [
        ("[]", "list"),
        ("{}", "it has none"),
        ("walk: {moves: [{seconds: 1}, {seconds: 1, buttons: W}]}", "the buttons of walk are W, not a list"),
        ("walk: {moves: [{seconds: 1, buttons: [W]}]}", "walk does not start idle"),
        ("walk: {moves: [{seconds: 1}]}", "walk does not start idle, or does nothing"),
        ("walk: {moves: [{seconds: 1}, {seconds: -1, buttons: [W]}]}", "a move of walk has no positive duration"),
        ("walk: {moves: [{seconds: 1}, {second: 1, buttons: [W]}]}", "walk has second"),
        ("walk: {moves: [{seconds: 1}, {buttons: [W]}]}", "seconds"),
        ("walk: {moves: [{seconds: 1}, {seconds: 1, buttons: [W]}, {seconds: 1, button: [W]}]}", "walk has button"),
        ("turn: {moves: [{seconds: 1}, {seconds: 1, axes: {x: 0}}]}", "turn has an axis that does not move"),
        ("turn: {moves: [{seconds: 1}, {seconds: 1, axes: {x: .nan}}]}", "turn has an axis that does not move"),
        ("walk: {loops: true, moves: []}", "walk has loops"),
        ("walk: {", "walk"),
        ("walk: {moves: [{seconds: 1}, {seconds: 1, buttons: [JUMP]}]}", "uses JUMP, the world model has W"),
    ],
)
def test_what_makes_no_sense_is_reported(content: str, token: str, tmp_path: Path) -> None:
    path = tmp_path / "scripts.yaml"
    path.write_text(content)
    with refused("rollout.scripts", str(path), token):
        load_scripts(str(path), ["W"], [])
    with refused("rollout.scripts", "nothing.yaml"):
        load_scripts("nothing.yaml", ["W"], [])
