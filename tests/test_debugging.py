"""Lightning's switches for finding faults: each works, or one sentence says why not."""

from pathlib import Path

import pytest

from tests.helpers.errors import refused
from tests.helpers.lab import fit, make_lab

BY_TWO = ("--trainer.max_steps", "2")
WORKING = {
    "limits": ("--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
    "no validation": ("--trainer.limit_val_batches", "0"),
    "anomalies": ("--trainer.detect_anomaly", "true"),
    "profile": ("--trainer.profiler", "simple"),
    "sanity": ("--trainer.num_sanity_val_steps", "2"),
    "summary": ("--trainer.enable_model_summary", "true"),
    "new loaders": ("--trainer.reload_dataloaders_every_n_epochs", "1", "--trainer.limit_train_batches", "1"),
}
REFUSED = {
    ("--trainer.profiler", "simpel"): "trainer.refused",
    ("--trainer.limit_train_batches", "0.01"): "trainer.refused",
    ("--trainer.max_steps", "-2"): "trainer.refused",
    ("--trainer.overfit_batches", "0.01"): "trainer.refused",
    ("--trainer.overfit_batches", "0.4"): "trainer.refused",  # less than the one batch of validation
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lab(tmp_path_factory.mktemp("debugging"))


@pytest.mark.parametrize("switch", WORKING)
def test_it_works(lab: Path, switch: str) -> None:
    assert fit(lab, switch, *BY_TWO, *WORKING[switch]) == 0


@pytest.mark.parametrize("options", REFUSED)
def test_it_is_refused_by_its_own_name(lab: Path, options: tuple[str, str]) -> None:
    with refused(REFUSED[options], options[0].removeprefix("--trainer.")):
        fit(lab, "refused", *options)


@pytest.mark.parametrize(("batches", "workers"), [("1", "0"), ("0.5", "1")])
def test_overfitting_sees_the_same_batches_in_every_epoch(
    lab: Path, tmp_path: Path, batches: str, workers: str
) -> None:
    """Of 6 in an epoch; full.yaml also flips them at random."""
    log = ("--trainer.callbacks+", "tests.helpers.faults.WindowLog", "--trainer.callbacks.folder", str(tmp_path))
    options = ("--trainer.overfit_batches", batches, "--data.num_workers", workers, *log)
    plain = ("--trainer.accumulate_grad_batches", "1", "--trainer.val_check_interval", "null", "--overwrite", "true")
    assert fit(lab, "overfit", *options, *plain, "--trainer.max_steps", "6", config="full.yaml") == 0
    seen = [line.split() for line in (tmp_path / "windows-0.txt").read_text().splitlines()]
    count = {"1": 1, "0.5": 3}[batches]
    assert [int(epoch) for epoch, *_ in seen] == [step // count for step in range(6)]
    assert len({tuple(windows) for _, *windows in seen}) == count
    assert all(seen[step][1:] == seen[step % count][1:] for step in range(6))
