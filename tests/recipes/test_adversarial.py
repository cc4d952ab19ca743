"""Each side of the game gets its gradient, and the other one none."""

import pytest
import torch
from torch import Tensor

from owl.models.discriminators import Discriminator, PatchDiscriminator, ResNetDiscriminator
from owl.recipes.adversarial import adversarial_loss, judge

DISCRIMINATORS = {
    "patch": lambda: PatchDiscriminator(width=4, layers=2),
    "resnet": lambda: ResNetDiscriminator(widths=[8, 8], blocks=[1, 1], group_size=4),
    "paired": lambda: PatchDiscriminator(width=4, layers=2, paired=True),
    "frames": lambda: PatchDiscriminator(width=4, layers=2, frames=2),
}


def clips() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    true, decoded = (torch.rand(2, 3, 3, 16, 24, generator=generator) * 2 - 1 for _ in range(2))
    return true, decoded.requires_grad_()


@pytest.fixture(params=DISCRIMINATORS)
def discriminator(request: pytest.FixtureRequest) -> Discriminator:
    torch.manual_seed(0)
    return DISCRIMINATORS[request.param]()


@pytest.mark.parametrize("penalised", [False, True])
def test_judging_teaches_the_discriminator_only(discriminator: Discriminator, penalised: bool) -> None:
    true, decoded = clips()
    real, fake, penalties = judge(discriminator, true, decoded, penalised)
    (real.sum() - 2 * fake.sum() + sum(penalties.values())).backward()
    assert decoded.grad is None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    assert sorted(penalties) == (["r1", "r2"] if penalised else [])
    assert all(value > 0 for value in penalties.values())
    assert not torch.equal(real, fake)


def test_fooling_teaches_the_decoder_only(discriminator: Discriminator) -> None:
    true, decoded = clips()
    with torch.no_grad():
        real, fake, _ = judge(discriminator, true, decoded, False)
    loss = adversarial_loss(discriminator, true, decoded, real)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(real - fake).mean())
    loss.backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    real_side, fake_side = discriminator.sides(true, decoded)
    real = discriminator(real_side) if discriminator.paired else real
    (expected,) = torch.autograd.grad(torch.nn.functional.softplus(real - discriminator(fake_side)).mean(), decoded)
    torch.testing.assert_close(decoded.grad, expected)
