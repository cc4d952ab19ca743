"""Rollouts of an engine, and what an engine should do, from whole sequences."""

import torch
from torch import Tensor, nn

from owl.flow_matching import Step, add_noise
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.nn.attention import Frames
from owl.rollout.engine import Engine
from owl.rollout.generate import SAMPLERS

LEVELS = (1.0, 0.6, 0.3)


def at(controls: Controls, frame: int) -> tuple[Tensor, Tensor]:
    return controls.buttons[:, frame], controls.axes[:, frame]


def roll(engine: Engine, controls: Controls, context: Streams | None = None, seed: int = 0) -> list[Streams]:
    """Roll out: the context's frames take the first controls; returns the latents of every generated frame."""
    known = 0 if context is None else context["video"].shape[1]
    shown = None if context is None else Controls(controls.buttons[:, :known], controls.axes[:, :known])
    engine.reset(context, shown, batch=len(controls.buttons), seed=seed)
    return [engine.step(*at(controls, t)).latents for t in range(known, controls.buttons.shape[1])]


def same(found: list[Streams], expected: list[Streams]) -> bool:
    """Bit for bit."""
    return len(found) == len(expected) and all(
        torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in b
    )


class Painted(nn.Module):
    """Reads the controls that are painted into the first pixel: a button in red, degrees of an axis in green."""

    buttons, axes = ["jump", "fire"], ["x", "y"]

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(127.5), requires_grad=False)

    def label(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """As `InverseDynamicsModel.label`."""
        pixel = (video[..., 0, 0] + 1) * self.scale
        nothing = torch.zeros_like(pixel[..., 0])
        return torch.stack([nothing, (pixel[..., 0] > 100).float()], -1), torch.stack([nothing, pixel[..., 1]], -1)


class Reference:
    """What an engine should do, from whole sequences: no cache, no ring, no joined passes."""

    def __init__(
        self,
        network: WorldTransformer,
        sampler: str,
        context_noise: float,
        guidance: float,
        inner_guidance: float = 0.0,
    ) -> None:
        self.network, self.sampler = network, sampler
        self.context_noise, self.guidance, self.inner_guidance = context_noise, guidance, inner_guidance

    @torch.no_grad()
    def roll(self, controls: Controls, context: Streams | None, seed: int) -> list[Streams]:
        batch, length = controls.buttons.shape[:2]
        random = torch.Generator().manual_seed(seed)

        def noise() -> Streams:
            return {
                name: torch.randn(batch, 1, *stream.shape, generator=random)
                for name, stream in self.network.generated.items()
            }

        def noisy(x: Streams) -> Streams:
            if not self.context_noise:
                return x
            fresh = noise()
            return {n: add_noise(x[n], fresh[n], torch.full((batch, 1), self.context_noise)) for n in x}

        known = 0 if context is None else context["video"].shape[1]
        given = {} if context is None else self.network.standardize(context)
        past = [noisy({name: x[:, t : t + 1] for name, x in given.items()}) for t in range(known)]
        generated = []
        for now in range(known, length):
            x, before = noise(), 1.0
            earlier: Streams = {}
            for level, following in zip(LEVELS, [*LEVELS[1:], 0.0], strict=True):
                velocity = self.velocity(past, x, level, controls, now)
                fresh = noise() if self.sampler == "consistency" else x
                x = {
                    n: SAMPLERS[self.sampler](
                        Step(x[n], velocity[n], level, following, earlier.get(n), before, fresh[n])
                    )
                    for n in x
                }
                earlier, before = velocity, level
            past.append(noisy(x))
            generated.append({name: latent[:, 0] for name, latent in self.network.restore(x).items()})
        return generated

    def velocity(self, past: list[Streams], x: Streams, level: float, controls: Controls, now: int) -> Streams:
        """Of the frame ``now``, by one pass over all frames so far."""
        latents = {name: torch.cat([*(frame[name] for frame in past), x[name]], 1) for name in x}
        levels = torch.tensor([self.context_noise] * now + [level]).expand(len(controls.buttons), -1)
        frames = Frames(torch.arange(now + 1)[None], torch.tensor([0] * now + [1]))
        found = []
        for aware, moving in ((True, True), (False, True), (True, False)):
            known = torch.ones(len(controls.buttons), now + 1, dtype=torch.bool)
            known[:, -1] = aware
            shown = Controls(controls.buttons[:, : now + 1], controls.axes[:, : now + 1], known)
            hinted = dict(latents)
            if "motion" in x:
                hinted["motion"] = torch.cat([latents["motion"][:, :-1], moving * x["motion"]], 1)
            velocity = self.network(hinted, levels, shown, frames)
            found.append({name: v[:, -1:] for name, v in velocity.items()})
        conditional, null, still = found
        w1, w2 = self.guidance - 1, self.inner_guidance  # VideoJAM's
        return {n: (1 + w1 + w2) * conditional[n] - w1 * null[n] - w2 * still[n] for n in null}
