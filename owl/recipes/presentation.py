"""How teacher, critic and student are shown frames: noisy after a clean past, or all of a clip at one noise level."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from owl.flow_matching import add_noise, each, velocity_loss
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.nn.attention import clip_frames
from owl.rollout.clips import draw


@dataclass(frozen=True)
class Presentation:
    """The W frames of clips, of which the last K are scored: predicted from their noisy latents.

    A causal network gets the clean frames as context and noisy copies of the scored ones, each of which attends to the
    context before it: teacher forcing, and what happens in a rollout. A bidirectional network gets all frames noisy.

    Attributes:
        controls: Controls of the W frames.
        scored: K.
        x: x_t of the last N frames, "video" float[B, N, c, h, w], ..., with N = K, or W for a bidirectional network.
        noise_level: float[B, N], t.
        clean: x0 of the N frames.
        noise: eps of the N frames.
        context: Clean latents of the W frames, standardised; None for a bidirectional network.
        context_noise: Noise level of the context.
    """

    controls: Controls
    scored: int
    x: Streams
    noise_level: Tensor
    clean: Streams
    noise: Streams
    context: Streams | None = None
    context_noise: float = 0.0

    def of(self, scored: Streams) -> "Presentation":
        """Present other scored frames, "video" float[B, K, c, h, w], ..., with the same noise; gradients reach them."""
        before = self.noise_level.shape[1] - self.scored
        clean = {name: torch.cat([x[:, :before], scored[name]], 1) for name, x in self.clean.items()}
        x = {name: add_noise(latent, self.noise[name], self.noise_level) for name, latent in clean.items()}
        return replace(self, x=x, clean=clean)

    def velocities(self, network: WorldTransformer, null: bool = False) -> list[Streams]:
        """Predict the velocity of the scored frames.

        Args:
            network: The world model.
            null: Whether to predict it also with null controls, which a causal network gets for the scored frame only.

        Returns:
            "video" float32[B, K, c, h, w], ..., with the controls and, with ``null``, without them.
        """
        known, level = torch.ones_like(self.noise_level, dtype=torch.bool), self.noise_level
        if self.context is None:  # known in any case, so that the null control gets a gradient, for which DDP waits
            branches = [replace(self.controls, known=k) for k in (known, ~known)[: 1 + null]]
            passes: list[Streams] = [network(self.x, level, controls, causal=False) for controls in branches]
            return [{name: v[:, -self.scored :].float() for name, v in velocity.items()} for velocity in passes]
        length, copies = self.controls.buttons.shape[1], 1 + null
        own = self.controls.at(slice(length - self.scored, None))
        given = [self.controls, own, replace(own, known=~known)][: 1 + copies]
        context_level = level.new_full((len(level), length), self.context_noise)
        velocity: Streams = network(
            {name: torch.cat([self.context[name], *[x] * copies], 1) for name, x in self.x.items()},
            torch.cat([context_level, *[level] * copies], 1),
            Controls.joined(given),
            clip_frames(length, 1 + copies, level.device, self.scored),
        )
        parts = {name: v[:, length:].float().chunk(copies, 1) for name, v in velocity.items()}
        return [{name: part[copy] for name, part in parts.items()} for copy in range(copies)]

    def guided(self, network: WorldTransformer, guidance: float) -> tuple[Streams, Streams]:
        """Predict the velocity of the scored frames with their controls, and with guidance of this weight w.

        Returns:
            Two results as of `velocities`: the conditional prediction, and null + w (conditional - null).
        """
        if guidance == 1:
            (conditional,) = self.velocities(network)
            return conditional, conditional
        conditional, null = self.velocities(network, null=True)
        return conditional, {name: guided(x, null[name], guidance) for name, x in conditional.items()}

    def to_clean(self, velocity: Streams) -> Streams:
        """Compute x0 = x_t - t v of the scored frames, "video" float[B, K, c, h, w], ..."""
        last, level = slice(-self.scored, None), self.noise_level[:, -self.scored :]
        return {
            name: self.x[name][:, last] - level.view(*v.shape[:2], *[1] * (v.ndim - 2)) * v
            for name, v in velocity.items()
        }

    def errors(self, velocity: Streams) -> dict[str, Tensor]:
        """Compute the mean squared error of the velocities of the scored frames, a scalar for each stream."""
        last = slice(-self.scored, None)
        return {
            name: velocity_loss(v, self.clean[name][:, last], self.noise[name][:, last]).mean()
            for name, v in velocity.items()
        }


def present(
    clip: Streams,
    controls: Controls,
    scored: int,
    causal: bool,
    context_noise: float,
    levels: Callable[[Tensor], Tensor],
    generators: list[torch.Generator],
    past: Streams | None = None,
) -> Presentation:
    """Draw noise for the frames of clips.

    Args:
        clip: Standardised latents, "video" float[B, W, c, h, w], ...
        controls: Controls of these frames.
        scored: Number of last frames that are predicted.
        causal: Whether they are shown to causal networks.
        context_noise: Noise level of the context of causal networks.
        levels: Maps uniform numbers in [0, 1), float[B, N], to noise levels: independent ones for each frame, or, for
            bidirectional networks, the same one for all frames of a clip.
        generators: One for each clip.
        past: The frames that causal networks get as context, shaped like ``clip``. None: those of the clip.
    """
    context: Streams | None = None
    length = controls.buttons.shape[1]
    if causal:
        context = past or clip
        if context_noise:
            level, noise = torch.full_like(controls.buttons[..., 0], context_noise), draw(generators, context)
            context = {name: add_noise(x, noise[name], level) for name, x in context.items()}
    count = scored if causal else length
    uniform = each(torch.rand, generators, count)
    t = levels(uniform if causal else uniform[:, :1].expand(-1, count))
    clean = {name: x[:, -count:] for name, x in clip.items()}
    noise = draw(generators, clean)
    x = {name: add_noise(latent, noise[name], t) for name, latent in clean.items()}
    return Presentation(controls, scored, x, t, clean, noise, context, context_noise)


def guided(conditional: Tensor, null: Tensor, guidance: float) -> Tensor:
    """Compute null + w (conditional - null) (Ho and Salimans 2022)."""
    return null + guidance * (conditional - null)
