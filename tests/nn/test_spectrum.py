"""Spectrograms: levels of noise and tones, and the mel filters."""

import pytest
import torch

from owl.nn.spectrum import MEL_BANDS, SILENT_DECIBELS, mel_decibels, mel_filters, spectrum


@pytest.mark.parametrize("size", [32, 256, 2048])
def test_noise_has_its_own_level_at_every_size(size: int) -> None:
    noise = 0.3 * torch.randn(2, 3, 40_000)
    transformed = spectrum(noise, size, torch.hann_window(size))
    assert transformed.shape == (2, 3, size // 2 + 1, 1 + 40_000 // (size // 4))
    assert transformed[:, :, 1:-1].abs().square().mean().sqrt().item() == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize("frequency", [150.0, 1000.0, 9000.0])
def test_a_tone_is_in_its_band_at_its_level(frequency: float) -> None:
    time = torch.arange(20_000) / 44_100
    levels = mel_decibels(0.1 * torch.sin(2 * torch.pi * frequency * time), 44_100)[:, 20]
    filters = mel_filters(44_100, 2048, MEL_BANDS)
    assert levels.argmax() == filters[:, round(frequency / 44_100 * 2048)].argmax()
    assert levels.max().item() == pytest.approx(-20, abs=3)
    quieter = mel_decibels(0.01 * torch.sin(2 * torch.pi * frequency * time), 44_100)[:, 20]
    assert (levels - quieter).max().item() == pytest.approx(20, abs=0.1)


def test_silence_is_at_the_lowest_level_also_if_it_is_short() -> None:
    assert torch.equal(mel_decibels(torch.zeros(2, 5), 44_100), torch.full((2, MEL_BANDS, 3), SILENT_DECIBELS))


def test_filters_divide_every_frequency_between_two_bands() -> None:
    filters = mel_filters(44_100, 2048, MEL_BANDS)
    assert filters.shape == (MEL_BANDS, 1025)
    assert bool((filters.sum(1) > 0).all())
    assert int((filters > 0).sum(0).max()) <= 2
    inside = filters[:, (filters.argmax(0) > 0) & (filters.argmax(0) < MEL_BANDS - 1)]
    torch.testing.assert_close(inside.sum(0), torch.ones(inside.shape[1]))
