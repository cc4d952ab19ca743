"""Who lies where in the ring, who is seen there, and that noisy copies leave no trace."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from owl.nn.attention import NEVER, Frames, visible
from owl.nn.cache import CachedAttention, LayerCache, Ring


def enter(ring: Ring, *frames: tuple[int, int]) -> tuple[list[int], torch.Tensor]:
    """Enter frames given as (time, copy)."""
    time, copy = (torch.tensor(numbers) for numbers in zip(*frames, strict=True))
    places, seen = ring.enter(time, copy)
    return places.tolist(), seen


def test_places_are_those_of_the_sink_the_ring_and_the_copies() -> None:
    ring = Ring(window=2, sink=2, copies=2)
    assert ring.time.tolist() == [NEVER] * 7
    for time, place in enumerate([0, 1, 2, 3, 4, 2, 3, 4, 2]):
        places, _ = enter(ring, (time, 0))
        assert places == [place]
    assert ring.time.tolist() == [0, 1, 8, 6, 7, NEVER, NEVER]
    places, _ = enter(ring, (9, 0), (10, 1), (10, 2))
    assert places == [3, 5, 6]
    assert ring.time.tolist() == [0, 1, 8, 9, 7, 10, 10]
    enter(ring, (10, 0))
    assert ring.time.tolist() == [0, 1, 8, 9, 10, NEVER, NEVER]  # noisy copies do not outlive their pass


@given(window=st.integers(1, 6), sink=st.integers(0, 3), frames=st.integers(1, 30), copies=st.integers(1, 2))
def test_the_ring_shows_each_frame_what_the_rule_says(window: int, sink: int, frames: int, copies: int) -> None:
    ring = Ring(window, sink, copies)
    for now in range(frames):
        parts = ([(now - 1, 0)] if now else []) + [(now, copy) for copy in range(1, copies + 1)]
        places, seen = enter(ring, *parts)
        for number, (time, copy) in enumerate(parts):
            asking = Frames(torch.tensor([[time]]), torch.tensor([copy]))
            past = Frames(torch.arange(now)[None], torch.zeros(now, dtype=torch.int64))
            wanted = {int(t) for t in past.time[0][visible(asking, past, window, sink)[0, 0]]}
            found = {int(ring.time[place]) for place in seen[0, number].nonzero().flatten() if place < ring.committed}
            assert found == wanted
            copies_seen = {int(place) for place in seen[0, number].nonzero().flatten() if place >= ring.committed}
            assert copies_seen == ({places[number]} if copy else set())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_empty_places_weigh_nothing_in_any_dtype(dtype: torch.dtype) -> None:
    ring = Ring(4, 0, 1)
    # what an empty place holds is seen in the output if it has any weight
    cache = LayerCache(torch.zeros(1, 2, 6, 3, 4, dtype=dtype), torch.full((1, 2, 6, 3, 4), 1000, dtype=dtype))
    query, key, value = torch.randn(3, 1, 2, 3, 4).to(dtype)
    out = CachedAttention(cache, *ring.enter(torch.tensor([0]), torch.tensor([0])))(query, key, value)
    assert out.dtype == dtype
    wanted = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    torch.testing.assert_close(out.double(), wanted, atol=0.03, rtol=0.03)
    nothing = CachedAttention(cache, torch.tensor([0]), torch.zeros(1, 1, 6, dtype=torch.bool))
    assert nothing(query, key, value).isfinite().all()


def test_noisy_passes_leave_committed_keys_bit_identical() -> None:
    ring = Ring(2, 1, 2)
    cache = LayerCache(torch.zeros(1, 2, 6, 3, 4), torch.zeros(1, 2, 6, 3, 4))

    def attend(*frames: tuple[int, int]) -> torch.Tensor:
        time, copy = (torch.tensor(numbers) for numbers in zip(*frames, strict=True))
        query, key, value = torch.randn(3, 1, 2, len(frames) * 3, 4)
        return CachedAttention(cache, *ring.enter(time, copy))(query, key, value)

    for now in range(9):
        attend((now, 0))
        committed = [x[:, :, : ring.committed].clone() for x in (cache.key, cache.value)]
        for _ in range(3):
            out = attend((now + 1, 1), (now + 1, 2))
            assert out.isfinite().all()
        for before, after in zip(committed, (cache.key, cache.value), strict=True):
            assert torch.equal(before, after[:, :, : ring.committed])
        assert (cache.key[:, :, ring.committed :] != 0).all()
