"""Who sees whom, against two loops; the three ways of computing it agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from owl.bench.roofline import Operators, total_flops
from owl.nn import attention
from owl.nn.attention import (
    NEVER,
    BlockAttention,
    ChunkedAttention,
    Frames,
    attention_among,
    runs,
    tokens_of,
    visible,
)
from owl.nn.transformer import Block
from tests.helpers.attention import DenseAttention


@st.composite
def sequences(draw: st.DrawFn) -> Frames:
    """A batch of frames, any of them at any time, in any document, clean or noisy."""
    batch, frames = draw(st.integers(1, 3)), draw(st.integers(1, 9))

    def table(smallest: int, largest: int) -> Tensor:
        numbers = st.lists(st.integers(smallest, largest), min_size=batch * frames, max_size=batch * frames)
        return torch.tensor(draw(numbers)).view(batch, frames)

    copy = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=frames, max_size=frames)))
    return Frames(table(NEVER, 12), copy, table(0, 2) if draw(st.booleans()) else None)


def expected(frames: Frames, item: int, asking: int, asked: int, window: int, sink: int, causal: bool) -> bool:
    """The rule in plain words."""
    now, then = int(frames.time[item, asking]), int(frames.time[item, asked])
    if NEVER in (now, then):
        return False
    if frames.document is not None and frames.document[item, asking] != frames.document[item, asked]:
        return False
    same_copy = bool(frames.copy[asking] == frames.copy[asked])
    if not causal:
        return same_copy
    if then == now:
        return same_copy
    return frames.copy[asked] == 0 and then < now and (now - then <= window or then < sink)


@given(frames=sequences(), window=st.integers(1, 12), sink=st.integers(0, 3), causal=st.booleans())
def test_visible_is_the_rule(frames: Frames, window: int, sink: int, causal: bool) -> None:
    seen = visible(frames, frames, window, sink, causal)
    batch, count = frames.time.shape
    for item in range(batch):
        for asking in range(count):
            for asked in range(count):
                wanted = expected(frames, item, asking, asked, window, sink, causal)
                assert bool(seen[item, asking, asked]) == wanted, (item, asking, asked)


def test_tokens_see_what_their_frames_see() -> None:
    frames = torch.rand(2, 3, 4) > 0.5
    wide = tokens_of(frames, 5)
    assert wide.shape == (2, 1, 15, 20)
    for asking in range(15):
        for asked in range(20):
            assert torch.equal(wide[:, 0, asking, asked], frames[:, asking // 5, asked // 5])


def packed() -> Frames:
    """Two items packed in different ways, with padding, once clean and once noisy: teacher forcing."""
    time = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, NEVER, NEVER], [0, 1, 0, 1, 2, 3, 4, 5, 6, NEVER]])
    document = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, -1, -1], [0, 0, 1, 1, 1, 1, 1, 1, 1, -1]])
    copy = torch.tensor([0] * 10 + [1] * 10)
    return Frames(torch.cat([time, time], 1), copy, torch.cat([document, document], 1))


@pytest.mark.parametrize("chunk_tokens", [1, 6, 12, 17, 1000])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_the_three_ways_agree(chunk_tokens: int, tokens: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK_TOKENS", chunk_tokens)
    frames = packed()
    seen = visible(frames, frames, window=2, sink=1, causal=causal)
    real = (frames.time != NEVER).repeat_interleave(tokens, 1)[:, None, :, None]
    found = []
    for way in (DenseAttention, ChunkedAttention, BlockAttention):
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(2, 3, 20 * tokens, 16, generator=generator) for _ in range(3)]
        if way is not BlockAttention:  # whose gradients PyTorch has on GPUs only
            inputs = [x.requires_grad_() for x in inputs]
        out = way(seen, tokens)(*inputs)
        assert out.isfinite().all()
        found.append([out * real])
        if way is not BlockAttention:
            found[-1][0].square().sum().backward()
            found[-1] += [x.grad for x in inputs]
    dense, chunked, block = found
    assert all(x.isfinite().all() for x in dense)
    torch.testing.assert_close(chunked, dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block, dense[:1], atol=1e-5, rtol=1e-5)


def test_attention_of_gpus_is_counted_as_that_of_cpus() -> None:
    """FlexAttention cannot be looked into by a counter of operators."""
    frames = packed()
    seen = visible(frames, frames, window=2, sink=1)
    counts = []
    for way in (ChunkedAttention(seen, 4), BlockAttention(seen, 4)):
        inputs = torch.randn(3, 2, 3, 80, 16).unbind()
        with Operators() as operators:
            way(*inputs)
        counts.append(total_flops(operators.calls))
    assert counts[0] == counts[1] > 0


def test_documents_do_not_see_each_other_in_any_item() -> None:
    frames = packed()
    seen = visible(frames, frames, window=8)
    inputs = torch.randn(3, 2, 1, 40, 16)
    for item in range(2):
        for document in range(2):
            outside = ~(frames.document[item] == document).repeat_interleave(2)  # type: ignore[index]
            other = inputs.clone()
            other[1:, item, :, outside] += 1  # keys and values of the other document and of the padding
            before, after = (ChunkedAttention(seen, 2)(*x) for x in (inputs, other))
            assert torch.equal(before[item, :, ~outside], after[item, :, ~outside])
            assert torch.equal(before[1 - item], after[1 - item])


def test_attention_over_nothing_is_finite() -> None:
    frames = Frames(torch.full((1, 4), NEVER), torch.zeros(4, dtype=torch.int64))
    x = torch.randn(1, 1, 8, 16)
    for way in (DenseAttention, ChunkedAttention, BlockAttention):
        assert way(visible(frames, frames, 2), 2)(x, x, x).isfinite().all()  # padding: it is not read


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_masked_weighs_nothing_in_any_dtype(dtype: torch.dtype) -> None:
    frames = packed()  # with padding, which sees nothing
    seen = visible(frames, frames, window=2, sink=1)
    query, key, value = (torch.randn(2, 3, 40, 16).to(dtype).requires_grad_() for _ in range(3))
    other = value.detach().clone()
    unseen = ~tokens_of(seen, 2)[:, 0].any(1)
    other[unseen[:, None].expand(-1, 3, -1)] = 100  # of the padding, which is not seen
    real = (frames.time != NEVER).repeat_interleave(2, 1)[:, None, :, None]
    attend = ChunkedAttention(seen, 2)
    out = attend(query, key, value)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert torch.equal(attend(query, key, other) * real, out * real)
    expected = DenseAttention(seen, 2)(query.float(), key.float(), value.float()) * real
    torch.testing.assert_close((out * real).float(), expected, atol=0.03, rtol=0.03)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (query, key, value))


def test_a_chunk_reads_only_the_keys_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK_TOKENS", 8)
    frames = Frames(torch.arange(32)[None], torch.zeros(32, dtype=torch.int64))
    way = ChunkedAttention(visible(frames, frames, window=4, sink=1), 4)
    assert len(way.chunks) == 16
    for chunk in way.chunks[4:]:
        assert chunk.keys == [slice(0, 4), slice(chunk.queries.start - 16, chunk.queries.stop)]
    everything = Frames(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    (chunk, *_), whole = ChunkedAttention(visible(everything, everything, 1), 2).chunks, torch.randn(3, 1, 1, 8, 16)
    assert chunk.seen is None  # nothing to mask
    torch.testing.assert_close(
        ChunkedAttention(visible(everything, everything, 1), 2)(*whole), F.scaled_dot_product_attention(*whole)
    )


def test_runs_join_neighbours() -> None:
    assert runs([0, 1, 4], 3) == [slice(0, 6), slice(12, 15)]
    assert runs([5], 2) == [slice(10, 12)]


def test_other_packings_compile_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK_TOKENS", 8)
    block = Block(32, 2, 64).eval()
    graphs: list[torch.fx.GraphModule] = []

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, backend=counted, dynamic=False)
    x, condition, turns = torch.randn(1, 12, 4, 32), torch.randn(1, 12, 32), torch.randn(1, 48, 8, 2)
    for window in (1, 2, 5):
        frames = Frames(torch.arange(12)[None], torch.zeros(12, dtype=torch.int64))
        attend = attention_among(frames, window, 0, True, 4)
        torch.testing.assert_close(compiled(x, condition, turns, attend), block(x, condition, turns, attend))
        if window == 1:
            first = len(graphs)
    assert len(graphs) == first > 0


def test_blocks_that_eager_code_built_run_within_compiled_code() -> None:
    query, key, value = torch.randn(3, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    block = BlockAttention(torch.ones(1, 4, 4, dtype=torch.bool).tril(), 2)
    expected = block(query, key, value)
    compiled = torch.compile(lambda *given: block(*given), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, value), expected)
