"""A plan of a sweep with a space, and its study."""

from pathlib import Path
from typing import Any

from owl.cli.mistakes import Setting, build, placed
from owl.sweep.plan import Plan
from owl.sweep.study import SweepStudy, open_storage

OPTIMIZER = "model.init_args.optimizer"
LR = f"{OPTIMIZER}.init_args.lr"
RATIO = f"{OPTIMIZER}.init_args.muon_ratio"
MUON, ADAMW = "owl.optim.MuonAdamW", "torch.optim.AdamW"
SPACE: dict[str, Any] = {
    OPTIMIZER: {"choices": [ADAMW, MUON]},
    LR: {"low": "1e-4", "high": 0.1, "log": True},  # YAML reads 1e-4 as text
    RATIO: {"low": 0.5, "high": 2.0, "when": {OPTIMIZER: MUON}},
}
SWEEP: dict[str, Any] = {"objective": "val/psnr", "direction": "maximize", "trials": 4, "space": SPACE}


def plan_of(**changes: Any) -> Plan:
    content = placed({"name": "tried", **SWEEP, **changes}, "tried.yaml", Path())
    return build(Plan, Setting("tried.yaml", content.value))


def url_of(folder: Path, plan: Plan) -> str:
    """URL of the study of a plan, below a folder of runs."""
    (folder / plan.name).mkdir(parents=True, exist_ok=True)
    return plan.storage or f"sqlite:///{folder / plan.name / 'sweep.db'}"


def load_study(folder: Path, plan: Plan) -> SweepStudy:
    """The study of a plan, as loaded by one worker."""
    return SweepStudy.load_or_create(open_storage(url_of(folder, plan)), plan, ["a.yaml"])


def silence(sweep: SweepStudy, number: int, seconds: int) -> None:
    """Set the last heartbeat of a trial to some time ago."""
    statement = "UPDATE trial_heartbeats SET heartbeat = datetime('now', ?) WHERE trial_id = ?"
    values = (f"-{seconds} seconds", sweep.trial_id(number))
    with sweep.storage.engine.begin() as connection:
        connection.exec_driver_sql(statement, values)
