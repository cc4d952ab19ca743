import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from owl.losses.equivariance import Transform, draw_transform, transform

SEEDS = st.integers(0, 2**31)
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_identity():
    x = noise(2, 3, 4, 6)
    assert torch.equal(transform(x, Transform()), x)
    assert draw_transform((4, 6), probability=0.0) == Transform()


def test_four_quarter_turns_are_none():
    x = y = noise(2, 3, 4, 6)
    for _ in range(4):
        y = transform(y, Transform(quarter_turns=1))
    assert torch.equal(x, y)
    assert torch.equal(transform(x, Transform(quarter_turns=4)), x)


@given(SEEDS, SIZES)
def test_latent_and_image_keep_their_ratio(seed, size):
    height, width = size
    drawn = draw_transform(size, probability=1.0, generator=torch.Generator().manual_seed(seed))
    latent = transform(noise(1, 1, height, width), drawn)
    image = transform(noise(1, 1, 8 * height, 5 * width), drawn)
    ratio = (8, 5) if drawn.quarter_turns % 2 == 0 else (5, 8)
    assert image.shape[2:] == (ratio[0] * latent.shape[2], ratio[1] * latent.shape[3])


@given(SEEDS)
def test_commutes_with_a_resampling_autoencoder(seed):
    # Its encoder takes block means, its decoder repeats them: exact for images that are constant on blocks.
    drawn = draw_transform((6, 9), probability=1.0, generator=torch.Generator().manual_seed(seed))
    turn = Transform(quarter_turns=drawn.quarter_turns)
    latent = noise(2, 3, 6, 9)
    image = decode(latent)
    torch.testing.assert_close(decode(transform(F.avg_pool2d(image, 4), turn)), transform(image, turn))
    # A scaled constant stays constant.
    flat = torch.full((1, 1, 6, 9), 0.3)
    torch.testing.assert_close(decode(transform(flat, drawn)), transform(decode(flat), drawn))


def decode(latent: torch.Tensor) -> torch.Tensor:
    return latent.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


@given(SEEDS)
def test_fixed_size_networks_only_see_their_size(seed):
    drawn = draw_transform((6, 9), probability=1.0, fixed_size=True, generator=torch.Generator().manual_seed(seed))
    assert transform(noise(1, 2, 6, 9), drawn).shape == (1, 2, 6, 9)
    assert drawn.quarter_turns == 2


def test_law_of_the_draws():
    generator = torch.Generator().manual_seed(0)
    draws = [draw_transform((32, 64), generator=generator) for _ in range(2000)]
    changed = [drawn for drawn in draws if drawn != Transform()]
    assert len(changed) / len(draws) == pytest.approx(0.5, abs=0.05)
    assert {drawn.quarter_turns for drawn in changed} == {1, 2, 3}
    assert {drawn.scale for drawn in changed} == {(s / 32, s / 32) for s in range(8, 32)}


def test_equal_seeds_draw_equal_transforms():
    one, other = (
        [draw_transform((8, 8), generator=generator) for _ in range(10)]
        for generator in (torch.Generator().manual_seed(3), torch.Generator().manual_seed(3))
    )
    assert one == other
