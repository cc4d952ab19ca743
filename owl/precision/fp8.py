"""Lightning plugin for training with linear layers in float8 (torchao) and everything else in bfloat16.

The factors of each of a layer's three matrix products (output, gradient of the input, gradient of the weight) are in
eight bits, scaled by their largest value: GPUs multiply these about twice as fast as bfloat16. Weights, gradients,
optimiser states and checkpoints are unchanged. Convolutions have no float8 kernels and stay in bfloat16.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, NoReturn, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from owl.errors import OwlError
from owl.hardware import fast_dtype, multiplies_bfloat16
from owl.precision import backend
from owl.precision.probe import MULTIPLE, describe, fault, fits

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]


class Float8Precision(MixedPrecision):
    """Run the recipe's linear layers in float8 and the rest in bfloat16 autocast.

    Every trained ``nn.Linear`` is converted whose name does not match ``skip`` and whose input and output channels are
    multiples of 16. The number of tokens per layer in training must also be a multiple of 16, except with
    ``rowwise_with_gw_hp``. At the start, the recipes are tested on the device, and two lines are printed with the
    selected recipe, the reason and the converted layers. An unsupported recipe is an error; there is no fallback. On
    CPUs where bfloat16 is slow, everything else is in float32.

    Layers are replaced when the strategy sets up the recipe; with ``fsdp2`` before the recipe shards its network.
    ``torch.compile`` can be called before, since it traces at the first call.

    Args:
        recipe: Granularity of the scales: "tensorwise" one per tensor; "rowwise" one per row, which is more accurate
            and slower; "rowwise_with_gw_hp" also keeps the gradient of the weights in bfloat16.
        emulate: Whether to round to float8 and multiply in float32: the values of a GPU on devices without float8,
            slower than training without float8.
        skip: Patterns (``*`` matches any text) of the names of layers that stay in bfloat16, as in checkpoints:
            ``network.blocks.0.*``.
        float8_all_gather: Whether FSDP2 also gathers weights in float8: half the traffic. Only with "tensorwise".

    Raises:
        OwlError: torchao is missing, or the settings are invalid.
    """

    def __init__(
        self,
        recipe: Recipe = "tensorwise",
        emulate: bool = False,
        skip: list[str] = [],  # noqa: B006  (never changed; a list is what YAML gives)
        float8_all_gather: bool = False,
    ) -> None:
        super().__init__("bf16-mixed", "cpu")  # the device is not known before the trainer
        backend.require()
        if recipe not in get_args(Recipe):
            raise OwlError("fp8.recipe", f'recipe is "{recipe}", expected {", ".join(get_args(Recipe))}; correct it')
        if float8_all_gather and recipe != "tensorwise":
            raise OwlError(
                "fp8.all-gather",
                f"float8_all_gather requires the recipe tensorwise, found {recipe}; change one of them",
            )
        self.recipe, self.emulate, self.skip, self.float8_all_gather = recipe, emulate, list(skip), float8_all_gather
        self._gathered: list[Any] = []

    def convert_module(self, module: LightningModule) -> LightningModule:  # type: ignore[override]
        """Convert a recipe's layers in place; the trainer calls this before the module moves to its device.

        Raises:
            OwlError: The device does not support the recipe, no layer can be converted, or the network is sharded.
        """
        trainer = module.trainer
        device = trainer.strategy.root_device
        self.device = device.type
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False  # torchao's tensors support no_grad, but not inference mode
        if float8_layers(module):
            return module
        if self.float8_all_gather and not isinstance(trainer.strategy, ModelParallelStrategy):
            raise OwlError(
                "fp8.all-gather",
                f"float8_all_gather requires FSDP2, found the strategy {type(trainer.strategy).__name__}; set "
                "trainer.strategy to fsdp2 or float8_all_gather to false",
            )
        reason = why(self.recipe, self.emulate, device)
        layers = convert(module, self.recipe, self.emulate, self.skip, self.float8_all_gather)
        if trainer.is_global_zero:
            others = str(fast_dtype(device)).removeprefix("torch.")
            print(f"float8: {reason}; all else in {others}\nfloat8: {layers}", flush=True)
        return module

    def autocast_context_manager(self) -> torch.autocast:
        """Return autocast to bfloat16, or float32 on devices where bfloat16 is slow."""
        fast = multiplies_bfloat16(self.device)
        return torch.autocast(self.device, torch.bfloat16, enabled=fast, cache_enabled=False)

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Check that the weights are sharded for `float8_all_gather`, after the strategy has set up the recipe.

        Raises:
            OwlError: They are not.
        """
        if self.float8_all_gather and not all(isinstance(layer.weight, DTensor) for layer in float8_layers(model)):
            raise OwlError(
                "fp8.all-gather",
                f"float8_all_gather requires recipes that shard their network in configure_model, found that "
                f"{type(model).__name__} does not; set float8_all_gather to false",
            )
        return super().connect(model, optimizers, lr_schedulers)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Step, then compute the scales of all weights with one reduction instead of one per layer."""
        result = super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        if self.float8_all_gather:
            backend.load("torchao.float8").precompute_float8_dynamic_scale_for_fsdp(model)
            # layers have their sharded weights here, but not always when the scales are discarded
            self._gathered = [layer.weight._local_tensor for layer in float8_layers(model)]
        return result

    @contextlib.contextmanager
    def val_step_context(self) -> Generator[None, None, None]:
        """Discard the precomputed scales, since the validated weights can be the average."""
        for weight in self._gathered:
            weight._precomputed_scale = None
        with super().val_step_context():
            yield


def float8_layers(module: nn.Module) -> list[Any]:
    """Return all layers that train in float8."""
    kind = backend.load("torchao.float8.float8_linear").Float8Linear
    return [layer for layer in module.modules() if isinstance(layer, kind)]


def convert(module: nn.Module, recipe: Recipe, emulate: bool, skip: list[str], all_gather: bool) -> str:
    """Convert the linear layers of a module in place; names in ``state_dict`` stay.

    Args:
        module: Not yet sharded, on any device.
        recipe: See `Float8Precision`.
        emulate: See `Float8Precision`.
        skip: See `Float8Precision`.
        all_gather: See `Float8Precision`.

    Returns:
        Description of the converted layers and the others.

    Raises:
        OwlError: No layer can be converted, a pattern matches no layer, or the module is sharded.
    """
    linear = {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
    }
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise OwlError(
                "fp8.skip",
                f"the pattern {pattern} of skip matches no trained linear layer, found {', '.join(shorten(linear))}; "
                "correct or remove it",
            )
    skipped = [name for name in linear if any(fnmatchcase(name, pattern) for pattern in skip)]
    unfit = [name for name, layer in linear.items() if name not in skipped and not fits(layer)]
    chosen = [name for name in linear if name not in skipped and name not in unfit]
    if not chosen:
        raise OwlError(
            "fp8.layers",
            f"{type(module).__name__} has {len(linear)} trained linear layers, {len(skipped)} of them skipped and "
            f"{len(unfit)} of sizes that are no multiples of {MULTIPLE}, expected at least one to "
            "convert to float8; set trainer.precision to bf16-mixed instead of the plugin",
        )
    if any(isinstance(linear[name].weight, DTensor) for name in chosen):
        raise OwlError(
            "fp8.sharded",
            f"{type(module).__name__} was sharded before it was converted to float8, expected the other "
            "order; set trainer.strategy to fsdp2, which uses it",
        )
    settings = replace(configuration(recipe, emulate), enable_fsdp_float8_all_gather=all_gather)
    backend.load("torchao.float8").convert_to_float8_training(
        module, config=settings, module_filter_fn=lambda layer, name: name in chosen
    )
    for name in chosen:
        module.get_submodule(name).register_forward_pre_hook(partial(receive, name, recipe))
    kept = [
        f"{', '.join(shorten(names))} by {cause}" for names, cause in ((skipped, "name"), (unfit, "shape")) if names
    ]
    return (
        f"{len(chosen)} of {len(linear)} linear layers: {', '.join(shorten(chosen))}; not converted: "
        f"{''.join(f'{text}; ' for text in kept)}everything that is no linear layer"
    )


def receive(name: str, recipe: Recipe, layer: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    """Check the number of input tokens of a layer, and cast them to the dtype of autocast.

    Raises:
        OwlError: The gradient of its weight could not be computed on a GPU.
    """
    (x,) = arguments
    tokens = x.numel() // x.shape[-1]
    if tokens % MULTIPLE and recipe != "rowwise_with_gw_hp" and torch.is_grad_enabled():
        _refuse_tokens(name, recipe, x.shape[:-1])
    kind = x.device.type
    # torchao does this on CUDA only
    return (x.to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else (x,)


@torch.compiler.disable  # in compiled code, PyTorch 2.11 cannot raise an exception of another library
def _refuse_tokens(name: str, recipe: Recipe, tokens: torch.Size) -> NoReturn:
    raise OwlError(
        "fp8.multiple",
        f"{name} got {' x '.join(map(str, tokens))} tokens, float8 ({recipe}) expects a multiple of {MULTIPLE}; change "
        "the batch size or the clips' length, or add the layer to skip",
    )


def configuration(recipe: Recipe, emulate: bool) -> Any:
    """Return torchao's ``Float8LinearConfig`` for a recipe."""
    return replace(backend.load("torchao.float8").Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)


