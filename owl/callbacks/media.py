"""Write pictures, clips and sounds of the model's output to TensorBoard and the run folder."""

import wave
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from owl.atomic import atomic_write
from owl.errors import at_least
from owl.viz.film import write_film

CLIP_FPS = 15.0
"""Frames per second of clips if the data module does not say, as `ShardDataModule.fps` does."""


class Media(Callback):
    """Draw pictures of the first validation batch.

    A recipe implements ``media(batch)``, which returns pictures uint8[H, W, 3], clips uint8[T, H, W, 3] and sounds
    float32[C, samples] in [-1, 1] by name; one with sounds has the attribute ``sample_rate``. They go to TensorBoard,
    where clips are animated and sounds can be played, and to ``<run folder>/media/step-<step>/``: pictures as
    ``<name>.png``, clips as ``<name>.mp4``, sounds as ``<name>.wav``. ``predict`` writes one set for every batch to
    ``<run folder>/predictions/``. All ranks draw, rank 0 writes.

    Args:
        every_n_validations: Draw at every n-th validation; 0 disables pictures.

    Raises:
        OwlError: ``every_n_validations`` is below 0.
    """

    def __init__(self, every_n_validations: int = 1) -> None:
        at_least(0, **{"media.every_n_validations": every_n_validations})
        self.every_n_validations = every_n_validations
        self._validations = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch."""
        if batch_idx or dataloader_idx or trainer.sanity_checking or not self.every_n_validations:
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations == 0:
            folder = Path(trainer.default_root_dir) / "media" / f"step-{trainer.global_step:07d}"
            self.write(trainer, pl_module, batch, folder if trainer.is_global_zero else None)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw every batch of predict."""
        folder = Path(trainer.default_root_dir) / "predictions" / f"batch-{batch_idx:06d}-rank{trainer.global_rank}"
        self.write(trainer, pl_module, batch, folder)

    def state_dict(self) -> dict[str, Any]:
        """Store the count of validations."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._validations = state_dict["validations"]

    @staticmethod
    def write(trainer: Trainer, pl_module: LightningModule, batch: Any, folder: Path | None) -> None:
        """Draw one batch to a folder and, during fit, to TensorBoard; without a folder, draw without writing.

        All ranks must call this, since the network may be sharded.
        """
        if not hasattr(pl_module, "media"):
            return
        for name, shown in pl_module.media(batch).items():  # type: ignore[operator]
            if folder is None:
                continue
            if shown.ndim == 2:
                write_sound(trainer, folder, name, shown, pl_module.sample_rate)  # type: ignore[arg-type]
            else:
                (write_picture if shown.ndim == 3 else write_clip)(trainer, folder, name, shown)


def write_picture(trainer: Trainer, folder: Path, name: str, picture: np.ndarray) -> None:
    """Write uint8[H, W, 3] to ``<folder>/<name>.png`` and, during fit, to TensorBoard; do nothing in a fast_dev_run."""
    if trainer.fast_dev_run:
        return
    encoded = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))[1]
    atomic_write(folder / f"{name}.png", encoded.tobytes())
    for board in _boards(trainer):
        board.add_image(name, picture, trainer.global_step, dataformats="HWC")


def write_clip(trainer: Trainer, folder: Path, name: str, clip: np.ndarray) -> None:
    """Write uint8[T, H, W, 3] to ``<folder>/<name>.mp4`` and, during fit, to TensorBoard; do nothing in a fast_dev_run.

    TensorBoard gets an animated PNG, which browsers play: a GIF would add flicker of its own to every colour outside
    its palette, and `SummaryWriter.add_video` needs one more package to write a GIF.
    """
    if trainer.fast_dev_run:
        return
    fps = getattr(trainer.datamodule, "fps", CLIP_FPS)
    write_film(folder / f"{name}.mp4", clip, fps)
    for board in _boards(trainer):
        first, *others = map(Image.fromarray, clip)
        file = BytesIO()
        first.save(file, "png", save_all=True, append_images=others, duration=1000 / fps, loop=0)
        image = Summary.Image(
            height=clip.shape[1], width=clip.shape[2], colorspace=3, encoded_image_string=file.getvalue()
        )
        _summarize(board, trainer.global_step, Summary.Value(tag=name, image=image))


def write_sound(trainer: Trainer, folder: Path, name: str, sound: np.ndarray, sample_rate: int) -> None:
    """Write float32[C, samples], clipped to [-1, 1], to ``<folder>/<name>.wav`` and, during fit, to TensorBoard.

    16 bits per sample. Does nothing in a fast_dev_run. `SummaryWriter.add_audio` would write the first channel only.
    """
    if trainer.fast_dev_run:
        return
    file = BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(len(sound))
        writer.setsampwidth(2)
        writer.setframerate(sample_rate)
        writer.writeframes((sound.T.clip(-1, 1) * (2**15 - 1)).round().astype("<i2").tobytes())
    atomic_write(folder / f"{name}.wav", file.getvalue())
    for board in _boards(trainer):
        audio = Summary.Audio(
            sample_rate=sample_rate,
            num_channels=len(sound),
            length_frames=sound.shape[1],
            encoded_audio_string=file.getvalue(),
            content_type="audio/wav",
        )
        _summarize(board, trainer.global_step, Summary.Value(tag=name, audio=audio))


def _boards(trainer: Trainer) -> list[Any]:
    """Return TensorBoard's writers during fit; otherwise none."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers] if trainer.state.fn == "fit" else []


def _summarize(board: Any, step: int, value: Any) -> None:
    board.file_writer.add_summary(Summary(value=[value]), step)
