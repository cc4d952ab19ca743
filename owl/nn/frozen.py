"""Frozen parts: parameters without gradients that are not trained, averaged or saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_WHOLE: ContextVar[bool] = ContextVar("whole", default=False)


def freeze(module: ModuleT) -> ModuleT:
    """Freeze a network in place: gradients reach its inputs, but not its weights.

    Its parameters remain parameters with ``requires_grad=False``: they follow ``.to()``, FSDP2 shards them, DDP does
    not reduce them, and `trained` excludes them. The module is in eval mode and stays there when a parent calls
    ``train()``.

    State dicts, and therefore checkpoints, exclude the module. A state dict without it can be loaded strictly and
    leaves it unchanged, so the caller must load its weights at every start. A state dict with it, such as that of an
    export, is loaded as usual.

    Args:
        module: Any network. Its outputs (in eval mode) do not change.

    Returns:
        The same module.
    """
    module.eval().requires_grad_(False)
    module.register_state_dict_post_hook(_leave_out)
    module.register_load_state_dict_pre_hook(_keep)
    # A partial rather than a closure: deepcopy and pickle rebind its argument to the copy.
    module.train = partial(_stay_in_eval, module)  # type: ignore[method-assign]
    return module


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, for optimisers, EMA, checks and reports."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@contextmanager
def whole_state_dicts() -> Iterator[None]:
    """Include frozen parts in state dicts, for self-contained exports and copies."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def completed(module: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with the weights of the frozen parts that it lacks, as a strict load completes it."""
    whole = dict(state_dict)
    for name, part in module.named_modules(remove_duplicate=False):
        if getattr(vars(part).get("train"), "func", None) is _stay_in_eval:
            _keep(part, whole, f"{name}." if name else "")
    return whole


def _leave_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Remove a frozen module from a state dict."""
    if not _WHOLE.get():
        for name in [name for name in state_dict if name.startswith(prefix)]:
            del state_dict[name]


def _keep(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Complete a state dict that lacks a frozen module with the module's weights."""
    if not any(name.startswith(prefix) for name in state_dict):
        with whole_state_dicts():
            state_dict.update(module.state_dict(prefix=prefix, keep_vars=True))


def _stay_in_eval(module: nn.Module, mode: bool = True) -> Any:
    """Replace ``train(mode)`` of a frozen module by a no-op."""
    return module
