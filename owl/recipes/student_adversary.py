"""A discriminator that compares a student's frames with those of the dataset, beside or instead of its teacher."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from owl import models
from owl.errors import OwlError, at_least
from owl.losses.adversarial import discriminator_loss
from owl.models.discriminators import Discriminator
from owl.models.image_decoder import decode_clips
from owl.models.world_model import WorldTransformer
from owl.nn.frozen import freeze
from owl.recipes.adversarial import adversarial_loss, judge, penalised, ramped
from owl.rollout.checks import check_decoder
from owl.rollout.episodes import load_decoder


def adversary_adamw(parameters: Iterable) -> Optimizer:
    """Return the discriminator's default optimiser."""
    return AdamW(parameters, lr=2e-4, betas=(0.0, 0.99), weight_decay=0.0)


class Adversary(nn.Module):
    """The relativistic loss of R3GAN (`owl.losses.adversarial`) for a student's video.

    The generated frames are compared with the frames of the same episode under the same controls: their latents or,
    with a decoder, both decoded. The discriminator is trained at every step and the student, whose gradient flows
    through the decoder, at its own.

    Args:
        discriminator: Distinguishes true and generated frames, or runs of frames: of as many channels as the latent, or
            of 3 with a decoder.
        weight: Weight of the student's loss, after its ramp.
        ramp: Steps in which the weight grows from zero, while the discriminator learns.
        gamma: Weight of the gradient penalties R1 and R2; 0 disables them, as FSDP2 requires.
        penalty_every: The penalties are computed at every n-th step, n times as strong.
        decoder: Run folder, checkpoint or export of a decoder of the latents. None: latents are compared.
        optimizer: Called with the discriminator's parameters.

    Raises:
        OwlError: An argument is out of range, or the file of the decoder holds another network.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        weight: float = 0.1,
        ramp: int = 500,
        gamma: float = 1.0,
        penalty_every: int = 4,
        decoder: str | None = None,
        optimizer: Callable[[Iterable], Optimizer] = adversary_adamw,
    ) -> None:
        super().__init__()
        at_least(1, penalty_every=penalty_every)
        at_least(0, ramp=ramp)
        if min(weight, gamma) < 0:
            raise OwlError(
                "recipe.arguments",
                f"weight is {weight} and gamma {gamma}, expected at least 0; correct them",
            )
        self.discriminator = discriminator
        self.weight, self.ramp, self.gamma, self.penalty_every = weight, ramp, gamma, penalty_every
        self.decoder = None if decoder is None else freeze(load_decoder(models.find_checkpoint(decoder)))
        self.optimizer = optimizer

    def check(self, network: WorldTransformer) -> None:
        """Check that it compares frames of this world model.

        Raises:
            OwlError: The decoder belongs to other latents, or the discriminator takes other channels.
        """
        if self.decoder is not None:
            check_decoder(network, "video", self.decoder)
        expected = network.generated["video"].shape[0] if self.decoder is None else 3
        if self.discriminator.channels != expected:
            raise OwlError(
                "recipe.arguments",
                f"the adversary's discriminator takes {self.discriminator.channels} channels, expected {expected}, "
                f"those of {'the latent' if self.decoder is None else 'a picture'}; set its channels",
            )

    def discriminator_input(self, network: WorldTransformer, video: Tensor) -> Tensor:
        """Convert standardised latents, float[B, K, c, h, w], to what is compared, float[B, K, C, H, W]."""
        if self.decoder is None:
            return video
        return decode_clips(self.decoder, network.restore({"video": video})["video"])

    def loss(
        self, network: WorldTransformer, true: Tensor, generated: Tensor, with_penalties: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of the discriminator.

        Args:
            network: The student, for the statistics of its latents.
            true: Standardised latents of the dataset, float[B, K, c, h, w].
            generated: The student's, of the same shape; no gradient reaches it.
            with_penalties: Whether the penalties are computed.

        Returns:
            A scalar, and scalars to be logged.
        """
        with torch.no_grad():
            sides = [self.discriminator_input(network, video) for video in (true, generated)]
        real, fake, penalties = judge(self.discriminator, sides[0], sides[1], with_penalties and self.gamma > 0)
        judged = discriminator_loss(real, fake)
        loss = penalised(judged, penalties, self.gamma, self.penalty_every)
        return loss, {"discriminator": judged.detach(), "accuracy": (real > fake).float().mean()} | penalties

    def gradient(self, network: WorldTransformer, true: Tensor, generated: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Compute the loss of the student and its gradient towards the generated latents.

        Args:
            network: See `loss`.
            true: See `loss`.
            generated: See `loss`.
            step: The training step, on which the weight depends.

        Returns:
            The unweighted loss, float[], and the gradient of the weighted one, shaped like ``generated``.
        """
        leaf = generated.detach().requires_grad_()
        with torch.no_grad():
            seen = self.discriminator_input(network, true)
            real = self.discriminator(self.discriminator.sides(seen, seen)[0])
        loss = adversarial_loss(self.discriminator, seen, self.discriminator_input(network, leaf.view_as(leaf)), real)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), self.weight * ramped(step, 0, self.ramp) * gradient
