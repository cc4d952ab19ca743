"""``sweep``: the space checked against the experiment, the page's commands on real runs, workers on a cluster."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from owl.commands.sweep import check, load_plan, refuse_network
from tests.helpers.errors import refused
from tests.helpers.lab import make_lab
from tests.helpers.sweeps import LR, MUON, OPTIMIZER, RATIO, SPACE, SWEEP, plan_of
from tests.helpers.tiny import REPOSITORY, owl_here, write_config
from tests.test_docs import blocks, commands


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lab(tmp_path_factory.mktemp("sweep"))


def test_the_space_is_checked_against_the_experiment(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab)
    check(plan_of(), "s.yaml", ["--config=tiny.yaml", "--trainer.max_steps=3"])
    for key, values, token in (
        (f"{OPTIMIZER}.init_args.lrr", {"low": 1, "high": 2}, "'lr'"),
        ("trainer.max_step", {"low": 1, "high": 2}, "did you mean '--trainer.max_steps'?"),
        ("data.init_args.batch_size", {"choices": [2, "many"]}, "'many'"),
    ):
        space = {OPTIMIZER: SPACE[OPTIMIZER], key: values}
        with refused("sweep.setting", f"s.yaml: key 'space.{key}' is", token):
            check(plan_of(space=space), "s.yaml", ["--config=tiny.yaml"])


def test_the_commands_of_the_page_run_a_real_sweep(lab: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands, on the smallest experiment: one trial trains, one has a missing dataset."""
    page = REPOSITORY / "docs" / "how-to" / "sweep.md"
    (block,) = (b for b in blocks(page) if b.language == "yaml")
    content = yaml.safe_load(block.content)
    write_config(lab / block.title, content)
    load_plan(lab / block.title)
    space = {**content["space"], "data.init_args.path": {"choices": [str(lab / "data"), "missing"]}}
    del space["model.init_args.warmup_steps"]
    fixed = {key: {"choices": [value]} for key, value in {OPTIMIZER: MUON, LR: 0.002, RATIO: 1.5}.items()}
    write_config(lab / block.title, {**content, "sampler": "grid", "trials": 2, "space": {**space, **fixed}})
    write_config(lab / "shorter.yaml", {"trainer": {"max_steps": 2}})
    monkeypatch.setattr(sys, "path", [*sys.path])
    for command in commands(page):
        words = command.replace("experiments/quickstart.yaml", "tiny.yaml --config shorter.yaml").split()[3:]
        if words[0] == "fit":
            with pytest.raises(SystemExit) as exit_:
                owl_here(*words, "--print_config", cwd=lab)
            assert exit_.value.code == 0
        else:
            assert owl_here(*words, cwd=lab) == 0
    folder = lab / "runs" / "lr"
    text = (folder / "report.md").read_text()
    assert (cluster / "calls").read_text() == "sbatch runs/lr/workers.sh\n"
    assert "2 of 2 trials" in text
    assert "1 complete" in text
    assert "1 failed" in text
    assert "missing" in text
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["data"]["init_args"]["path"] == str(lab / "data")
    assert best["model"]["init_args"]["optimizer"]["init_args"]["muon_ratio"] == 1.5
    assert best["trainer"]["callbacks"] is None
    assert best["trainer"]["max_steps"] == 2
    assert sorted(path.name for path in folder.glob("trial-*")) == ["trial-0000", "trial-0001"]


@pytest.fixture
def checked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the space against the experiment in this process, which has imported everything for it."""
    monkeypatch.setattr("owl.commands.sweep.ProcessPoolExecutor", ThreadPoolExecutor)


@pytest.mark.usefixtures("checked_here")
def test_workers_on_a_cluster_are_an_array_of_jobs(
    lab: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(cluster / "lr.yaml", {**SWEEP, "space": {OPTIMIZER: SPACE[OPTIMIZER]}})
    (cluster / "tiny.yaml").write_text((lab / "tiny.yaml").read_text())
    words = ("sweep", "--config", "tiny.yaml", "--sweep", "lr.yaml", "--trials", "5", "--threads_per_trial", "3")
    cluster_options = (
        "--executor",
        "slurm",
        "--workers",
        "4",
        "--setup",
        "module load cuda",
        "--sbatch",
        "partition=gpu",
    )
    assert owl_here(*words, *cluster_options, "--trainer.max_steps", "7", cwd=cluster) == 0
    assert (cluster / "calls").read_text() == "sbatch runs/lr/workers.sh\n"
    script = (cluster / "runs" / "lr" / "workers.sh").read_text()
    directives = set(re.findall(r"^#SBATCH --(.+)$", script, re.MULTILINE))
    assert {
        "array=1-4",
        "gpus-per-node=1",
        "partition=gpu",
        "requeue",
        "signal=USR1@120",
        "ntasks-per-node=1",
    } <= directives
    (worker,) = re.findall(r"-m owl (.*)$", script, re.MULTILINE)
    trial = "--threads_per_trial 3 --trials 5 --trainer.max_steps=7"
    assert worker == f"sweep --config tiny.yaml --sweep lr.yaml {trial}"
    assert script.index("module load cuda") < script.index("srun")
    assert "Follow them: tail -F runs/lr/slurm-*.log" in capsys.readouterr().out
    assert owl_here("sweep", "--config", "tiny.yaml", "--sweep", "lr.yaml", "--trials", "0", cwd=cluster) == 0
    assert "0 of 4 trials" in (cluster / "runs" / "lr" / "report.md").read_text()  # it is there, for workers to join


def test_options_of_jobs_are_refused_for_local_workers(lab: Path) -> None:
    with refused("sweep.cluster-option", "--executor slurm"):
        owl_here("sweep", "--config", "tiny.yaml", "--sweep", "lr.yaml", "--sbatch", "partition=gpu", cwd=lab)


def test_machines_do_not_share_sqlite_over_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mounts = [SimpleNamespace(mountpoint=path, fstype=kind) for path, kind in (("/", "ext4"), (str(tmp_path), "nfs4"))]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    with refused("sweep.network", str(tmp_path), "nfs4", "storage"):
        refuse_network(tmp_path / "runs" / "lr", "slurm")
    refuse_network(tmp_path / "runs" / "lr", "local")  # of one machine
    assert "nfs4" in capsys.readouterr().out
    refuse_network(tmp_path.parent / "runs", "slurm")


@pytest.mark.usefixtures("checked_here")
def test_a_killed_trial_is_continued_from_its_checkpoint(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a real process: fit is killed after its second step, and its trial reaches the same result."""
    write_config(lab / "killed.yaml", {**SWEEP, "trials": 1, "sampler": "random", "space": {LR: SPACE[LR]}})
    fault = {"class_path": "tests.helpers.faults.KillOnce", "init_args": {"step": 2}}
    trainer = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None, "callbacks": [fault]}
    write_config(lab / "fault.yaml", {"trainer": trainer})
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # where the trials find the fault
    files = ("--config", "tiny.yaml", "--config", "fault.yaml", "--sweep", "killed.yaml")
    assert owl_here("sweep", *files, cwd=lab) == 0
    printed = capfd.readouterr().out
    assert "trial 0 is interrupted, its process was killed (status -9)" in printed
    assert "trial 0 continues" in printed
    assert "1 of 1 trials: 1 complete" in (lab / "runs" / "killed" / "report.md").read_text()
    content = torch.load(lab / "runs/killed/trial-0000/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 4
