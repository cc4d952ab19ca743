"""Encode pictures or sound during training with a frozen encoder, instead of encoding the dataset beforehand."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from owl.data.encoder import FrameEncoder
from owl.data.encoding import measure
from owl.data.modalities import MODALITIES
from owl.data.windows import WindowDataset
from owl.distributed.agreement import from_first, host_group
from owl.errors import OwlError, at_least
from owl.hardware import fast_dtype
from owl.latents import datasets, described, load_encoder
from owl.nn.compilation import can_compile
from owl.nn.frozen import freeze
from owl.pixels import to_float
from owl.spacing import evenly_spaced

ENCODED = ("rgb", "audio")
"""Modalities that can be encoded in training."""
MEASURED = 2048
"""Evenly spaced frames of the training split, from which mean and standard deviation of the latents are computed."""

Precision = Literal["auto", "fp32", "bf16"]


class FrozenEncoder(Callback):
    """Encode the pictures or the sound of every batch, adding latents as in a dataset written by `data encode`.

    An encoder of ``rgb`` adds ``latent``, the posterior's mean, float[B, T, c, h, w], not standardised. An encoder of
    ``audio`` adds ``audio_latent``, float[B, T, k, c], or float[B, tokens, c] if frames do not have a whole number of
    tokens; each window is encoded separately, so that its first and last tokens do not depend on the sound around it.
    The encoder's fingerprint and the mean and standard deviation of each channel are described as in a dataset of
    latents. They are measured on up to 2,048 frames of the training split when a run starts; a resumed run keeps them.

    With a dataset that already contains the latents, the callback only checks that they come from this encoder, so that
    one configuration works for both.

    For latents of depth, flow or several modalities, encode the dataset beforehand with `data encode`.

    The encoder is not part of the recipe: it is not trained, averaged, saved or wrapped by DDP, and each rank has a
    full copy.

    Args:
        path: Checkpoint or export of an autoencoder of pictures or of sound.
        precision: ``fp32``, as `data encode` computes, ``bf16`` (autocast), or ``auto``: bf16 if it is fast on the
            device. A resumed run keeps the resolved precision.
        compile: Whether to use ``torch.compile`` for the encoder.
        batch_size: Frames, or sounds, per batch, which limits memory.

    Raises:
        OwlError: ``path`` contains no such autoencoder, or ``batch_size`` is below 1.
    """

    def __init__(self, path: str, precision: Precision = "fp32", compile: bool = False, batch_size: int = 64) -> None:
        at_least(1, batch_size=batch_size)
        self.path, self.precision, self.compile, self.batch_size = path, precision, compile, batch_size
        self.encoder: FrameEncoder | None = None
        self._encodes = False
        self._device = torch.device("cpu")
        self._dtype: torch.dtype | None = None  # unknown until it is needed
        self._statistics: tuple[list[float], list[float]] | None = None
        self._tokens: int | None = None  # of sound, in each frame; None: not the same number in all

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the encoder and describe its latents to the recipe, or check it against the dataset's latents.

        Raises:
            OwlError: Samples have neither latents nor pictures of the encoder's size or sound of its sample rate, or
                latents of another encoder.
        """
        if self.encoder is None:
            self.encoder = load_encoder(self.path)
            encoded = list(self.encoder.network.modalities)
            if len(encoded) != 1 or encoded[0] not in ENCODED:
                raise OwlError(
                    "network.kind",
                    f"the network of {self.path} encodes {', '.join(encoded)}, FrozenEncoder takes one of "
                    f"{' or of '.join(ENCODED)}; encode the dataset with `python -m owl data encode`",
                )
            self.source, self.latent = encoded[0], MODALITIES[encoded[0]].latent
            self._device = trainer.strategy.root_device
            network = freeze(self.encoder.network).to(device=self._device, memory_format=torch.channels_last)
            if self.compile and can_compile(self._device.type):
                network.encoder.compile()
        described(trainer.datamodule)  # or a data module that says nothing is refused
        for dataset in datasets(trainer.datamodule):
            self._join(trainer, dataset)

    def _join(self, trainer: Trainer, dataset: Any) -> None:
        """Add latents of this encoder to the samples of a dataset."""
        assert self.encoder is not None
        modalities, url = dataset.info.modalities, getattr(dataset, "path", type(dataset).__qualname__)
        holds = getattr(dataset, "modalities", modalities)
        self._encodes = self.latent not in holds
        if not self._encodes:
            found = modalities[self.latent]["encoder"]["fingerprint"]
            if found != self.encoder.fingerprint:
                raise OwlError(
                    "latents.encoder",
                    f"{self.latent} of {url} comes from encoder {found}, FrozenEncoder got {self.path} with encoder "
                    f"{self.encoder.fingerprint}; encode the footage with that, or give the path of the other",
                )
            return
        if self.source not in holds or not isinstance(dataset, WindowDataset):
            raise OwlError(
                "recipe.dataset",
                f"samples of {url}, a {type(dataset).__qualname__}, hold {', '.join(holds)}, FrozenEncoder needs "
                f"{self.latent} or, of a WindowDataset, {self.source}; add one to data.init_args.modalities",
            )
        layout = self._layout_of_sound(dataset) if self.encoder.is_of_sound else self._layout_of_pictures(dataset)
        mean, std = self._measure(trainer, dataset)
        modalities[self.latent] = {
            **layout,
            "posterior": "mean",
            "encoder": self.encoder.identity,
            "mean": mean,
            "std": std,
        }

    def _layout_of_pictures(self, dataset: WindowDataset) -> dict[str, Any]:
        assert self.encoder is not None
        size = tuple(dataset.shapes()[self.source][0][-2:])
        if size != self.encoder.size:
            found, expected = ("x".join(map(str, numbers)) for numbers in (size, self.encoder.size))
            raise OwlError(
                "dataset.size",
                f"the pictures of {dataset.path} are delivered as {found} (height x width), the encoder of {self.path} "
                f"takes {expected}; set data.init_args.size to that, or use an encoder that was trained on this size",
            )
        return {"shape": self.encoder.latent_shape}

    def _layout_of_sound(self, dataset: WindowDataset) -> dict[str, Any]:
        assert self.encoder is not None
        if dataset.stride != 1:
            raise OwlError(
                "recipe.dataset",
                f"windows of {dataset.path} have a stride of {dataset.stride}, so that latents of sound start before "
                "the sound of a window; encode the dataset with `python -m owl data encode`, or set "
                "data.init_args.stride to 1",
            )
        layout = self.encoder.layout_of_sound(dataset.info.modalities[self.source], dataset.info.fps, dataset.path)
        self._tokens = None if "rate" in layout else layout["shape"][0]
        return layout

    def _measure(self, trainer: Trainer, dataset: WindowDataset) -> tuple[list[float], list[float]]:
        """Measure mean and standard deviation of each channel on rank 0, and broadcast them."""
        assert self.encoder is not None
        if self._statistics is None:
            statistics: tuple[list[float], list[float]] = ([], [])
            if trainer.is_global_zero:
                length = dataset.length if self.encoder.is_of_sound else 1
                frames: WindowDataset = trainer.datamodule.training_frames(self.source, length)
                chosen = evenly_spaced(len(frames), max(1, MEASURED // length))
                parts = (chosen[at : at + self.batch_size] for at in range(0, len(chosen), self.batch_size))
                latents = (latent for part in parts for latent in self.encode(frames.batch(part)[self.source]))
                mean, std = measure(self._channels_first(latent).cpu().numpy() for latent in latents)
                statistics = mean.tolist(), std.tolist()
            self._statistics = from_first(statistics, host_group())
        return self._statistics

    def _channels_first(self, latent: Tensor) -> Tensor:
        """float[T, c, h, w] of one frame -> float[c, h, w]; of sound float[..., c] -> float[c, tokens]."""
        assert self.encoder is not None
        return latent.flatten(0, -2).T if self.encoder.is_of_sound else latent[0]

    @torch.no_grad()
    def encode(self, source: Tensor) -> Tensor:
        """Encode pictures or sound.

        Args:
            source: uint8[B, T, 3, H, W], or float[B, channels, n].

        Returns:
            The posteriors' means, float32[B, T, c, h, w] on the encoder's device; of sound float32[B, T, k, c], or
            float32[B, tokens, c].
        """
        assert self.encoder is not None
        network, dtype = self.encoder.network, self._chosen_dtype()
        with torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32):
            if self.encoder.is_of_sound:
                parts = source.to(self._device).split(self.batch_size)
                tokens = torch.cat([network.encode(sound).mean.float() for sound in parts])
                tokens = tokens[..., : source.shape[-1] // network.hop].transpose(1, 2).contiguous()
                return tokens if self._tokens is None else tokens.unflatten(1, (-1, self._tokens))
            means = []
            for pictures in source.to(self._device).flatten(0, 1).split(self.batch_size):
                image = to_float(pictures.contiguous(memory_format=torch.channels_last))
                means.append(network.encode(image).mean.float())
            return torch.cat(means).contiguous().unflatten(0, source.shape[:2])

    def _chosen_dtype(self) -> torch.dtype:
        if self._dtype is None:
            fast = self.precision == "auto" and fast_dtype(self._device) == torch.bfloat16
            self._dtype = torch.bfloat16 if fast or self.precision == "bf16" else torch.float32
        return self._dtype

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the latents."""
        if self._encodes:
            batch[self.latent] = self.encode(batch[self.source])

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
