"""Encode pictures during training with a frozen encoder, instead of encoding the dataset beforehand."""

from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from owl.data.encoder import FrameEncoder
from owl.data.encoding import measure
from owl.data.windows import WindowDataset
from owl.distributed.agreement import from_first, host_group
from owl.errors import OwlError, at_least
from owl.hardware import fast_dtype
from owl.latents import described, load_encoder
from owl.nn.compilation import can_compile
from owl.nn.frozen import freeze
from owl.pixels import to_float

SOURCE, LATENT = "rgb", "latent"
MEASURED = 2048
"""Evenly spaced frames of the training split, from which mean and standard deviation of the latents are computed."""

Precision = Literal["auto", "fp32", "bf16"]


class FrozenEncoder(Callback):
    """Encode the pictures of every batch, adding ``latent`` to ``rgb`` as in a dataset written by `data encode`.

    ``latent`` is the posterior's mean, float[B, T, c, h, w], not standardised. The encoder's fingerprint and the mean
    and standard deviation of each channel are described as in a dataset of latents. They are measured on up to 2,048
    frames of the training split when a run begins; a resumed run keeps them.

    With a dataset that already contains ``latent``, the callback only checks that it comes from this encoder, so that
    one configuration works for both.

    Only pictures (``rgb``) are encoded. For latents of depth, flow, sound or several modalities, encode the dataset
    beforehand with `data encode`.

    The encoder is not part of the recipe: it is not trained, averaged, saved or wrapped by DDP, and each rank has a
    full copy.

    Args:
        path: Checkpoint or export of an image autoencoder.
        precision: ``fp32``, as `data encode` computes, ``bf16`` (autocast), or ``auto``: bf16 if it is fast on the
            device. A resumed run keeps the resolved precision.
        compile: Whether to use ``torch.compile`` for the encoder.
        batch_size: Frames per batch, which limits memory.

    Raises:
        OwlError: ``path`` contains no image autoencoder, or ``batch_size`` is below 1.
    """

    def __init__(self, path: str, precision: Precision = "fp32", compile: bool = False, batch_size: int = 64) -> None:
        at_least(1, batch_size=batch_size)
        self.path, self.precision, self.compile, self.batch_size = path, precision, compile, batch_size
        self.encoder: FrameEncoder | None = None
        self._encodes = False
        self._device = torch.device("cpu")
        self._dtype: torch.dtype | None = None  # unknown until it is needed
        self._statistics: tuple[list[float], list[float]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the encoder and describe its latents to the recipe, or check it against the dataset's latents.

        Raises:
            OwlError: Samples have neither pictures of the encoder's size nor latents, or latents of another encoder.
        """
        if self.encoder is None:
            self.encoder = load_encoder(self.path)
            if list(self.encoder.network.modalities) != [SOURCE]:
                raise OwlError(
                    "network.kind",
                    f"the network of {self.path} encodes {', '.join(self.encoder.network.modalities)}, FrozenEncoder "
                    f"one of {SOURCE}; encode the dataset with `python -m owl data encode`",
                )
            self._device = trainer.strategy.root_device
            network = freeze(self.encoder.network).to(device=self._device, memory_format=torch.channels_last)
            if self.compile and can_compile(self._device.type):
                network.encoder.compile()
        described(trainer.datamodule)  # or a data module that says nothing is refused
        for name in ("train", "validation", "test"):
            dataset = getattr(trainer.datamodule, f"{name}_dataset", None)
            if dataset is not None:
                self._join(trainer, dataset)

    def _join(self, trainer: Trainer, dataset: Any) -> None:
        """Add latents of this encoder to the samples of a dataset."""
        assert self.encoder is not None
        modalities, url = dataset.info.modalities, getattr(dataset, "path", type(dataset).__qualname__)
        holds = getattr(dataset, "modalities", modalities)
        self._encodes = LATENT not in holds
        if not self._encodes:
            found = modalities[LATENT]["encoder"]["fingerprint"]
            if found != self.encoder.fingerprint:
                raise OwlError(
                    "latents.encoder",
                    f"{LATENT} of {url} comes from encoder {found}, FrozenEncoder got {self.path} with encoder "
                    f"{self.encoder.fingerprint}; encode the footage with that, or give the path of the other",
                )
            return
        if SOURCE not in holds or not isinstance(dataset, WindowDataset):
            raise OwlError(
                "recipe.dataset",
                f"samples of {url}, a {type(dataset).__qualname__}, hold {', '.join(holds)}, FrozenEncoder needs "
                f"{LATENT} or, of a WindowDataset, {SOURCE}; add one to data.modalities",
            )
        size = tuple(dataset.shapes()[SOURCE][0][-2:])
        if size != self.encoder.size:
            found, expected = ("x".join(map(str, numbers)) for numbers in (size, self.encoder.size))
            raise OwlError(
                "dataset.size",
                f"the pictures of {url} are delivered as {found} (height x width), the encoder of {self.path} "
                f"takes {expected}; set data.size to that, or use an encoder that was trained on this size",
            )
        mean, std = self._measure(trainer)
        modalities[LATENT] = {
            "shape": self.encoder.latent_shape,
            "posterior": "mean",
            "encoder": self.encoder.identity,
            "mean": mean,
            "std": std,
        }

    def _measure(self, trainer: Trainer) -> tuple[list[float], list[float]]:
        """Measure mean and standard deviation of each channel on rank 0, and broadcast them."""
        if self._statistics is None:
            statistics: tuple[list[float], list[float]] = ([], [])
            if trainer.is_global_zero:
                frames: WindowDataset = trainer.datamodule.training_frames()
                chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MEASURED)).round().astype(int))
                parts = (chosen[at : at + self.batch_size] for at in range(0, len(chosen), self.batch_size))
                latents = (latent for part in parts for latent in self.encode(frames.batch(part.tolist())[SOURCE]))
                mean, std = measure(latent[0].cpu().numpy() for latent in latents)
                statistics = mean.tolist(), std.tolist()
            self._statistics = from_first(statistics, host_group())
        return self._statistics

    @torch.no_grad()
    def encode(self, rgb: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            rgb: uint8[B, T, 3, H, W].

        Returns:
            The posteriors' means, float32[B, T, c, h, w] on the encoder's device.
        """
        assert self.encoder is not None
        dtype = self._chosen_dtype()
        means = []
        with torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32):
            for pictures in rgb.to(self._device).flatten(0, 1).split(self.batch_size):
                image = to_float(pictures.contiguous(memory_format=torch.channels_last))
                means.append(self.encoder.network.encode(image).mean.float())
        return torch.cat(means).contiguous().unflatten(0, rgb.shape[:2])

    def _chosen_dtype(self) -> torch.dtype:
        if self._dtype is None:
            fast = self.precision == "auto" and fast_dtype(self._device) == torch.bfloat16
            self._dtype = torch.bfloat16 if fast or self.precision == "bf16" else torch.float32
        return self._dtype

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the latents."""
        if self._encodes:
            batch[LATENT] = self.encode(batch[SOURCE])

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the latents."""
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the latents."""
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the latents."""
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """Store the resolved precision."""
        return {"bf16": self._chosen_dtype() == torch.bfloat16}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        if self.precision == "auto":
            self._dtype = torch.bfloat16 if state_dict["bf16"] else torch.float32
