"""Pictures, clips and sounds are made of the validations that were asked for, as files and in TensorBoard."""

import wave
from io import BytesIO
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
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


def test_a_clip_becomes_a_film_and_moves_in_tensorboard(tmp_path: Path) -> None:
    clip = np.empty((3, 16, 32, 3), np.uint8)
    clip[:] = np.array([40, 200, 120])[:, None, None, None]  # flat and grey, since H.264 loses detail

    class Moving(Line):
        def media(self, batch: dict) -> dict[str, np.ndarray]:
            return {"clip": clip}

    class Data(LightningDataModule):
        fps = 5.0

        def train_dataloader(self):
            return loader(1)

        def val_dataloader(self):
            return loader(1)

    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(tmp_path, [Media()], logger=logger, max_steps=1).fit(Moving(), datamodule=Data())
    with av.open(tmp_path / "media" / "step-0000001" / "clip.mp4") as film:
        assert film.streams.video[0].average_rate == 5
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])
    assert frames.shape == clip.shape
    assert np.abs(frames.astype(int) - clip).max() < 8
    events = EventAccumulator(str(tmp_path), {"images": 0})
    events.Reload()
    (event,) = events.Images("clip")
    assert (event.step, event.height, event.width) == (1, 16, 32)
    with Image.open(BytesIO(event.encoded_image_string)) as animated:
        assert animated.n_frames == 3
        for number in range(3):
            animated.seek(number)
            assert animated.info["duration"] == 200
            assert np.array_equal(animated.convert("RGB"), clip[number])


def test_a_sound_becomes_a_file_and_is_heard_in_tensorboard(tmp_path: Path) -> None:
    sound = np.array([[0.0, 0.5, -1.0, 2.0], [0.25, 0.0, 0.0, 1.0]], np.float32)

    class Loud(Line):
        sample_rate = 8000

        def media(self, batch: dict) -> dict[str, np.ndarray]:
            return {"sound": sound}

    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(tmp_path, [Media()], logger=logger, max_steps=1).fit(Loud(), loader(1), loader(1))
    path = tmp_path / "media" / "step-0000001" / "sound.wav"
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (8000, 2, 2)
        samples = np.frombuffer(file.readframes(9), "<i2").reshape(-1, 2).T
    np.testing.assert_allclose(samples / 32767, sound.clip(-1, 1), atol=1e-4)
    events = EventAccumulator(str(tmp_path), {"audio": 0})
    events.Reload()
    (heard,) = events.Audio("sound")
    assert (heard.step, heard.sample_rate, heard.encoded_audio_string) == (1, 8000, path.read_bytes())
