"""Layers that start as the identity, and a null control that is none of the real ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from owl.nn.attention import Frames, visible
from owl.nn.rope import rope
from owl.nn.transformer import Block, ControlEmbedding, Head, HeadNorm, JointBlock, NoiseLevelEmbedding, modulate
from tests.helpers.attention import DenseAttention


def test_a_block_starts_as_the_identity_and_its_gates_learn_first() -> None:
    block = Block(32, 2, 64)
    x, condition = torch.randn(2, 3, 4, 32), torch.randn(2, 3, 32)
    frames = Frames(torch.arange(3)[None], torch.zeros(3, dtype=torch.int64))
    attend = DenseAttention(visible(frames, frames, 2), 4)
    turns = rope(frames.time, torch.zeros(4), torch.arange(4.0), 16)
    out = block(x, condition, turns, attend)
    assert torch.equal(out, x)
    out.square().sum().backward()
    gradient = block.modulation.linear.weight.grad
    assert gradient is not None
    assert [bool(part.any()) for part in gradient.chunk(6)] == [False, False, True, False, False, True]


def test_a_joint_block_with_the_same_weights_twice_is_a_block_and_with_others_is_not() -> None:
    block, joint = Block(32, 2, 64), JointBlock(32, 2, 64, (5, 3))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    for group in (joint.first, joint.second):
        group.load_state_dict(block.state_dict())
    x, condition = torch.randn(2, 1, 8, 32), torch.randn(2, 1, 32)
    turns = rope(torch.zeros(1, dtype=torch.int64), torch.arange(8.0), torch.arange(8.0) % 3, 16)
    attend = F.scaled_dot_product_attention
    expected = block(x, condition, turns, attend)
    torch.testing.assert_close(joint(x, condition, turns, attend), expected)
    nn.init.normal_(joint.second.down.weight)
    changed = (joint(x, condition, turns, attend) - expected).abs().amax((0, 1, 3)) > 1e-4
    assert changed.tolist() == [False] * 5 + [True] * 3
    nn.init.normal_(joint.second.qkv.weight)  # the keys and values of one group reach the other
    changed = (joint(x, condition, turns, attend) - expected).abs().amax((0, 1, 3)) > 1e-4
    assert changed.all()


def test_modulation_belongs_to_frames() -> None:
    block = Block(32, 2, 64)
    nn.init.normal_(block.modulation.linear.weight)
    parts = block.modulation(torch.randn(2, 3, 32))
    assert [part.shape for part in parts] == [(2, 3, 1, 32)] * 6
    x = torch.randn(2, 3, 4, 32)
    plain = modulate(x, torch.zeros(1), torch.zeros(1))
    torch.testing.assert_close(plain.mean(-1), torch.zeros(2, 3, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(modulate(x, torch.full((1,), 3.0), torch.ones(1)), 2 * plain + 3)


def test_a_head_starts_as_zero_and_learns() -> None:
    head = Head(32, 5)
    out = head(torch.randn(2, 3, 4, 32), torch.randn(2, 3, 32))
    assert out.shape == (2, 3, 4, 5)
    assert not out.any()
    (out - 1).square().sum().backward()
    assert head.linear.weight.grad.any()  # type: ignore[union-attr]


def test_not_known_is_not_idle_and_is_learnt() -> None:
    embedding = ControlEmbedding(3, 2, 16)
    idle = torch.zeros(1, 4, 3), torch.zeros(1, 4, 2)
    known = torch.tensor([[True, False, True, False]])
    embedded = embedding(*idle, known)
    assert torch.equal(embedded[:, known[0]], embedding(*idle)[:, :2])
    assert torch.equal(embedded[0, 1], embedding.unknown)
    assert (embedded[0, 0] - embedded[0, 1]).norm() > 0.1
    embedded.sum().backward()
    torch.testing.assert_close(embedding.unknown.grad, torch.full((16,), 2.0))
    other = embedding(torch.ones(1, 4, 3), torch.ones(1, 4, 2), known)
    assert torch.equal(other[0, 1], embedded[0, 1])  # what is not known does not matter
    assert not torch.equal(other[0, 0], embedded[0, 0])


def test_large_movements_are_compressed_and_keep_their_sign() -> None:
    embedding = ControlEmbedding(0, 1, 16)
    embedding.first = nn.Linear(1, 16)
    seen = []
    embedding.first.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].flatten().tolist()))
    embedding(torch.zeros(1, 2, 0), torch.tensor([[[-1000.0], [1000.0]]]))
    assert -7 < seen[0][0] == -seen[0][1] < -6


def test_noise_levels_are_distinguished_and_near_ones_are_alike() -> None:
    embedding = NoiseLevelEmbedding(32)
    levels = torch.linspace(0, 1, 21)
    embedded = embedding(levels)
    assert embedded.shape == (21, 32)
    distances = torch.cdist(embedded, embedded) + torch.eye(21)
    assert distances.min() > 0.1
    assert (embedding(levels + 1e-4) - embedded).norm(dim=-1).max() < 0.1


def test_noise_levels_mean_the_same_in_less_precision() -> None:
    embedding = NoiseLevelEmbedding(32)
    levels = torch.linspace(0, 1, 21)
    expected = embedding(levels)
    found = [embedding.bfloat16()(levels)]
    with default_type(torch.bfloat16):
        found.append(embedding(levels))
    for embedded in found:
        assert embedded.dtype == torch.bfloat16
        torch.testing.assert_close(embedded.float(), expected, atol=0.03, rtol=0)


def test_positions_mean_the_same_in_less_precision() -> None:
    places = torch.arange(3), torch.arange(4.0), torch.arange(4.0), 32
    expected = rope(*places)
    with default_type(torch.bfloat16):
        assert torch.equal(rope(*places), expected)


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_queries_and_keys_have_length_one_per_channel() -> None:
    norm = HeadNorm(16)
    x = torch.randn(4, 16) * 100
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(4))
    assert norm.bfloat16()(x).dtype == torch.float32
