"""What teacher and critic see: frames of copies after a clean past, the null control in its place, nothing of later."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from owl.flow_matching import add_noise
from owl.models.world_model import Controls, WorldTransformer
from owl.nn.attention import clip_frames
from owl.recipes.presentation import Presentation, present
from tests.helpers.latents import draw, lively, streams

LENGTH, SCORED = 5, 3


def shown(network: WorldTransformer, causal: bool, **changes: Any) -> Presentation:
    latents, _, controls = draw(network, LENGTH, batch=2)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    settings = {"scored": SCORED, "causal": causal, "context_noise": 0.0, "levels": lambda u: u.clamp(0.1, 0.9)}
    return present(latents, controls, generators=generators, **{**settings, **changes})


@pytest.mark.parametrize("context_noise", [0.0, 0.1])
def test_a_causal_network_sees_what_teacher_forcing_shows(context_noise: float) -> None:
    """All frames twice under the mask of teacher forcing, of which the last noisy ones are taken."""
    network = lively(sink=1, **streams("audio"))
    seen = shown(network, causal=True, context_noise=context_noise)
    latents, _, controls = draw(network, LENGTH, batch=2)
    level = torch.cat([torch.full((2, LENGTH - SCORED), 0.5), seen.noise_level], 1)
    noisy = {name: torch.cat([x[:, : LENGTH - SCORED], seen.x[name]], 1) for name, x in latents.items()}
    for known in (True, False):
        aware = torch.ones(2, 2 * LENGTH, dtype=torch.bool)
        aware[:, LENGTH:] = known
        twice = replace(Controls.joined([controls, controls]), known=aware)
        with torch.no_grad():
            whole = network(
                {name: torch.cat([seen.context[name], x], 1) for name, x in noisy.items()},
                torch.cat([torch.full_like(level, context_noise), level], 1),
                twice,
                clip_frames(LENGTH, 2, torch.device("cpu")),
            )
            found = seen.velocities(network, null=True)[not known]
        for name, v in found.items():
            torch.testing.assert_close(v, whole[name][:, -SCORED:], atol=1e-5, rtol=1e-5)
    if not context_noise:
        assert torch.equal(seen.context["video"], latents["video"])


def test_a_bidirectional_network_sees_all_frames_at_one_noise_level() -> None:
    network = lively()
    seen = shown(network, causal=False)
    latents, _, controls = draw(network, LENGTH, batch=2)
    assert (seen.noise_level == seen.noise_level[:, :1]).all()
    assert seen.noise_level[0, 0] != seen.noise_level[1, 0]
    torch.testing.assert_close(seen.x["video"], add_noise(latents["video"], seen.noise["video"], seen.noise_level))
    with torch.no_grad():
        (found,) = seen.velocities(network)
        expected = network(seen.x, seen.noise_level, controls, causal=False)["video"][:, -SCORED:]
    torch.testing.assert_close(found["video"], expected)


@pytest.mark.parametrize("causal", [True, False])
def test_guidance_is_on_the_null_control_and_not_on_idle_ones(causal: bool) -> None:
    network, seen = lively(), shown(lively(), causal=causal)
    with torch.no_grad():
        conditional, null = (v["video"] for v in seen.velocities(network, null=True))
        found, strong = seen.guided(network, 2.5)
        plain = seen.guided(network, 1.0)
        buttons, axes = seen.controls.buttons.clone(), seen.controls.axes.clone()
        for x in (buttons, axes):
            x[:, -seen.noise_level.shape[1] :] = 0
        (without,) = replace(seen, controls=Controls(buttons, axes)).velocities(network)
    torch.testing.assert_close(strong["video"], null + 2.5 * (conditional - null))
    torch.testing.assert_close(found["video"], conditional)
    torch.testing.assert_close(plain[0]["video"], conditional)
    assert plain[1] is plain[0]
    assert (without["video"] - null)[:, 0].abs().max() > 1e-2  # of the first scored frame, whose past is the same


def test_a_later_frame_does_not_matter_to_a_causal_network_and_the_clean_past_does() -> None:
    network = lively()
    seen = shown(network, causal=True)

    def last_of(changed: Presentation, frame: int) -> Tensor:
        with torch.no_grad():
            return changed.velocities(network)[0]["video"][:, frame]

    def changed(x: Tensor, frame: int) -> Tensor:
        return x + torch.nn.functional.one_hot(torch.tensor(frame), x.shape[1]).view(1, -1, 1, 1, 1)

    first = last_of(seen, 0)
    noisy = replace(seen, x={"video": changed(seen.x["video"], 1)})
    assert torch.equal(last_of(noisy, 0), first)
    assert torch.equal(last_of(noisy, 2), last_of(seen, 2))  # other noisy frames are not seen either
    own = LENGTH - SCORED
    later = replace(seen, context={"video": changed(seen.context["video"], own)})
    assert torch.equal(last_of(later, 0), first)
    assert not torch.equal(last_of(later, 1), last_of(seen, 1))
    earlier = replace(seen, context={"video": changed(seen.context["video"], own - 1)})
    assert not torch.equal(last_of(earlier, 0), first)


@pytest.mark.parametrize("causal", [True, False])
def test_the_exact_velocity_has_no_error_and_leads_to_the_clean_frames(causal: bool) -> None:
    network = lively(**streams("audio"))
    seen = shown(network, causal=causal)
    velocity = {name: (seen.noise[name] - x)[:, -SCORED:] for name, x in seen.clean.items()}
    assert all(error == 0 for error in seen.errors(velocity).values())
    latents = draw(network, LENGTH, batch=2)[0]
    for name, x in seen.to_clean(velocity).items():
        torch.testing.assert_close(x, latents[name][:, -SCORED:])
    off = {name: v + 2 for name, v in velocity.items()}
    assert all(error == pytest.approx(4, rel=1e-5) for error in seen.errors(off).values())


def test_a_single_frame_needs_no_past() -> None:
    network = lively()
    latents, _, controls = draw(network, 1, batch=2)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    seen = present(latents, controls, 1, True, 0.0, lambda u: u, generators)
    with torch.no_grad():
        (found,) = seen.velocities(network)
        expected = network(seen.x, seen.noise_level, controls)
    torch.testing.assert_close(found["video"], expected["video"], atol=1e-5, rtol=1e-5)
