"""The tutorial docs/tutorial/your-own-world.md, from real footage to a world that plays, with tiny budgets."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from owl.data.game import AXES, BUTTONS
from owl.data.windows import WindowDataset
from owl.play.game import GameWorld
from owl.play.learned import load_world
from owl.play.log import Action, ActionLog
from owl.play.world import Settings
from owl.viz.film import write_film
from tests.helpers.tiny import REPOSITORY, owl_here
from tests.helpers.videos import make_recording
from tests.test_docs import blocks, lines

FIT = [
    *("--trainer.max_steps", "1", "--trainer.max_time", "null", "--trainer.enable_progress_bar", "false"),
    *("--data.init_args.batch_size", "2", "--data.init_args.num_workers", "0"),
    *("--data.init_args.validation_windows", "2", "--trainer.limit_val_batches", "0"),
]
SHORTER = {
    "fit": FIT,
    "fit world": [*FIT, "--model.init_args.compile", "false"],
    "record": ["--frames", "90", "--workers", "1"],
    "rollout": [
        "--frames",
        "2",
        "--clips",
        "1",
        "--horizon",
        "2",
        "--side_by_side",
        "1",
        "--steps",
        "1",
        "--starts",
        "0",
    ],
    "export": ["--frames", "10", "--scenes", "1"],
}


def play_a_little(path: Path) -> None:
    """Write the log of a person's play of the real game, as the page does."""
    world = GameWorld("deathmatch", (96, 160), sound=False)
    random = np.random.default_rng(0)
    world.reset(0, 0)
    actions = []
    for _ in range(119):
        held, moved = random.random(len(BUTTONS)) < 0.3, random.normal(0, 3, len(AXES)).astype(np.float32)
        world.step(held, moved)
        actions.append(Action(held, moved, Settings(), ""))
    ActionLog(world.description.origin, list(BUTTONS), list(AXES), 0, 0, actions).save(path)
    world.close()


def film(dataset: Path, folder: Path) -> None:
    """Write the pictures of a dataset as videos without controls."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        windows = WindowDataset(dataset, split, ["rgb"], length=10, hop=10)
        pictures = np.concatenate([windows[n]["rgb"].movedim(1, -1).numpy() for n in range(len(windows))])
        write_film(folder / f"{split}.mp4", np.concatenate([pictures, pictures]), 35)


@pytest.mark.usefixtures("recorded_here")
def test_every_command_leads_to_a_world_that_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("experiments", "configs"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    for number in range(3):
        make_recording(tmp_path / f"recordings/{number}", [(0.5, "KEYBOARD", [87, True]), (1.0, "MOUSE_MOVE", [3, 0])])
    done = []
    for block in blocks(REPOSITORY / "docs/tutorial/your-own-world.md"):
        if block.title:
            Path(block.title).write_text(block.content)
        for command in lines(block.content) if block.language == "bash" else ():
            words = shlex.split(command)[3:]
            name = words[1] if words[0] == "data" else words[0]
            if name == "play":  # that it plays is seen below; the page itself has tests in tests/play
                (tmp_path / "played").mkdir(exist_ok=True)
            elif "--actions" in words:
                play_a_little(tmp_path / words[words.index("--actions") + 1])
                assert owl_here(*words, cwd=tmp_path) == 0, command
            else:
                if words[:3] == ["data", "import", "footage"]:
                    film(tmp_path / "data/played", tmp_path / "footage")
                shorter = SHORTER.get("fit world" if words[-1] == "world" else name, [])
                assert owl_here(*words, *shorter, cwd=tmp_path) == 0, command
            done.append(name)
    assert done.count("fit") == 3
    assert done[-2:] == ["export", "play"]
    assert json.loads((tmp_path / "data/labelled/dataset.json").read_text())["modalities"]["controls"]["labelled_by"]
    world = load_world("exports/mine", steps=1)
    assert world.description.buttons == list(BUTTONS)
    assert world.description.fps == 17.5
    first = world.reset(0, 0).rgb
    assert first.shape == (96, 160, 3)
    assert (world.step(np.ones(len(BUTTONS), bool), np.ones(len(AXES), np.float32)).rgb != first).any()
