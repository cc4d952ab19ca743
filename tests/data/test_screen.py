"""What is read off the game's screen."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from owl.data import game, screen
from owl.data.modalities.labels import Labels


def test_the_camera_follows_the_crop_and_the_size() -> None:
    variables = (1, 2, 41, 30, 10, 90)
    whole = screen.camera(variables, (200, 320), (200, 320))
    shear = 160 * math.tan(math.radians(10))
    assert whole.tolist() == pytest.approx([1, 2, 41, 30, 10, 400 / 3, 160, 160, 100 - shear], rel=1e-6)
    halved = screen.camera(variables, (200, 320), (96, 160))  # of the 192 rows in the middle
    assert halved[5:].tolist() == pytest.approx([200 / 3, 80, 80, (100 - shear - 4) / 2], rel=1e-6)
    square = screen.camera(variables, (240, 320), (60, 60))
    assert square[5:].tolist() == pytest.approx([40, 48, 30, 30 - 48 * math.tan(math.radians(10))], rel=1e-6)


def test_labels_have_the_objects_own_numbers_and_names() -> None:
    buffer = np.array([[0, 1, 90, 90], [255, 255, 7, 1]], np.uint8)
    labels = [(90, 3, "DoomImp"), (7, 12, "Medikit"), (255, 5, "DoomPlayer"), (8, 4, "Hidden")]
    state = SimpleNamespace(
        labels_buffer=buffer,
        labels=[SimpleNamespace(value=v, object_id=number, object_name=name) for v, number, name in labels],
    )
    objects, names = screen.read_labels(state, (2, 4))
    assert objects.dtype == np.uint16
    assert objects.tolist() == [[0, 1, 5, 5], [7, 7, 14, 1]]
    assert names == {0: "FloorCeilingSky", 1: "Wall", 5: "DoomImp", 14: "Medikit", 7: "Self", 6: "Hidden"}


def test_an_object_keeps_its_number_throughout_an_episode() -> None:
    names: dict[int, str] = {}
    kits: dict[int, int] = {}
    for frame in game.play("health_gathering", 40, (48, 80), seed=1, buffers=Labels.buffers):
        objects, found = Labels.record(frame, frame)
        assert objects.shape == (48, 80)
        for number in np.unique(objects).tolist():
            assert names.setdefault(number, found[number]) == found[number]
            kits[number] = kits.get(number, 0) + (found[number] not in ("Wall", "FloorCeilingSky", "Self"))
    assert max(kits.values()) > 10
    assert {"Wall", "FloorCeilingSky"} <= set(names.values())
