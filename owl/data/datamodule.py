"""Data module for all recipes that train on shards."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from owl.data.loader import GlobalBatches, RepeatedBatches, ResumableLoader, evaluation_loader
from owl.data.reader import ShardReader
from owl.data.recorder import GameRecording, record_game
from owl.data.shards import INDEX_NAME, INFO_NAME, DatasetInfo, ShardIndex
from owl.data.storage import open_filesystem
from owl.data.windows import WindowDataset
from owl.errors import OwlError
from owl.seeds import run_seed


class ShardDataModule(LightningDataModule):
    """Windows of a shard dataset, shuffled and augmented for training, evenly spaced for validation and test.

    Use it with ``Trainer(use_distributed_sampler=False)``: it divides batches among ranks itself. The order of windows
    and their augmentation are functions of the run's seed and the epoch.

    Args:
        path: The dataset's folder, any fsspec URL.
        modalities: Modalities of the dataset that a sample contains.
        length: Frames in a window.
        stride: Stored frames from one frame of a window to the next.
        hop: Stored frames from the start of one training window to the start of the next.
        size: (h, w) of the pictures; None keeps the stored size.
        batch_size: Windows per batch of one rank.
        num_workers: Worker processes per rank.
        validation_windows: Windows of each validation and test pass, evenly spaced; None takes all.
        validation_length: Frames in a window of validation and test, for example to look at clips where training needs
            pairs of frames only; None: ``length``. A batch has ``batch_size`` of these windows.
        shuffle_block: Shards that are shuffled together (for remote data); None shuffles everything.
        cache_dir: Local folder for complete copies of remote shards: all are copied before training, or, with
            ``shuffle_block``, each when it is first read.
        flip: Probability of mirroring a training window.
        crop: (h, w) of random crops of training windows, central crops for validation; None disables cropping.
        record: Recording from the game to make if ``path`` has no finished dataset; None requires a dataset there.
        pack: Whether episodes shorter than a window share windows instead of being skipped; for recipes that separate
            the episodes of a window, such as the world model's.
    """

    def __init__(
        self,
        path: str,
        modalities: Sequence[str] = ("rgb",),
        length: int = 1,
        stride: int = 1,
        hop: int = 1,
        size: tuple[int, int] | None = None,
        batch_size: int = 16,
        num_workers: int = 2,
        validation_windows: int | None = None,
        validation_length: int | None = None,
        shuffle_block: int | None = None,
        cache_dir: str | None = None,
        flip: float = 0.0,
        crop: tuple[int, int] | None = None,
        record: GameRecording | None = None,
        pack: bool = False,
    ) -> None:
        super().__init__()
        self.path, self.record, self.cache_dir = path, record, cache_dir
        self.batch_size, self.num_workers = batch_size, num_workers
        self.hop, self.flip, self.shuffle_block = hop, flip, shuffle_block
        self.validation_windows = validation_windows
        self.validation_length = length if validation_length is None else validation_length
        self._windows: dict[str, Any] = {
            "modalities": modalities,
            "length": length,
            "stride": stride,
            "size": size,
            "crop": crop,
            "cache_dir": cache_dir,
            "pack": pack,
        }

    def prepare_data(self) -> None:
        """Record the dataset if ``record`` is set and it is not finished; download all shards for a global shuffle.

        With ``shuffle_block``, remote shards are downloaded when their block is read instead.
        """
        if self.record is not None:
            filesystem, path = open_filesystem(self.path)
            if not all(filesystem.exists(f"{path}/{name}") for name in (INFO_NAME, INDEX_NAME)):
                record_game(self.path, self.record)
        if self.cache_dir is not None and self.shuffle_block is None:
            index = ShardIndex.load(self.path, self.cache_dir)
            identity = DatasetInfo.load(self.path).identity(index)
            ShardReader(self.path, self.cache_dir, identity).download(index.shards.tolist())

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that a stage ("fit", "validate", "test", "predict") needs; None opens all.

        Raises:
            OwlError: The dataset cannot be used; see `WindowDataset`.
        """
        if stage in ("fit", None):
            self.train_dataset = WindowDataset(self.path, "train", hop=self.hop, flip=self.flip, **self._windows)
        if stage in ("fit", "validate", None):
            self.validation_dataset = self._evaluation_dataset("validation")
        if stage in ("test", "predict", None):
            self.test_dataset = self._evaluation_dataset("test")

    def training_frames(self, modality: str = "rgb", length: int = 1) -> WindowDataset:
        """Return one modality of the training split, processed like its windows but not augmented.

        Args:
            modality: Name of the modality.
            length: Frames of a window; each frame is in one window, except at the ends of episodes.
        """
        only = {"modalities": [modality], "length": length, "stride": 1, "hop": length, "pack": False}
        return WindowDataset(self.path, "train", **self._windows | only)

    def train_dataloader(self) -> ResumableLoader:
        """Return the resumable training loader of this rank."""
        rank, world_size = self._rank()
        repeated = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        batches = (RepeatedBatches if repeated else GlobalBatches)(
            self.train_dataset, self.batch_size, run_seed(), self.shuffle_block, rank=rank, world_size=world_size
        )
        return ResumableLoader(self.train_dataset, batches, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of this rank's part of the validation windows."""
        return self._evaluation_loader(self.validation_dataset)

    def test_dataloader(self) -> DataLoader:
        """Return the loader of this rank's part of the test windows."""
        return self._evaluation_loader(self.test_dataset)

    def predict_dataloader(self) -> DataLoader:
        """Return the loader for ``predict``: this rank's part of the test windows."""
        return self._evaluation_loader(self.test_dataset)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Keep the window indices on the CPU, since reading numbers from a GPU synchronizes with it."""
        return super().transfer_batch_to_device(batch, device, dataloader_idx) | {"window": batch["window"]}

    def identity(self) -> dict[str, str]:
        """Return the identity of the samples for checkpoints and reports: path and hash of the dataset's contents."""
        return {"path": self.path, "identity": self._any_dataset().identity}

    @property
    def fps(self) -> float:
        """Frames per second of the windows."""
        dataset = self._any_dataset()
        return dataset.info.fps / dataset.stride

    def _any_dataset(self) -> WindowDataset:
        for name in ("train_dataset", "validation_dataset", "test_dataset"):
            if hasattr(self, name):
                return getattr(self, name)
        raise RuntimeError("ShardDataModule was asked about its dataset before setup")

    def _evaluation_dataset(self, split: str) -> WindowDataset:
        return WindowDataset(self.path, split, **self._windows | {"length": self.validation_length})

    def _evaluation_loader(self, dataset: WindowDataset) -> DataLoader:
        return evaluation_loader(dataset, self.validation_windows, self.batch_size, self.num_workers, *self._rank())

    def _rank(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        if self.trainer.world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            # Lightning would divide the batches a second time and silently skip most of the data
            raise OwlError(
                "trainer.sampler",
                "trainer.use_distributed_sampler is true with several devices, but ShardDataModule divides batches "
                "among them itself; set it to false",
            )
        return self.trainer.global_rank, self.trainer.world_size
