"""Ring-buffer KV cache with constant memory for rollouts of any length."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from owl.nn.attention import NEVER, Frames, masked, tokens_of, visible


class Ring:
    """Assignment of frames to slots: ``sink`` fixed slots, a ring of ``window + 1``, and slots for noisy copies.

    All layers with the same window share one.

    Args:
        window: Previous frames that a frame attends to.
        sink: First frames, which are never evicted.
        copies: Maximum number of noisy copies in a pass.
        device: Device of the tables.

    Attributes:
        time: int64[places], frame whose context is in each slot, ``NEVER`` for empty slots.
    """

    def __init__(self, window: int, sink: int, copies: int, device: torch.device | str = "cpu") -> None:
        self.window, self.sink = window, sink
        self.committed = sink + window + 1
        self.time = torch.full((self.committed + copies,), NEVER, dtype=torch.int64, device=device)
        self._copy = torch.cat([torch.zeros(self.committed), torch.arange(1, copies + 1)]).long().to(device)

    def enter(self, time: Tensor, copy: Tensor) -> tuple[Tensor, Tensor]:
        """Assign slots to the frames of a pass.

        Args:
            time: int64[Q], number of each frame since the start of the rollout; frames of copy 0 must be less than
                ``window + 1`` apart, otherwise they would share a slot.
            copy: int64[Q]: 0 commits a frame; higher copies use separate slots and do not change committed ones.

        Returns:
            int64[Q], the slot of each frame; bool[1, Q, places], the slots that each frame attends to.
        """
        in_ring = torch.where(time < self.sink, time, self.sink + (time - self.sink) % (self.window + 1))
        places = torch.where(copy == 0, in_ring, self.committed + copy - 1)
        self.time[self.committed :] = NEVER
        self.time.index_copy_(0, places, time)
        held = Frames(self.time[None], self._copy)
        return places, visible(Frames(time[None], copy), held, self.window, self.sink)


@dataclass
class LayerCache:
    """Keys and values of one layer.

    Attributes:
        key: float[B, heads, places, tokens per frame, channels of a head].
        value: The same.
        writable: Whether a pass writes its frames to the cache; otherwise it uses a copy with them, which carries
            gradients.
    """

    key: Tensor
    value: Tensor
    writable: bool = True


class CachedAttention:
    """Attention over cached frames and the frames of a pass, which are written to the cache first.

    Args:
        cache: Cache of the layer.
        places: int64[Q], slots of the pass's frames.
        seen: bool[1, Q, places].
    """

    def __init__(self, cache: LayerCache, places: Tensor, seen: Tensor) -> None:
        self.cache, self.places, self.seen = cache, places, seen

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; see `owl.nn.attention.Attend`."""
        batch, heads, _, tokens, width = self.cache.key.shape
        shape = (batch, heads, len(self.places), tokens, width)
        key, value = key.reshape(shape).to(self.cache.key.dtype), value.reshape(shape).to(self.cache.value.dtype)
        if self.cache.writable:
            if key.requires_grad:
                raise RuntimeError("keys that carry gradients must not be written into a cache: make it read-only")
            keys = self.cache.key.index_copy_(2, self.places, key)
            values = self.cache.value.index_copy_(2, self.places, value)
        else:
            keys = self.cache.key.index_copy(2, self.places, key)
            values = self.cache.value.index_copy(2, self.places, value)
        keys, values = keys.flatten(2, 3), values.flatten(2, 3)
        query = query.to(keys.dtype)
        if query.is_cuda:
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=tokens_of(self.seen, tokens))
        # on CPUs two matrix products and a softmax take half the time of the fused kernel, and a mask that is added a
        # third of that of one that selects
        scores = query * query.shape[-1] ** -0.5 @ keys.transpose(-1, -2)
        mask = torch.zeros(self.seen.shape, dtype=scores.dtype, device=scores.device)
        scores += tokens_of(mask.masked_fill_(~self.seen, masked(scores.dtype)), tokens)
        return scores.softmax(-1).to(values.dtype) @ values
