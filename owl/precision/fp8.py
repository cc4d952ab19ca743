"""Training with linear layers in float8 (torchao), all else in bfloat16, as a Lightning plugin.

Each of a layer's three matrix products (output, gradient of the input, gradient of the weight) takes its factors in
eight bits, scaled by their largest value: GPUs multiply these about twice as fast as bfloat16. Weights, gradients and
optimiser states stay what they were, so checkpoints do too. Convolutions have no float8 kernels and stay in bfloat16.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, get_args

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
    """Runs the recipe's linear layers in float8 and the rest under bfloat16 autocast.

    Converted is every trained ``nn.Linear`` whose name is not in ``skip`` and whose input and output channels are
    multiples of 16. The number of tokens that a layer gets in training must be one too, except with
    ``rowwise_with_gw_hp``. At start-up it is tried what runs on the device, and two lines say what was chosen, why, and
    for which layers; what does not run is refused, never replaced by something else. On CPUs that multiply bfloat16
    slowly, all else is in float32.

    The layers are swapped when the strategy sets the recipe up, with ``fsdp2`` before the recipe
    spreads its network. ``torch.compile`` may come before, since it traces at the first call.

    Args:
        recipe: What shares one scale: "tensorwise" a whole tensor, "rowwise" a row, which is finer and slower;
            "rowwise_with_gw_hp" leaves the gradient of the weights in bfloat16 besides.
        emulate: Whether to round to float8 and multiply in float32: the numbers of a GPU on machines without float8,
            slower than doing without.
        skip: Patterns (``*`` is any text) of the names of layers that stay in bfloat16, as in checkpoints:
            ``network.blocks.0.*``.
        float8_all_gather: Whether FSDP2 gathers weights in float8 too: half the traffic. Only with "tensorwise".

    Raises:
        OwlError: torchao is missing, or the settings make no sense.
    """

    def __init__(
        self,
        recipe: Recipe = "tensorwise",
        emulate: bool = False,
        skip: list[str] = [],  # noqa: B006  (never changed; a list is what YAML gives)
        float8_all_gather: bool = False,
    ) -> None:
        super().__init__("bf16-mixed", "cpu")  # the device is known when the trainer is
        backend.require()
        if recipe not in get_args(Recipe):
            raise OwlError("fp8.recipe", f'recipe is "{recipe}", expected {", ".join(get_args(Recipe))}; correct it')
        if float8_all_gather and recipe != "tensorwise":
            raise OwlError(
                "fp8.all-gather", f"float8_all_gather is for the recipe tensorwise, found {recipe}; change one of them"
            )
        self.recipe, self.emulate, self.skip, self.float8_all_gather = recipe, emulate, list(skip), float8_all_gather
        self._gathered: list[Any] = []

    def convert_module(self, module: LightningModule) -> LightningModule:  # type: ignore[override]
        """Convert a recipe's layers in place; the trainer calls it before the module moves to its device.

        Raises:
            OwlError: The device does not run the recipe, no layer can be converted, or it is too late for that.
        """
        trainer = module.trainer
        device = trainer.strategy.root_device
        self.device = device.type
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False  # torchao's tensors bear no_grad, which takes its place, but not that
        if float8_layers(module):
            return module
        if self.float8_all_gather and not isinstance(trainer.strategy, ModelParallelStrategy):
            raise OwlError(
                "fp8.all-gather",
                f"float8_all_gather is for FSDP2, found the strategy {type(trainer.strategy).__name__}; set "
                "trainer.strategy to fsdp2 or float8_all_gather to false",
            )
        reason = why(self.recipe, self.emulate, device)
        layers = convert(module, self.recipe, self.emulate, self.skip, self.float8_all_gather)
        if trainer.is_global_zero:
            others = str(fast_dtype(device)).removeprefix("torch.")
            print(f"float8: {reason}; all else in {others}\nfloat8: {layers}", flush=True)
        return module

    def autocast_context_manager(self) -> torch.autocast:
        """bfloat16, but for devices that do not multiply it fast: on such CPUs all that is not float8 is float32."""
        fast = multiplies_bfloat16(self.device)
        return torch.autocast(self.device, torch.bfloat16, enabled=fast, cache_enabled=False)

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Check that weights that are to be gathered have been sharded, when the strategy is done with the recipe.

        Raises:
            OwlError: They have not.
        """
        if self.float8_all_gather and not all(isinstance(layer.weight, DTensor) for layer in float8_layers(model)):
            raise OwlError(
                "fp8.all-gather",
                f"float8_all_gather is for recipes that shard their network in configure_model, found that "
                f"{type(model).__name__} does not; set float8_all_gather to false",
            )
        return super().connect(model, optimizers, lr_schedulers)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Step; then find the scales of all weights with one reduction instead of one for each layer."""
        result = super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        if self.float8_all_gather:
            backend.load("torchao.float8").precompute_float8_dynamic_scale_for_fsdp(model)
            # layers hold their sharded weights now, but not whenever the scales have to be forgotten
            self._gathered = [layer.weight._local_tensor for layer in float8_layers(model)]
        return result

    @contextlib.contextmanager
    def val_step_context(self) -> Generator[None, None, None]:
        """Forget these scales: what is validated may be other weights, the average."""
        for weight in self._gathered:
            weight._precomputed_scale = None
        with super().val_step_context():
            yield


def float8_layers(module: nn.Module) -> list[Any]:
    """All layers that train in float8."""
    kind = backend.load("torchao.float8.float8_linear").Float8Linear
    return [layer for layer in module.modules() if isinstance(layer, kind)]


def convert(module: nn.Module, recipe: Recipe, emulate: bool, skip: list[str], all_gather: bool) -> str:
    """Convert the linear layers of a module in place; names in ``state_dict`` stay.

    Args:
        module: Not sharded yet; it may be on any device.
        recipe: See `Float8Precision`, as for the rest.
        emulate: See there.
        skip: See there.
        all_gather: See there.

    Returns:
        Which layers are float8 and which are not.

    Raises:
        OwlError: Nothing can be converted, a pattern fits no layer, or the module is sharded.
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
                f"the pattern {pattern} of skip fits no trained linear layer, found {', '.join(shorten(linear))}; "
                "correct or remove it",
            )
    skipped = [name for name in linear if any(fnmatchcase(name, pattern) for pattern in skip)]
    unfit = [name for name, layer in linear.items() if name not in skipped and not fits(layer)]
    chosen = [name for name in linear if name not in skipped and name not in unfit]
    if not chosen:
        raise OwlError(
            "fp8.layers",
            f"{type(module).__name__} has {len(linear)} trained linear layers, {len(skipped)} of them skipped and "
            f"{len(unfit)} of sizes that are no multiples of {MULTIPLE}, at least one to convert to float8 was "
            "expected; set trainer.precision to bf16-mixed instead of the plugin",
        )
    if any(isinstance(linear[name].weight, DTensor) for name in chosen):
        raise OwlError(
            "fp8.sharded",
            f"{type(module).__name__} was spread over processes before it was converted to float8, the other order was "
            "expected; set trainer.strategy to fsdp2, which keeps it",
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
    """Check the number of tokens that a layer is given, and bring them to the dtype of autocast.

    Raises:
        OwlError: The gradient of its weight could not be computed on a GPU.
    """
    (x,) = arguments
    tokens = x.numel() // x.shape[-1]
    if tokens % MULTIPLE and recipe != "rowwise_with_gw_hp" and torch.is_grad_enabled():
        raise OwlError(
            "fp8.multiple",
            f"{name} got {' x '.join(map(str, x.shape[:-1]))} tokens, float8 ({recipe}) expects a multiple of "
            f"{MULTIPLE}; change the batch size or the clips' length, or add the layer to skip",
        )
    kind = x.device.type
    # torchao does that on CUDA alone
    return (x.to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else (x,)


def configuration(recipe: Recipe, emulate: bool) -> Any:
    """torchao's ``Float8LinearConfig`` for a recipe."""
    return replace(backend.load("torchao.float8").Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)


def why(recipe: Recipe, emulate: bool, device: torch.device) -> str:
    """Say why a recipe can be used on a device.

    Raises:
        OwlError: It cannot.
    """
    here = describe(device)
    if emulate:
        return f"{recipe}, emulated on {here}: right numbers, slowly"
    faults = {name: probe(name, device) for name in get_args(Recipe)}
    running = [name for name, told in faults.items() if told is None]
    if faults[recipe] is not None:
        advice = (
            f"set the plugin's recipe to {' or '.join(running)}, which does run"
            if running
            else "no recipe does, so set trainer.precision to bf16-mixed instead of the plugin, or its emulate to true"
        )
        raise OwlError(
            "fp8.device", f"float8 ({recipe}) was expected to run on {here}, found: {faults[recipe]}; {advice}"
        )
    others = [f"{name} does not ({told})" for name, told in faults.items() if told is not None]
    return (
        f"{recipe}, as configured; tried on {here}: {', '.join(running)} run{''.join(f', {text}' for text in others)}"
    )


def probe(recipe: Recipe, device: torch.device) -> str | None:
    """Train a small layer; return what went wrong, None if nothing did."""
    settings = configuration(recipe, emulate=False)
    library = backend.load("torchao.float8")
    return fault(lambda layer: library.convert_to_float8_training(layer, config=settings), device, train=True)


def shorten(names: Iterable[str]) -> list[str]:
    """Names of layers, those that differ in a number as one: ``blocks.*.qkv (6)``."""
    counted = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    return [f"{name} ({count})" if "*" in name else name for name, count in counted.items()]