def why(recipe: Recipe, emulate: bool, device: torch.device) -> str:
    """Describe why a recipe can be used on a device.

    Raises:
        OwlError: The device does not support it.
    """
    here = describe(device)
    if emulate:
        return f"{recipe}, emulated on {here}: right numbers, slowly"
    faults = {name: probe(name, device) for name in get_args(Recipe)}
    running = [name for name, fault in faults.items() if fault is None]
    if faults[recipe] is not None:
        advice = (
            f"set the plugin's recipe to {' or '.join(running)}, which is supported"
            if running
            else "no recipe is supported: set trainer.precision to bf16-mixed instead of the plugin, or emulate to true"
        )
        raise OwlError(
            "fp8.device", f"float8 ({recipe}) was expected to run on {here}, found: {faults[recipe]}; {advice}"
        )
    others = [f"{name} does not ({fault})" for name, fault in faults.items() if fault is not None]
    return (
        f"{recipe}, as configured; tried on {here}: {', '.join(running)} run{''.join(f', {text}' for text in others)}"
    )


def probe(recipe: Recipe, device: torch.device) -> str | None:
    """Train a small layer; return a description of the failure, or None."""
    settings = configuration(recipe, emulate=False)
    library = backend.load("torchao.float8")
    return fault(lambda layer: library.convert_to_float8_training(layer, config=settings), device, train=True)


def shorten(names: Iterable[str]) -> list[str]:
    """Merge names of layers that differ in a number: ``blocks.*.qkv (6)``."""
    counted = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    return [f"{name} ({count})" if "*" in name else name for name, count in counted.items()]
