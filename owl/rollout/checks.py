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
    if name not in network.generated:
        raise OwlError(
            "decoder.stream",
            f"there is a decoder for {name}, the world model has {', '.join(network.generated)}; leave it out",
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
    for name, stream in network.streams.items():
        latents, shape = context if name in network.generated else controls.given, [batch, length, *stream.shape]
        if name in network.given and name not in latents:
            continue
        if name not in latents or list(latents[name].shape) != shape:
            found = list(latents[name].shape) if name in latents else "missing"
            raise OwlError(
                "context.shape", f"the context's {name} is {found}, expected {shape} for these controls; correct it"
            )
        if not latents[name].isfinite().all():
            raise OwlError(
                "context.non-finite",
                f"the context's {name} holds NaN or infinite numbers, latents were expected; encode it anew",
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


def check_step(network: WorldTransformer, batch: int, buttons: Tensor, axes: Tensor, given: Streams) -> None:
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
    for name, latent in given.items():
        if name not in network.given:
            raise OwlError(
                "engine.shape",
                f"{name} is given, the world model takes {', '.join(network.given) or 'nothing'} beside the controls; "
                "leave it out",
            )
        expected = [batch, *network.given[name].shape]
        if list(latent.shape) != expected:
            raise OwlError(
                "engine.shape",
                f"the {name} has shape {list(latent.shape)}, expected {expected}: one row for each rollout since "
                "reset, a latent as the world model was trained with; correct it or leave it out",
            )
