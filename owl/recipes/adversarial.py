"""The two sides of adversarial training, shared by recipes of decoders and of few-step students."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from owl.errors import OwlError
from owl.losses.adversarial import discriminator_loss, generator_loss, logits_and_penalty
from owl.models.discriminators import Discriminator
from owl.nn.frozen import trained
from owl.optim.configuration import parameter_groups, with_schedule
from owl.optim.stepping import ManualStep, only_towards


class TrainsAgainstDiscriminator(LightningModule):
    """Has an optimiser for the network and one for the discriminator, if there is one.

    Attributes:
        network: A decoder, or another generator.
        discriminator: Its opponent, or None.
        optimizer: Called with the network's parameters.
        discriminator_optimizer: Called with those of the discriminator.
        warmup_steps: Steps of linear warm-up of both learning rates; a cosine follows until training ends.
        final_lr: Learning rates at the end, as a fraction of their peaks.
        accumulate: Batches per step.
    """

    network: Any
    discriminator: Any
    optimizer: Callable[[Iterable], Optimizer]
    discriminator_optimizer: Callable[[Iterable], Optimizer]
    warmup_steps: int
    final_lr: float
    accumulate: int = 1

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimisers of the network and of the discriminator, each with warm-up and cosine."""
        optimizers = [self.optimizer(parameter_groups(self.network))]
        if self.discriminator is not None:
            optimizers.append(self.discriminator_optimizer(trained(self.discriminator).values()))
        return [with_schedule(self, each, self.warmup_steps, self.final_lr, self.accumulate) for each in optimizers]

    def step_discriminator(
        self, step: ManualStep, true: Tensor, decoded: Tensor, gamma: float, penalty_every: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Step the discriminator on its relativistic loss, with the penalties at every n-th step.

        Args:
            step: From `owl.optim.stepping.manual_step`.
            true: See `judge`.
            decoded: The same shape; no gradient reaches the network.
            gamma: Weight of the penalties.
            penalty_every: n.

        Returns:
            Logits of the true and of the decoded side, without gradient, and scalars to log.
        """
        real, fake, penalties = judge(self.discriminator, true, decoded, gamma > 0 and step.due(penalty_every))
        loss = discriminator_loss(real, fake)
        step(self.trainer.optimizers[1], penalised(loss, penalties, gamma, penalty_every))
        real, fake = real.detach(), fake.detach()
        balance = {"accuracy": (real > fake).float().mean(), "logit_gap": (real - fake).mean()}
        return real, fake, {"discriminator": loss} | penalties | balance


def ramped(number: int, start: int, steps: int) -> float:
    """Return the share of its full weight that an adversarial term has at a step.

    Args:
        number: The step, from 0.
        start: Steps before the term has any weight.
        steps: Steps in which it then grows linearly to its full weight.
    """
    return min(1.0, max(0.0, (number + 1 - start) / max(1, steps)))


def judge(
    discriminator: Discriminator, true: Tensor, decoded: Tensor, penalised: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Compute the logits of both sides and, at some steps, the penalties of their gradients.

    Args:
        discriminator: The network that is trained on the result.
        true: Pictures, float[B, T, 3, H, W] in [-1, 1], or latents, float[B, T, c, h, w].
        decoded: The same shape; no gradient reaches the decoder.
        penalised: Whether R1 and R2 are computed.

    Returns:
        Logits of the true and of the decoded side, and the penalties by name, ``r1`` and ``r2``, or none.
    """
    sides = discriminator.sides(true, decoded.detach())
    if not penalised:
        real, fake = (discriminator(side) for side in sides)
        return real, fake, {}
    (real, r1), (fake, r2) = (logits_and_penalty(discriminator, side) for side in sides)
    return real, fake, {"r1": r1, "r2": r2}


def penalised(loss: Tensor, penalties: dict[str, Tensor], gamma: float, every: int) -> Tensor:
    """Add gamma / 2 (R1 + R2) to the loss of a discriminator, n times as strong if it is added at every n-th step.

    Args:
        loss: A scalar, see `owl.losses.adversarial.discriminator_loss`.
        penalties: From `judge`; none: the loss is returned.
        gamma: Weight of the penalties.
        every: n.
    """
    return loss + every * gamma / 2 * (penalties["r1"] + penalties["r2"]) if penalties else loss


def refuse_penalties(gamma: float, option: str) -> None:
    """Refuse gradient penalties under FSDP2.

    Args:
        gamma: Their weight.
        option: Its place in the configuration.

    Raises:
        OwlError: The weight is not 0.
    """
    if gamma:
        raise OwlError(
            "trainer.strategy",
            f"gamma is {gamma}, but FSDP2 frees weights that the second derivative of R1 and R2 needs; set "
            f"trainer.strategy to ddp, or {option} to 0",
        )


def adversarial_loss(discriminator: Discriminator, true: Tensor, decoded: Tensor, real_logits: Tensor) -> Tensor:
    """Compute the adversarial loss of a decoder, whose gradient reaches ``decoded`` only.

    Args:
        discriminator: The network that judges; it gets no gradient.
        true: See `judge`.
        decoded: The same shape.
        real_logits: Logits of the true side, from `judge`, without gradient; not used by a paired discriminator, whose
            true side depends on ``decoded``.

    Returns:
        A scalar, see `owl.losses.adversarial.generator_loss`.
    """

    def loss(decoded: Tensor) -> Tensor:
        real_side, fake_side = discriminator.sides(true, decoded)
        real = discriminator(real_side) if discriminator.paired else real_logits
        return generator_loss(discriminator(fake_side), real)

    return only_towards(decoded, loss)
