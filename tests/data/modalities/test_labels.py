"""Labels keep their numbers and names."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from owl.data.modalities.labels import Labels
from owl.data.overview import DatasetReader, draw_contact_sheet, summarize_modalities
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardIndex, ShardWriter
from owl.data.verification import verify_members
from owl.data.windows import WindowDataset

SIZE = (24, 40)
NAMES = {0: "Floor", 1: "Wall", 700: "Imp", 9: "Imp", 3: "Medikit"}
VOCABULARY = ["Floor", "Imp", "Medikit", "Wall"]


def draw(frame: int) -> np.ndarray:
    objects = np.zeros(SIZE, np.uint16)
    objects[:7], objects[11:20, 4 * frame + 1 : 4 * frame + 8] = 1, 700
    objects[12:16, 30:36] = 9 if frame % 2 else 3
    return objects


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    description = {"extension": Labels.extension, "names": VOCABULARY}
    DatasetInfo(35.0, SIZE, {"labels": description}, {"train": ["a"]}, {}, "test").save(tmp_path)
    with ShardWriter(tmp_path, 0) as writer:
        for frame in range(6):
            writer.write("a", frame, {Labels.extension: Labels.encode((draw(frame), NAMES))})
    write_index(tmp_path)
    return tmp_path


def test_numbers_and_names_come_back() -> None:
    objects, names = Labels.read(Labels.encode((draw(2), NAMES)))
    np.testing.assert_array_equal(objects, draw(2))
    assert names == {0: "Floor", 1: "Wall", 700: "Imp", 3: "Medikit"}  # of those that are there
    assert Labels.encode((draw(2), NAMES)) == Labels.encode((draw(2), NAMES))
    with pytest.raises(ValueError, match=r"\[700\] have no name"):
        Labels.encode((draw(2), {0: "", 1: "", 3: ""}))


def test_windows_have_numbers_and_classes(labelled: Path) -> None:
    sample = WindowDataset(labelled, modalities=("labels",), length=2, stride=2)[1]
    for number, frame in enumerate((1, 3)):
        np.testing.assert_array_equal(sample["labels"][number], draw(frame))
        classes = np.vectorize({0: 0, 1: 3, 700: 1, 9: 1, 3: 2}.get)(draw(frame))
        np.testing.assert_array_equal(sample["classes"][number], classes)
    assert sample["labels"].dtype == sample["classes"].dtype == torch.int32


def test_labels_are_cropped_mirrored_and_never_mixed(labelled: Path) -> None:
    plain = WindowDataset(labelled, modalities=("labels",))[1]
    mirrored = WindowDataset(labelled, modalities=("labels",), flip=1.0)[1, 0]
    cropped = WindowDataset(labelled, modalities=("labels",), crop=(16, 20))[1]
    small = WindowDataset(labelled, modalities=("labels",), size=(12, 20))[1]
    for name in ("labels", "classes"):
        assert torch.equal(mirrored[name], plain[name].flip(-1))
        assert torch.equal(cropped[name], plain[name][:, 4:20, 10:30])
        assert torch.equal(small[name], plain[name][:, 1::2, 1::2])
    assert small["labels"].unique().tolist() == [0, 1, 9, 700]


@pytest.mark.parametrize("damage", ["cut", "grey", "nameless", "other", "foreign"])
def test_what_is_no_label_picture_is_damaged(labelled: Path, damage: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(draw(0)).save(buffer, "PNG")
    content = {
        "cut": Labels.encode((draw(0), NAMES))[:-60],
        "grey": b"GIF89a",
        "nameless": buffer.getvalue(),
        "other": Labels.encode((draw(0)[:4], NAMES)),
        "foreign": Labels.encode((draw(0), NAMES | {1: "Door"})),
    }[damage]
    with ShardWriter(labelled, 0) as writer:
        writer.write("a", 0, {Labels.extension: content})
    write_index(labelled)
    (problems,) = verify_members(DatasetReader(str(labelled)))
    assert len(problems) == 1


def test_an_overview_shows_each_name_in_its_colour(labelled: Path) -> None:
    reader = DatasetReader(str(labelled))
    assert summarize_modalities(reader)["labels"].description == "4 names"
    assert len(np.unique(np.asarray(draw_contact_sheet(reader)).reshape(-1, 3), axis=0)) > 8
    assert ShardIndex.load(labelled).extensions.tolist() == ["labels.png"]
