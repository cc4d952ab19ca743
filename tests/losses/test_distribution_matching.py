"""Distribution matching: the numbers of the authors' code, and what its gradient is."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from owl.flow_matching import shifted, velocity_loss
from owl.losses.distribution_matching import dmd_gradient, dmd_loss
from owl.recipes.presentation import guided

REFERENCE = json.loads((Path(__file__).parent / "self_forcing_dmd.json").read_text(encoding="utf-8"))


def given(name: str) -> Tensor:
    return torch.tensor(REFERENCE[name], dtype=torch.float64)


def gradient(scale: float) -> Tensor:
    """Guidance of the reference is one less than ours."""
    real = guided(given("x0_real"), given("x0_real_null"), scale + 1)
    return dmd_gradient(given("clean"), real, given("x0_fake"))


@pytest.mark.parametrize("case", REFERENCE["gradients"], ids=lambda case: f"scale-{case['scale']}")
def test_the_gradient_is_that_of_the_authors_code(case: dict) -> None:
    expected = torch.tensor(case["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient(case["scale"]), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("case", REFERENCE["losses"], ids=lambda case: f"masked-{case['masked']}")
def test_the_loss_is_that_of_the_authors_code_also_of_the_last_frames_alone(case: dict) -> None:
    clean, part = given("clean").requires_grad_(), slice(1, None) if case["masked"] else slice(None)
    loss = dmd_loss(clean[:, part], gradient(case["scale"])[:, part])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    expected = torch.tensor(case["gradient_to_clean"], dtype=torch.float64)
    torch.testing.assert_close(clean.grad, expected, rtol=1e-5, atol=1e-9)


def test_the_critic_s_loss_and_noise_levels_are_those_of_the_authors_code() -> None:
    critic, clean = REFERENCE["critic"], given("clean")
    sigma, noise = (torch.tensor(critic[name], dtype=torch.float64) for name in ("sigma", "noise"))
    level = shifted(given("raw_timestep") / 1000, critic["timestep_shift"]).clamp(0.02, 0.98)
    torch.testing.assert_close(level, sigma, rtol=1e-5, atol=0)
    t = sigma[..., None, None, None]
    x = (1 - t) * clean + t * noise
    velocity = (x - given("x0_fake")) / t
    assert velocity_loss(velocity, clean, noise).mean().item() == pytest.approx(critic["loss"], rel=1e-5)


def test_the_gradient_towards_a_sample_is_g_over_the_number_of_elements_and_reaches_nothing_else() -> None:
    clean, real, fake = (torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    g = dmd_gradient(clean, real, fake)
    assert not g.requires_grad
    dmd_loss(clean, g).backward()
    torch.testing.assert_close(clean.grad, g / g.numel())
    assert real.grad is None
    assert fake.grad is None


def test_each_sample_is_normalised_on_its_own_and_equal_scores_give_no_gradient() -> None:
    clean, real, fake = (torch.randn(2, 3, 4) for _ in range(3))
    larger = [torch.cat([x[:1], 100 * x[1:]]) for x in (clean, real, fake)]
    torch.testing.assert_close(dmd_gradient(*larger), dmd_gradient(clean, real, fake), rtol=1e-4, atol=1e-4)
    assert not dmd_gradient(clean, real, real).any()
    assert dmd_gradient(clean, clean, clean).isfinite().all()  # a teacher that predicts the sample exactly
