"""A plan of a sweep with a space, and its study."""

from pathlib import Path
from typing import Any

from owl.sweep.plan import Plan
from owl.sweep.reading import parse_plan
from owl.sweep.study import SweepStudy, open_storage, storage_address

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
    return parse_plan({**SWEEP, **changes}, "tried", None)


def begin(folder: Path, plan: Plan) -> SweepStudy:
    """A study in a journal below a folder of runs."""
    return SweepStudy.begin(open_storage(storage_address(plan, folder / plan.name)), plan, ["a.yaml"], lambda: None)
