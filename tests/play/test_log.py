"""Action logs contain exactly what was done, and damaged ones are reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owl.play.log import Action, ActionLog
from owl.play.replay import make_world
from owl.play.world import Settings
from tests.helpers.errors import refused

ACTIONS = st.tuples(
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2),
    st.sampled_from([Settings(), Settings(steps=2, guidance=1.5, decoder="b")]),
)


@given(st.lists(ACTIONS, max_size=8))
def test_logs_survive_the_file_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, actions: list) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    made = [Action(np.array(b, bool), np.array(a, np.float32), s, "0123456789ab") for b, a, s in actions]
    ActionLog({"kind": "game"}, ["A", "B", "C"], ["x", "y"], 3, 2**32 - 1, made, b"\x89PNG").save(path)
    found = ActionLog.load(path)
    assert found.begin == b"\x89PNG"
    assert (found.origin, found.buttons, found.axes) == ({"kind": "game"}, ["A", "B", "C"], ["x", "y"])
    assert (found.start, found.seed) == (3, 2**32 - 1)
    for old, new in zip(made, found.actions, strict=True):
        assert old.buttons.tolist() == new.buttons.tolist()
        assert old.axes.tobytes() == new.axes.tobytes()
        assert (old.settings, old.picture) == (new.settings, new.picture)


HEAD = {"format": "owl-actions", "version": 1, "origin": {}, "buttons": ["A"], "axes": [], "start": 0, "seed": 0}
LINE = {"held": ["A"], "moved": [], "picture": "0"}


@pytest.mark.parametrize(
    ("lines", "code", "token"),
    [
        ([], "actions.damaged", "line 1"),
        (["nothing"], "actions.damaged", "line 1"),
        ([{"seed": 1}], "actions.damaged", "line 1"),
        ([HEAD | {"version": 2}], "actions.version", "version 2"),
        ([HEAD | {"format": "another"}], "actions.version", "owl-actions version 1"),
        ([HEAD | {"more": 1}], "actions.damaged", "line 1"),
        ([HEAD | {"begin": "no base64"}], "actions.damaged", "line 1"),
        ([HEAD | {"begin": 5}], "actions.damaged", "line 1"),
        ([HEAD, LINE, LINE | {"held": ["Z"]}], "actions.damaged", "line 3"),
        ([HEAD, LINE | {"moved": [1]}], "actions.damaged", "line 2"),
        ([HEAD, LINE | {"settings": {"stepz": 1}}], "actions.damaged", "line 2"),
        ([HEAD, {"held": []}], "actions.damaged", "line 2"),
        ([HEAD, LINE | {"settings": {"steps": 0}}], "sampling.settings", "steps is 0"),
    ],
)
def test_what_is_no_log_is_reported(tmp_path: Path, lines: list, code: str, token: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    with refused(code, token):
        ActionLog.load(path)


@pytest.mark.parametrize(
    "origin", [None, {}, {"kind": "game"}, {"kind": "game", "scenario": "basic", "size": 5}, {"kind": "world models"}]
)
def test_a_log_without_the_origin_of_its_world_is_reported(origin: Any) -> None:
    with refused("actions.origin", "how its world was made"):
        make_world(ActionLog(origin, [], [], 0, 0))


def test_a_missing_log_is_reported(tmp_path: Path) -> None:
    with refused("actions.missing", "none.jsonl"):
        ActionLog.load(tmp_path / "none.jsonl")
