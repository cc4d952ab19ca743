"""A sweep with two workers against the same sweep with one: trials per minute.

    python -m benchmarks.sweep [--trials 12] [--steps 60] [--workers 2]

Trials are short, single-threaded runs of a small autoencoder on a small dataset, each a process of its own as always;
most of such a trial is starting Python and importing torch. The baseline works on one trial at a time. To reach: 1.8
times as many with two workers on two otherwise idle cores.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.helpers.lab import make_lab
from tests.helpers.tiny import REPOSITORY

TARGET = 1.8
SWEEP = {
    "objective": "val/psnr",
    "direction": "maximize",
    "sampler": "random",
    "space": {"model.init_args.optimizer.init_args.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
}


def trials_per_minute(lab: Path, workers: int, trials: int, steps: int) -> float:
    """Run a sweep and return how fast its trials were, without the seconds before the first and after the last."""
    name = f"with-{workers}"
    optimizer = {"model.init_args.optimizer": {"choices": ["torch.optim.AdamW"]}}
    content = {**SWEEP, "trials": trials, "space": {**optimizer, **SWEEP["space"]}}
    (lab / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, "-m", "owl", "sweep", "--config", "tiny.yaml", "--sweep", f"{name}.yaml"]
    command += ["--workers", str(workers), "--threads_per_trial", "1", "--trainer.max_steps", str(steps)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    begin = end = None
    with subprocess.Popen(command, cwd=lab, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if begin is None and re.match(r"trial \d+ starts", line):
                begin = time.perf_counter()
            if re.match(r"trial \d+ done", line):
                end = time.perf_counter()
    if process.returncode or begin is None or end is None:
        raise SystemExit(f"the sweep ended with status {process.returncode}")
    return trials / (end - begin) * 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lab = make_lab(Path(folder))
        one, several = (trials_per_minute(lab, n, options.trials, options.steps) for n in (1, options.workers))
    print(f"{options.trials} trials of {options.steps} steps, one thread each")
    print(f"  1 worker   {one:5.1f} trials/minute")
    print(
        f"  {options.workers} workers  {several:5.1f} trials/minute   {several / one:4.2f}x, {TARGET} is to be reached"
    )


if __name__ == "__main__":
    main()
