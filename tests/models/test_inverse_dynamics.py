"""Controls are read from the right frames, learned fast, and kept through save and load."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from owl import models
from owl.models.inverse_dynamics import InverseDynamicsModel, similarity
from owl.nn.symlog import symexp, symlog
from tests.helpers.errors import refused

TINY: dict[str, Any] = {
    "buttons": ["A", "B"],
    "axes": ["turn"],
    "size": (16, 32),
    "width": 16,
    "reach": (1, 3),
    "hidden": 16,
}


@pytest.fixture
def network() -> InverseDynamicsModel:
    torch.manual_seed(0)
    made = InverseDynamicsModel(**TINY)
    for parameter in made.parameters():  # blocks begin as the identity, which would hide a frame from the test
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def clip(frames: int = 9, size: tuple[int, int] = (16, 32), seed: int = 0) -> Tensor:
    return torch.rand(2, frames, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def sliding(steps: Tensor, size: tuple[int, int] = (16, 32)) -> Tensor:
    """float[B, T + 1, 3, H, W]: smooth random textures that move by int64[B, T] pixels a frame to the right."""
    texture = F.interpolate(torch.rand(len(steps), 3, size[0] // 4, size[1] // 4), size, mode="bilinear") * 2 - 1
    places = F.pad(steps.cumsum(1), (1, 0))
    return torch.stack(
        [torch.stack([texture[b].roll(int(x), -1) for x in row]) for b, row in enumerate(places.tolist())]
    )


def test_a_control_is_read_from_two_frames_before_to_one_after(network: InverseDynamicsModel) -> None:
    video = clip()
    with torch.no_grad():
        before = torch.cat(network(video), -1)
        for changed in range(9):
            other = video.clone()
            other[:, changed] = clip(seed=1)[:, changed]
            after = torch.cat(network(other), -1)
            affected = [t for t in range(9) if not torch.equal(before[:, t], after[:, t])]
            assert affected == [t for t in range(9) if t - 2 <= changed <= t + 1]


def test_the_ends_of_a_clip_are_repeated(network: InverseDynamicsModel) -> None:
    video = clip(5)
    longer = torch.cat([video[:, :1], video[:, :1], video, video[:, -1:]], 1)
    with torch.no_grad():
        for found, expected in zip(network(video), network(longer), strict=True):
            torch.testing.assert_close(found, expected[:, 2:-1])


def test_similarity_is_the_cosine_with_each_cell_in_reach() -> None:
    before, now = (torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = similarity(before, now, (1, 2)).unflatten(1, (3, 5))
    for row, column, y, x in [(-1, -2, 2, 3), (0, 0, 0, 0), (1, 2, 1, 1), (0, -1, 3, 5)]:
        cosine = F.cosine_similarity(before[:, :, y + row, x + column], now[:, :, y, x], dim=1)
        torch.testing.assert_close(found[:, row + 1, column + 2, y, x], 4 * cosine)
    assert not found[:, 0, :, 0].any()  # above the picture there is nothing
    assert not found[:, :, 4, :, -1].any()


def test_directions_of_a_sliding_texture_are_learned_within_seconds() -> None:
    torch.manual_seed(0)
    network = InverseDynamicsModel(**TINY | {"buttons": ["right"]})
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        steps = torch.randint(-2, 3, (count, 4)) * 3
        return sliding(steps), steps[..., None].float()

    for _ in range(80):
        video, steps = draw(16)
        logits, axes = network(video)
        right = F.binary_cross_entropy_with_logits(logits[:, 1:], (steps > 0).float())
        loss = right + F.smooth_l1_loss(axes[:, 1:], symlog(steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    video, steps = draw(64)
    buttons, axes = network.eval().label(video)
    assert (axes[:, 1:].div(3).round().sign() == steps.sign()).float().mean() > 0.9
    assert (buttons[:, 1:] == (steps > 0)).float().mean() > 0.9


def test_labels_are_in_the_axis_own_unit_and_the_first_frame_is_idle(network: InverseDynamicsModel) -> None:
    logits, axes = network(clip())
    buttons, moved = network.label(clip())
    assert set(buttons.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(buttons[:, 1:], (logits[:, 1:] > 0).float())
    torch.testing.assert_close(symlog(moved[:, 1:]), axes[:, 1:])
    assert not buttons[:, 0].any()
    assert not moved[:, 0].any()
    assert not moved.requires_grad


def test_symexp_inverts_symlog() -> None:
    x = torch.tensor([-300.0, -1.0, -0.1, 0.0, 0.5, 90.0])
    torch.testing.assert_close(symexp(symlog(x)), x)
    assert symlog(torch.tensor(1.0)).item() == pytest.approx(0.6931, abs=1e-4)


def test_other_sizes_are_scaled(network: InverseDynamicsModel) -> None:
    video = clip()
    enlarged = F.interpolate(video.flatten(0, 1), (32, 64), mode="nearest").unflatten(0, (2, 9))
    with torch.no_grad():
        for found, expected in zip(network(enlarged), network(video), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert network(clip(size=(12, 20)))[1].shape == (2, 9, 1)  # enlarging works too


def test_a_saved_network_reads_the_same(network: InverseDynamicsModel, tmp_path: Path) -> None:
    models.save(network, tmp_path)
    loaded = models.load(tmp_path)
    assert isinstance(loaded, InverseDynamicsModel)
    assert (loaded.buttons, loaded.axes, loaded.config) == (network.buttons, network.axes, network.config)
    with torch.no_grad():
        for found, expected in zip(loaded(clip()), network(clip()), strict=True):
            assert torch.equal(found, expected)


def test_the_shipped_size_is_small_and_covers_any_number_of_controls() -> None:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in InverseDynamicsModel().parameters())
    assert parameters == pytest.approx(0.96e6, rel=0.01)
    for names in ({"buttons": []}, {"axes": []}):
        made = InverseDynamicsModel(**TINY | names)
        logits, axes = made(clip(2))
        assert (logits.shape[-1], axes.shape[-1]) == (len(made.buttons), len(made.axes))


@pytest.mark.parametrize(
    ("wrong", "tokens"),
    [
        ({"buttons": [], "axes": []}, ["buttons are []", "axes []"]),
        ({"buttons": ["turn"]}, ["buttons are ['turn']"]),
        ({"size": (20, 32)}, ["size is [20, 32]", "multiples of 8"]),
        ({"width": 24}, ["width is 24", "multiple of 16"]),
        ({"reach": (-1, 3)}, ["reach is [-1, 3]"]),
    ],
)
def test_impossible_networks_are_reported(wrong: dict[str, Any], tokens: list[str]) -> None:
    with refused("network.arguments", *tokens):
        InverseDynamicsModel(**TINY | wrong)


def test_a_video_of_another_shape_is_reported(network: InverseDynamicsModel) -> None:
    with refused("network.input", "[9, 3, 16, 32]", "[batch, time, 3, height, width]"):
        network(clip()[0])
