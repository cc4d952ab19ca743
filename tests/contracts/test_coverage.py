"""Every private name of another library that owl/ uses has a contract, and every contract's name is still used."""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

import owl
import tests.contracts
from tests.contracts.contract import CONTRACTED

PRIVATE = re.compile(r"_[A-Za-z]\w*")
OWN = re.compile(r"(?:\b(?:self|cls)|\bsuper\(\))\.(_[A-Za-z]\w*)|\bdef (_[A-Za-z]\w*)")
DOCUMENTED = {"_exit"}  # os._exit
ROOT = Path(owl.__path__[0])

for module in pkgutil.iter_modules(tests.contracts.__path__, "tests.contracts."):
    if module.name != __name__:
        importlib.import_module(module.name)


def taken_from_others(source: str) -> Iterator[tuple[str, int]]:
    """Private names that a module imports or takes from objects other than its own, with their lines."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Attribute) and not _is_self(node.value):
            names = [node.attr] if node.attr not in own else []
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            names = [str(node.args[1].value)] if isinstance(node.args[1], ast.Constant) else []
        yield from ((name, node.lineno) for name in names if PRIVATE.fullmatch(name) and name not in DOCUMENTED)


def _is_self(node: ast.expr) -> bool:
    """Whether this is ``self``, ``cls`` or ``super()``, which `inherited` looks into."""
    if isinstance(node, ast.Call):
        node = node.func
    return isinstance(node, ast.Name) and node.id in ("self", "cls", "super")


def inherited(kind: type) -> set[str]:
    """Private names that a class uses, replaces or sets, and that it has from a class of another library."""
    used = {name for names in OWN.findall(_source(kind)) for name in names if name}
    others = [base for base in kind.__mro__[1:] if base.__module__.partition(".")[0] not in ("owl", "builtins")]
    return {name for base in others for name in used & {*vars(base), *(n for n, _ in OWN.findall(_source(base)) if n)}}


@cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # written in C
        return ""


@cache
def uses() -> dict[str, str]:
    """Each private name of others that owl/ uses, and where."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        for name, line in taken_from_others(path.read_text("utf-8")):
            found[name] = f"{path.relative_to(ROOT.parent)}:{line}"
    for info in pkgutil.walk_packages(owl.__path__, "owl."):
        if info.name == "owl.__main__":
            continue
        for kind in vars(importlib.import_module(info.name)).values():
            if inspect.isclass(kind) and kind.__module__ == info.name:
                found |= dict.fromkeys(inherited(kind), f"{info.name}.{kind.__qualname__}")
    return found


def test_every_private_use_has_a_contract() -> None:
    missing = [f"{name} ({where})" for name, where in uses().items() if name not in CONTRACTED]
    assert not missing, (
        f"owl/ uses private names of other libraries: {', '.join(missing)}; use a public one, or add a test to "
        "tests/contracts that checks what is relied on"
    )


def test_every_contract_is_needed() -> None:
    sources = "\n".join(path.read_text("utf-8") for path in ROOT.rglob("*.py"))
    gone = [name for name in CONTRACTED if not re.search(rf"\b{re.escape(name)}\b", sources)]
    assert not gone, f"owl/ does not use these any more; remove them from tests/contracts: {gone}"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("trainer._signal_connector.received_sigterm = True", {"_signal_connector"}),
        ("from torch.utils._pytree import tree_leaves", {"_pytree"}),
        ("import torch._inductor.config", {"_inductor"}),
        ("getattr(x, '_local_tensor', x)", {"_local_tensor"}),
        ("self._own = 1; self._own", set()),
        ("def _own(): ...\nmodule._own()", set()),
        ("os._exit(1); x.__len__; _, y = z", set()),
    ],
)
def test_what_the_search_finds(source: str, names: set[str]) -> None:
    assert {name for name, _ in taken_from_others(source)} == names


def test_the_search_looks_into_base_classes() -> None:
    class Own(Timer):
        def _check_time_remaining(self, trainer: Trainer) -> None:
            self._duration = self._own = 2.0

    assert inherited(Own) == {"_check_time_remaining", "_duration"}
