"""Freezing a network so thoroughly that nothing can train, average, reduce or save it by accident."""

from functools import partial
from typing import Any, TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def freeze(module: ModuleT) -> ModuleT:
    """Turn a network into a constant, in place: gradients reach its inputs, never its weights.

    Every parameter becomes a non-persistent buffer. Buffers follow ``.to()``, yet optimisers, EMA, DDP's
    gradient reduction and state dicts never see them, so a pretrained part cannot drift and does not bloat
    checkpoints. The module is in eval mode and stays there when a parent calls ``train()``.

    Args:
        module: Any network. Its outputs (in eval mode) do not change.

    Returns:
        The same module.
    """
    module.eval()
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            del part._parameters[name]
            part.register_buffer(name, None if parameter is None else parameter.detach(), persistent=False)
        part._non_persistent_buffers_set.update(part._buffers)
    # A partial rather than a closure: deepcopy and pickle rebind its argument to the copy.
    module.train = partial(_stay_in_eval, module)  # type: ignore[method-assign]
    return module


def _stay_in_eval(module: nn.Module, mode: bool = True) -> Any:
    """What ``train(mode)`` does on a frozen module: nothing."""
    return module
