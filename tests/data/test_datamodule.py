"""The data module inside a real Trainer: checkpoints taken anywhere continue with the very next batch."""

import logging
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer

from owl.data.datamodule import ShardDataModule
from owl.data.recorder import GameRecording
from owl.data.shards import DatasetInfo, ShardIndex
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("datamodule") / "data", episodes=4, frames=12)


class EpochLog(LightningModule):
    """Writes down every training batch that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(1))
        self.entries: list[Any] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.entries.append((self.current_epoch, index, batch["window"].tolist(), batch["rgb"].sum().item()))
        return self.parameter.sum()

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveEverywhere(Callback):
    """Saves after each batch, each validation and each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"batch-{trainer.global_step}.ckpt", weights_only=False)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"validation-{trainer.global_step}.ckpt", weights_only=False)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.global_step}.ckpt", weights_only=False)


def fit(
    dataset: Path, workers: int, checkpoint: Path | None = None, save_to: Path | None = None, **options: Any
) -> list[Any]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = ShardDataModule(
        str(dataset), length=2, batch_size=4, num_workers=workers, flip=0.5, crop=(16, 20), validation_windows=2
    )
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=[SaveEverywhere(save_to)] if save_to else [],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    log = EpochLog()
    trainer.fit(log, data, ckpt_path=checkpoint, weights_only=True)
    return log.entries


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}, {"val_check_interval": 2}])
def test_a_checkpoint_taken_anywhere_continues_with_the_next_batch(
    dataset: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    expected = fit(dataset, workers=0, save_to=tmp_path, **options)
    per_epoch = options.get("limit_train_batches", 5)
    assert [entry[:2] for entry in expected] == [(epoch, batch) for epoch in range(3) for batch in range(per_epoch)]
    steps = {f"batch-{n}": n for n in (1, per_epoch - 1, per_epoch, per_epoch + 1)}
    steps |= {path.stem: int(path.stem.split("-")[1]) for path in tmp_path.glob("[ve]*-*.ckpt")}
    for name, step in steps.items():
        if step < len(expected):
            assert fit(dataset, workers=0, checkpoint=tmp_path / f"{name}.ckpt", **options) == expected[step:], name


def test_workers_that_prefetch_do_not_move_the_checkpoint(dataset: Path, tmp_path: Path) -> None:
    expected = fit(dataset, workers=2, save_to=tmp_path)
    assert expected == fit(dataset, workers=0)
    assert fit(dataset, workers=2, checkpoint=tmp_path / "batch-7.ckpt") == expected[7:]


def test_splits_modalities_and_evenly_spaced_validation(dataset: Path) -> None:
    data = ShardDataModule(
        str(dataset), ("rgb", "controls"), length=3, size=(12, 20), batch_size=2, num_workers=0, validation_windows=4
    )
    data.setup()
    assert [d.split for d in (data.train_dataset, data.validation_dataset, data.test_dataset)] == [
        "train",
        "validation",
        "test",
    ]
    batch = next(iter(data.train_dataloader()))
    assert {name: list(x.shape) for name, x in batch.items()} == {
        "window": [2],
        "rgb": [2, 3, 3, 12, 20],
        "buttons": [2, 3, 3],
        "axes": [2, 3, 2],
    }
    assert [b["window"].tolist() for b in data.val_dataloader()] == [[0, 3], [6, 9]]
    assert [b["window"].tolist() for b in data.test_dataloader()] == [[0, 3], [6, 9]]
    assert data.validation_dataset.describe(9) == {
        "episode": "episode-002",
        "shard": "shard-000002.tar",
        "frames": [9, 11],
    }


def test_validation_and_test_may_have_longer_windows_than_training(dataset: Path) -> None:
    data = ShardDataModule(str(dataset), length=2, stride=2, validation_length=5, batch_size=1, num_workers=0)
    data.setup()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [next(iter(each))["rgb"].shape[:2] for each in loaders] == [(1, 2), (1, 5), (1, 5)]
    assert data.fps == data.train_dataset.info.fps / 2


def test_setup_opens_only_what_a_stage_needs(dataset: Path) -> None:
    data = ShardDataModule(str(dataset), num_workers=0)
    data.setup("test")
    assert not hasattr(data, "train_dataset")
    identity = DatasetInfo.load(dataset).identity(ShardIndex.load(dataset))
    assert data.identity() == {"path": str(dataset), "identity": identity}


def test_numbers_of_windows_stay_where_python_reads_them(dataset: Path) -> None:
    data = ShardDataModule(str(dataset), batch_size=4, num_workers=0)
    data.setup("validate")
    (batch, *_) = data.val_dataloader()
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert {name: x.device.type for name, x in moved.items()} == {"window": "cpu", "rgb": "meta"}
    assert torch.equal(moved["window"], batch["window"])


def test_hop_thins_out_training_windows(dataset: Path) -> None:
    data = ShardDataModule(str(dataset), length=4, hop=4, num_workers=0, batch_size=1)
    data.setup("fit")
    assert len(data.train_dataset) == 2 * 3
    assert len(data.validation_dataset) == 9


def test_a_yaml_configuration_is_understood(dataset: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ShardDataModule, "data")
    config = parser.parse_object(
        {
            "data": {
                "class_path": "owl.data.datamodule.ShardDataModule",
                "init_args": {
                    "path": str(dataset),
                    "modalities": ["rgb", "depth"],
                    "size": [12, 20],
                    "crop": [8, 8],
                    "record": {"frames": 100, "size": [48, 64], "modalities": ["flow"]},
                },
            }
        }
    )
    data = parser.instantiate_classes(config).data
    data.setup("fit")
    assert data.train_dataset[0]["depth"].shape == (1, 1, 8, 8)
    assert data.record.size == (48, 64)
    assert list(data.record.recorded()) == ["rgb", "flow", "controls"]


@pytest.mark.usefixtures("recorded_here")
def test_what_is_missing_is_recorded_once(tmp_path: Path) -> None:
    path = tmp_path / "game"
    recording = GameRecording(frames=90, size=(48, 80), episode_frames=30, workers=1)
    data = ShardDataModule(str(path), length=2, batch_size=4, num_workers=0, record=recording)
    data.prepare_data()
    data.setup("fit")
    assert data.train_dataset[0]["rgb"].shape == (2, 3, 48, 80)
    written = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    data.prepare_data()
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == written


def test_a_missing_dataset_without_a_recording_says_how_to_make_one(tmp_path: Path) -> None:
    data = ShardDataModule(str(tmp_path / "none"))
    data.prepare_data()
    with refused("dataset.missing", f"folder {tmp_path / 'none'}", "`python -m owl data record`"):
        data.setup("fit")


@pytest.mark.parametrize("injected", [True, False])
def test_lightning_must_not_divide_the_batches_once_more(dataset: Path, injected: bool) -> None:
    data = ShardDataModule(str(dataset), batch_size=4, num_workers=0)
    data.setup()
    data.trainer = Trainer(accelerator="cpu", devices=2, logger=False, use_distributed_sampler=injected)
    if injected:
        for make in (data.train_dataloader, data.val_dataloader):
            with refused("trainer.sampler", "trainer.use_distributed_sampler", "false"):
                make()
    else:
        assert len(data.train_dataloader()) == 24 // 8
        assert sum(len(batch["window"]) for batch in data.val_dataloader()) == 6


@pytest.mark.parametrize("shuffle_block", [None, 1])
def test_prepare_data_downloads_what_a_global_shuffle_reads_at_once(
    dataset: Path, tmp_path: Path, shuffle_block: int | None
) -> None:
    memory = fsspec.filesystem("memory")
    for file in dataset.iterdir():
        memory.pipe(f"/downloads/{shuffle_block}/{file.name}", file.read_bytes())
    url = f"memory://downloads/{shuffle_block}"
    data = ShardDataModule(url, num_workers=0, cache_dir=str(tmp_path), shuffle_block=shuffle_block)
    data.prepare_data()
    copies = {path.name for path in tmp_path.rglob("shard-*.tar")}
    everything = {path.name for path in dataset.glob("shard-*.tar")}
    assert copies == (everything if shuffle_block is None else set())
    for shard in everything if shuffle_block is None else set():
        memory.rm(f"/downloads/{shuffle_block}/{shard}")  # training reads the copies alone
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["rgb"].shape[0] == 16
