"""What is refused before a rollout begins or goes on, in one sentence each."""

from pathlib import Path

from torch import Tensor, nn

from owl import latents
from owl.errors import OwlError
from owl.models.world_model import Controls, Streams, WorldTransformer


def as_world_model(network: nn.Module, path: str | Path) -> WorldTransformer:
    """What was loaded from a file, where it is a world model.

    Raises:
        OwlError: It is something else.
    """
    if not isinstance(network, WorldTransformer):
        raise OwlError(
            "network.kind",
            f"{path} holds a {type(network).__qualname__}, a world model was expected; give a checkpoint of the recipe "
            "owl.recipes.world_model.WorldModel or its export",
        )
    return network


def check_decoder(network: WorldTransformer, name: str, decoder: nn.Module) -> None:
    """Refuse a decoder of what a world model does not generate (`owl.latents.check_decoder`).

    Raises:
        OwlError: It is one, or does not say what it decodes.
    """
    if name not in network.streams:
        raise OwlError(
            "decoder.stream",
            f"there is a decoder for {name}, the world model has {', '.join(network.streams)}; leave it out",
        )
    latents.check_decoder(network, name, decoder)


def check_context(network: WorldTransformer, context: Streams, controls: Controls) -> int:
    """Return the batch size of a valid context.

    Raises:
        OwlError: Context and controls do not fit each other or the world model, or hold no frame or no numbers.
    """
    batch, length = controls.buttons.shape[:2]
    if length == 0:
        raise OwlError(
            "context.empty",
            "the context holds 0 frames, at least one was expected; give some, or None to begin from nothing",
        )
    expected: dict[str, tuple[int, ...]] = {name: (batch, length, *s) for name, s in network.streams.items()}
    for name, shape in expected.items():
        if name not in context or tuple(context[name].shape) != shape:
            found = list(context[name].shape) if name in context else "missing"
            raise OwlError(
                "context.shape",
                f"the context's {name} is {found}, expected {list(shape)} for these controls; correct it",
            )
        if not context[name].isfinite().all():
            raise OwlError(
                "context.non-finite",
                f"the context's {name} holds NaN or infinite numbers, latents were expected; encode it anew",
            )
    scene, size = controls.conditioning, (batch, length, network.conditioning_channels, *network.streams["video"][1:])
    if scene is not None and tuple(scene.shape) != size:
        raise OwlError(
            "context.shape", f"the context's conditioning is {list(scene.shape)}, expected {list(size)}; correct it"
        )
    for kind, values, names in (
        ("buttons", controls.buttons, network.buttons),
        ("axes", controls.axes, network.axes),
    ):
        if tuple(values.shape) != (batch, length, len(names)):
            raise OwlError(
                "context.shape",
                f"the context's {kind} are {list(values.shape)}, expected {[batch, length, len(names)]}: one column "
                f"for each of {', '.join(names) or 'no ' + kind}",
            )
    return int(batch)


def check_step(
    network: WorldTransformer, batch: int, buttons: Tensor, axes: Tensor, conditioning: Tensor | None
) -> None:
    """Refuse what is given for a frame where it is of another batch or another world model.

    Raises:
        OwlError: It is.
    """
    for kind, values, names in (("buttons", buttons, network.buttons), ("axes", axes, network.axes)):
        if tuple(values.shape) != (batch, len(names)):
            raise OwlError(
                "engine.shape",
                f"{kind} have shape {list(values.shape)}, expected {[batch, len(names)]}: one row for each "
                f"rollout since reset, one column for each of {', '.join(names) or 'no ' + kind}",
            )
    expected = [batch, network.conditioning_channels, *network.streams["video"][1:]]
    if conditioning is not None and list(conditioning.shape) != expected:
        raise OwlError(
            "engine.shape",
            f"the conditioning has shape {list(conditioning.shape)}, expected {expected}: one row for each rollout "
            "since reset, the channels that the world model was trained with; correct it or leave it out",
        )
