"""Pictures are drawn of the validations that were asked for, as PNG and in TensorBoard."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from owl.callbacks.media import Media
from tests.helpers.line import Line, loader, trainer


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [1, 3]), (0, [])])
def test_pictures_of_every_nth_validation(tmp_path: Path, every: int, steps: list[int]) -> None:
    options = {"max_steps": 4, "val_check_interval": 1, "num_sanity_val_steps": 1}
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(tmp_path, [Media(every)], logger=logger, **options).fit(Line(), loader(4), loader(2))
    files = sorted((tmp_path / "media").rglob("*.png"))
    assert [str(file.relative_to(tmp_path / "media")) for file in files] == [f"step-{s:07d}/red.png" for s in steps]
    for file in files:
        assert np.array_equal(cv2.imread(str(file))[..., ::-1], Line().media({})["red"])  # red, not blue
    events = EventAccumulator(str(tmp_path), {"images": 0})
    events.Reload()
    assert [image.step for tag in events.Tags()["images"] for image in events.Images(tag)] == steps
    if steps:
        assert events.Tags()["images"] == ["red"]


def test_a_resumed_run_keeps_to_the_same_validations(tmp_path: Path) -> None:
    first = Media(2)
    trainer(tmp_path, [first], max_steps=1, val_check_interval=1).fit(Line(), loader(4), loader(1))
    second = Media(2)
    second.load_state_dict(first.state_dict())
    trainer(tmp_path / "resumed", [second], max_steps=2, val_check_interval=1).fit(Line(), loader(4), loader(1))
    assert [path.name for path in (tmp_path / "resumed" / "media").iterdir()] == ["step-0000002"]


def test_a_recipe_without_pictures_is_left_alone(tmp_path: Path) -> None:
    class Plain(Line):
        media = property(doc="absent")

        def __getattribute__(self, name: str):
            if name == "media":
                raise AttributeError(name)
            return super().__getattribute__(name)

    trainer(tmp_path, [Media()], max_steps=1).fit(Plain(), loader(1), loader(1))
    assert not (tmp_path / "media").exists()
