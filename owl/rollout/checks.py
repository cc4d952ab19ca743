"""Checks of the inputs of a rollout."""

from torch import Tensor, nn

from owl import latents
from owl.errors import OwlError
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.rollout.generate import Schedule


def check_decoder(network: WorldTransformer, name: str, decoder: nn.Module) -> None:
    """Check that a decoder decodes a stream of a world model (`owl.latents.check_decoder`).

    Raises:
        OwlError: It does not, or does not identify its latents.
    """
    if name not in network.generated:
        raise OwlError(
            "decoder.stream",
            f"there is a decoder for {name}, the world model has {', '.join(network.generated)}; leave it out",
        )
    latents.check_decoder(network, name, decoder)


def check_guidance(network: WorldTransformer, schedule: Schedule) -> None:
    """Check that a world model was trained for the guidance of a schedule.

    Raises:
        OwlError: There is inner guidance, but no stream was hidden in training.
    """
    if schedule.inner_guidance != 0 and not any(stream.dropout > 0 for stream in network.generated.values()):
        raise OwlError(
            "engine.guidance",
            f"inner_guidance is {schedule.inner_guidance:g}, but no stream of {', '.join(network.generated)} has "
            "dropout, so that none was ever hidden in training; set it to 0, or train with dropout of a stream",
        )


def check_context(network: WorldTransformer, context: Streams, controls: Controls) -> int:
    """Check a context and return its batch size.

    Raises:
        OwlError: Context and controls do not match each other or the world model, or contain no frame, NaN or infinity.
    """
    batch, length = controls.buttons.shape[:2]
    if length == 0:
        raise OwlError(
            "context.empty",
            "the context has 0 frames, expected at least one; give some, or None for no context",
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
                f"the context's {name} contains NaN or infinite values, expected finite latents; encode it again",
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
    """Check that the inputs of a frame match the batch size and the world model.

    Raises:
        OwlError: They do not.
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
