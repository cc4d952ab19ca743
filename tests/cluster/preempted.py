"""A training on a real SLURM of two nodes, stopped three times at random, against one that was left alone; and a sweep.

``make test-slurm`` runs it, as root on Debian: it installs SLURM and starts it on this machine. The experiment of the
quickstart runs for some steps with two processes; twice SLURM preempts it (SIGTERM), once it warns of the time limit
(SIGUSR1). In the end both trainings must have the same weights and optimiser state, bit for bit. Then two jobs
share a sweep of short trials, and one of them is preempted: every trial must come to its end all the same.
"""

import argparse
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
STOPS = ("requeue", "requeue", "USR1")
TRIALS = 4
PATIENCE = 900.0  # seconds that a job may take to come to anything


def shell(*words: str | Path) -> str:
    """Run a command; return what it prints."""
    return subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout


def submit(folder: Path, steps: int, command: str, *words: str | Path) -> str:
    """Submit the quickstart with ``submit`` or ``sweep``; return the job's number."""
    printed = shell(
        *(sys.executable, "-m", "owl", command, "--config", "experiments/quickstart.yaml", *words),
        *("--runs", folder / "runs", "--data.init_args.path", folder / "data", "--data.init_args.record", "null"),
        *("--data.init_args.batch_size", "8", "--data.init_args.num_workers", "1"),
        *("--data.init_args.validation_windows", "16", "--trainer.val_check_interval", str(steps // 2)),
        *("--trainer.max_steps", str(steps), "--trainer.max_time", "null", "--trainer.enable_progress_bar", "false"),
    )
    print(printed.strip(), flush=True)
    return re.findall(r"Submitted batch job (\d+)", printed)[0]


def submit_training(folder: Path, name: str, steps: int) -> str:
    """Submit one training on both nodes; return the job's number."""
    size = ("--nodes", "2", "--gpus_per_node", "0", "--cpus_per_task", "1", "--time", "60", "--notice", "60")
    return submit(folder, steps, "submit", "--name", name, *size, "--trainer.strategy", "ddp")


def state(job: str) -> str:
    """What SLURM says of a job."""
    return re.findall(r"JobState=(\w+)", shell("scontrol", "show", "job", job))[0]


def wait(job: str, *wanted: str) -> str:
    """Wait until a job is in one of some states; a job that was queued again need not wait its usual two minutes."""
    start = time.monotonic()
    while (found := state(job)) not in wanted:
        if found in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") or time.monotonic() - start > PATIENCE:
            raise SystemExit(f"job {job} is {found}, expected {' or '.join(wanted)}")
        if found == "PENDING":
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)
        time.sleep(1)
    return found


def reports(folder: Path, name: str) -> int:
    """How often a run has said how far it is."""
    logs = (folder / "runs" / name).glob("slurm-*.log")
    return sum(log.read_text(errors="replace").count(" steps/s, loss ") for log in logs)


def step(folder: Path, name: str) -> int:
    """Optimiser steps of a run's checkpoint, -1 where it has none yet."""
    path = folder / "runs" / name / "checkpoints" / "last.ckpt"
    return int(torch.load(path, weights_only=True)["global_step"]) if path.exists() else -1


def stop_and_compare(folder: Path, steps: int, chance: random.Random) -> bool:
    """Train twice, once with stops; return whether both came to the same end."""
    wait(submit_training(folder, "whole", steps), "COMPLETED")
    print(f"left alone: {step(folder, 'whole')} steps", flush=True)
    job = submit_training(folder, "stopped", steps)
    stops = list(STOPS)
    while stops:
        wait(job, "RUNNING")
        before = reports(folder, "stopped")
        while state(job) == "RUNNING" and reports(folder, "stopped") == before:  # it is still being imported
            time.sleep(1)
        time.sleep(chance.uniform(0, 20))
        if state(job) != "RUNNING":
            raise SystemExit("the job was done before it was stopped often enough; give more --steps")
        how = stops.pop(0)
        shell("scontrol", "requeue", job) if how == "requeue" else shell("scancel", f"--signal={how}", job)
        print(f"stopped by {how}", flush=True)
        wait(job, "PENDING", "REQUEUED")
        print(f"  saved at step {step(folder, 'stopped')}", flush=True)
    wait(job, "COMPLETED")
    print(f"stopped {len(STOPS)} times: {step(folder, 'stopped')} steps", flush=True)
    whole, stopped = (
        torch.load(folder / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("whole", "stopped")
    )
    parts = ("state_dict", "ema", "optimizer_states")
    pairs = list(zip(*(tree_leaves([content[part] for part in parts]) for content in (whole, stopped)), strict=True))
    different = sum(not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) for a, b in pairs)
    print(f"{len(pairs) - different} of {len(pairs)} weights and optimiser states are equal, bit for bit")
    return not different


def share_sweep(folder: Path) -> bool:
    """Let two jobs share a sweep, preempt one; return whether every trial was completed."""
    lr = {"low": 1e-3, "high": 4e-3, "log": True}
    space = {
        "model.init_args.optimizer": {"choices": ["owl.optim.MuonAdamW"]},
        "model.init_args.optimizer.init_args.lr": lr,
    }
    plan = {"objective": "val/psnr", "direction": "maximize", "trials": TRIALS, "sampler": "random", "space": space}
    (folder / "shared.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    where = ("--executor", "slurm", "--workers", "2", "--gpus_per_worker", "0", "--sbatch", "cpus-per-task=1")
    job = submit(folder, 40, "sweep", "--sweep", folder / "shared.yaml", *where)
    sweep = folder / "runs" / "shared"
    while not (sweep / "trial-0000" / "log.txt").exists():
        time.sleep(1)
    time.sleep(15)  # it trains
    shell("scontrol", "requeue", f"{job}_1")
    print("sweep: one of two jobs preempted", flush=True)
    start = time.monotonic()
    while shell("squeue", "--noheader", "--jobs", job).strip():
        if time.monotonic() - start > PATIENCE:
            raise SystemExit(f"the sweep's jobs {job} come to no end; see {sweep}")
        subprocess.run(["scontrol", "update", f"JobId={job}_1", "StartTime=now"], capture_output=True)
        time.sleep(1)
    (summary,) = re.findall(r"\d+ of \d+ trials: [^.]*", (sweep / "report.md").read_text())
    print(f"sweep: {summary}", flush=True)
    return f"{TRIALS} of {TRIALS} trials: {TRIALS} complete" in summary


def main() -> None:
    """Train, sweep, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for SLURM's state, the footage and the runs; an empty one")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the stops")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # not captured: the daemons keep their parent's output open
    subprocess.run([HERE / "two_node_slurm.sh", "start", folder / "slurm"], check=True)
    try:
        shell(
            *(sys.executable, "-m", "owl", "data", "record", folder / "data", "--frames", "2000"),
            *("--size", "96x160", "--scenario", "deathmatch", "--seed", "0"),
        )
        same = stop_and_compare(folder, options.steps, random.Random(options.seed))
        complete = share_sweep(folder)
    finally:
        subprocess.run([HERE / "two_node_slurm.sh", "stop", folder / "slurm"], check=False)
    sys.exit(not (same and complete))


if __name__ == "__main__":
    main()
