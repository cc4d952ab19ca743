"""Losses of sound: published numbers, invariants, and what each term hears."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from auraloss.freq import MultiResolutionSTFTLoss
from torch import Tensor

from owl.losses.audio import FFT_SIZES, AudioLoss, AudioWeights, MultiResolutionSTFT
from owl.losses.reconstruction import weighted_sum
from tests.helpers.errors import refused

REFERENCE = json.loads((Path(__file__).parent / "stable_audio_spectral.json").read_text("utf-8"))
TERMS = [field.name for field in fields(AudioWeights)]


def sounds(batch: int = 2, channels: int = 2, samples: int = 3000) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, batch, channels, samples, generator=generator) * 0.1)  # type: ignore[return-value]


def test_the_values_and_gradients_of_stable_audio_tools() -> None:
    """Its mean over left and right, and over sum and difference: half of ours each."""
    reconstruction = torch.tensor(REFERENCE["reconstruction"], dtype=torch.float64)
    target = torch.tensor(REFERENCE["target"], dtype=torch.float64, requires_grad=True)
    distance = MultiResolutionSTFT(REFERENCE["settings"]["fft_sizes"]).double()(reconstruction, target).mean()
    parts = [REFERENCE["left_and_right"], REFERENCE["sum_and_difference"]]
    assert distance.item() == pytest.approx(sum(part["value"] for part in parts) / 2, rel=1e-9)
    distance.backward()
    expected = torch.tensor([part["first_gradients_to_target"] for part in parts], dtype=torch.float64).mean(0)
    assert target.grad is not None
    torch.testing.assert_close(target.grad[0, 0, : len(expected)], expected)


def test_auraloss_measures_the_same_for_a_batch_of_one_signal() -> None:
    reconstruction, target = sounds(1, 1)
    hops = [size // 4 for size in FFT_SIZES]
    reference = MultiResolutionSTFTLoss(list(FFT_SIZES), hops, list(FFT_SIZES))(reconstruction, target)
    assert MultiResolutionSTFT()(reconstruction, target).item() == pytest.approx(reference.item(), rel=1e-3)


def test_a_sound_is_compared_alike_in_any_batch() -> None:
    reconstruction, target = sounds(3)
    target[0] *= 100
    distance = MultiResolutionSTFT()
    alone = torch.cat([distance(reconstruction[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(distance(reconstruction, target), alone)


def test_every_mix_of_stereo_is_heard() -> None:
    """A fault that left and right cannot hear: their phases relative to each other."""
    _, target = sounds()
    reconstruction = target * torch.tensor([1.0, -1.0])[:, None]
    assert MultiResolutionSTFT()(reconstruction[:, :1], target[:, :1]).max() < 1e-6
    assert MultiResolutionSTFT()(reconstruction[:, 1:], target[:, 1:]).max() < 1e-6
    assert MultiResolutionSTFT()(reconstruction, target).min() > 0.1


def test_reversed_polarity_raises_the_loss_of_the_default_weights() -> None:
    _, target = sounds()
    assert MultiResolutionSTFT()(-target, target).max() < 1e-6  # the trap
    weights = AudioWeights()
    reversed_, same = (weighted_sum(AudioLoss(weights)(sound, target), weights) for sound in (-target, target))
    assert same < 1e-6
    assert reversed_ > 0.1


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_computed_for_its_weight_alone_and_has_a_gradient(term: str) -> None:
    reconstruction, target = sounds()
    loss = AudioLoss(AudioWeights(**dict.fromkeys(TERMS, 0.0) | {term: 1.0}))
    (name, value), *others = loss(reconstruction.requires_grad_(), target).items()
    assert (name, others) == (term, [])
    value.backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.abs().sum(-1).min() > 0


@pytest.mark.parametrize("level", [0.0, 1e-7, 1.0])
def test_silence_and_clipping_have_finite_gradients(level: float) -> None:
    reconstruction, target = sounds()
    reconstruction = (reconstruction * level).requires_grad_()
    for other in (torch.zeros_like(target), (target * 100).clamp(-1, 1)):
        loss = AudioLoss(AudioWeights(l2=1.0))
        total = weighted_sum(loss(reconstruction, other), loss.weights)
        (gradient,) = torch.autograd.grad(total, reconstruction)
        assert bool(gradient.isfinite().all())


def test_silence_does_not_dominate_the_loss() -> None:
    """An error at the level of the sound: in a silent difference of channels it counts no more than a few times."""
    reconstruction, target = sounds(1)
    mono = target[:, :1].expand(-1, 2, -1)
    assert MultiResolutionSTFT()(reconstruction, mono) < 20
    assert MultiResolutionSTFT(quiet=1e-5)(reconstruction, mono) > 100


def test_what_is_inaudible_costs_nothing() -> None:
    """Dither of 16-bit sound in silence."""
    _, target = sounds()
    silence = torch.zeros_like(target)
    assert MultiResolutionSTFT()(silence + target * 1e-4, silence).max() < 1e-3
    assert MultiResolutionSTFT()(silence + target * 1e-1, silence).min() > 1


def test_autocast_does_not_lower_its_precision() -> None:
    reconstruction, target = sounds()
    loss = AudioLoss(AudioWeights())
    expected = loss(reconstruction, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(reconstruction, target) == expected


def test_sound_that_is_too_short_is_reported() -> None:
    with refused("losses.too-short", "1024", "1025", "length"):
        MultiResolutionSTFT()(*sounds(samples=1024))
