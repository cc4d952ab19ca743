import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from owl.losses.equivariance import Transform, draw
from tests.helpers.errors import refused

SEEDS = st.integers(0, 2**31)
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def decode(latent: torch.Tensor) -> torch.Tensor:
    """A pure resampling decoder; its encoder takes block means."""
    return latent.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_identity():
    x = noise(2, 3, 4, 6)
    assert torch.equal(Transform()(x), x)


def test_four_quarter_turns_are_none():
    x = y = noise(2, 3, 4, 6)
    for _ in range(4):
        y = Transform(quarter_turns=1)(y)
    assert torch.equal(x, y)
    assert torch.equal(Transform(quarter_turns=4)(x), x)


@given(SEEDS, SIZES)
def test_the_decoder_answers_with_the_size_of_the_transformed_image(seed, size):
    latent = noise(1, 1, *size)
    transform = draw(decode(latent), latent, generator=seeded(seed))
    assert decode(transform(latent)).shape == transform(decode(latent)).shape


@given(SEEDS)
def test_commutes_with_a_resampling_autoencoder(seed):
    latent = noise(2, 3, 6, 9)
    image = decode(latent)
    transform = draw(image, latent, generator=seeded(seed))
    turn = Transform(quarter_turns=transform.quarter_turns)
    torch.testing.assert_close(decode(turn(F.avg_pool2d(image, 4))), turn(image))
    flat = torch.full((1, 1, 6, 9), 0.3)  # scaling keeps constants
    torch.testing.assert_close(decode(transform(flat)), transform(decode(flat)))
    # The identity autoencoder commutes with everything.
    assert torch.equal(transform(latent), draw(latent, latent, generator=seeded(seed))(latent))


@given(SEEDS)
def test_fixed_size_networks_only_see_their_size(seed):
    latent = noise(1, 2, 4, 4)
    transform = draw(noise(1, 3, 36, 64), latent, fixed_size=True, generator=seeded(seed))
    assert transform == Transform(quarter_turns=2)
    assert transform(latent).shape == latent.shape


def test_stretched_latents_are_refused():
    with refused("equivariance.factor", "4x4", "36x64"):
        draw(noise(1, 3, 36, 64), noise(1, 2, 4, 4))


def test_law_of_the_draws():
    generator = seeded(0)
    latent = noise(1, 1, 32, 64)
    drawn = [draw(latent, latent, generator=generator) for _ in range(1000)]
    assert {transform.quarter_turns for transform in drawn} == {1, 2, 3}
    assert {transform.scale for transform in drawn} == {(s / 32, s / 32) for s in range(8, 32)}
    again = [draw(latent, latent, generator=generator) for generator in [seeded(0)] for _ in range(1000)]
    assert again == drawn


@given(SEEDS)
def test_images_do_not_shrink_below_what_a_loss_needs(seed):
    latent = noise(1, 1, 12, 20)
    image = noise(1, 1, 96, 160)
    transform = draw(image, latent, smallest=32, generator=seeded(seed))
    assert min(transform(image).shape[-2:]) >= 32
