"""Attention masks between the frames of a sequence, and attention implementations for CPUs and GPUs.

One rule serves training, packing and streaming. A frame has a time within its document and a copy: copy 0 is the
context, which later frames attend to; copies 1, 2, ... are noisy versions, which only they themselves attend to
(teacher forcing; the frame that is being denoised; both branches of classifier-free guidance).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

NEVER = -1  # the time of an empty slot, which is always masked
CHUNK_TOKENS = 256  # queries per chunk on CPUs: shorter chunks have more overhead, longer ones more masked keys

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query float[B, H, Q, e], key float[B, H, K, e], value float[B, H, K, e]) -> float[B, H, Q, e]."""


@dataclass(frozen=True, eq=False)
class Frames:
    """Metadata of the frames of a sequence for the attention rule.

    Attributes:
        time: int64[1 or B, F], number of the frame within its document, `NEVER` for padding.
        copy: int64[F], 0 for context, above for noisy copies.
        document: int64[1 or B, F], document of each frame; None if all belong to one.
        attends: Attention built by `attention_among` for these frames.
    """

    time: Tensor
    copy: Tensor
    document: Tensor | None = None
    attends: dict[tuple[int, int, bool, int], Attend] = field(default_factory=dict, repr=False)


def clip_frames(length: int, copies: int, device: torch.device, copied: int | None = None) -> Frames:
    """Return the frames of one clip in order, followed by its last frames as copy 1, and so on.

    Cached, so that attention is built once and not at every step.

    Args:
        length: Frames of the clip.
        copies: Number of copies, including copy 0, the clip itself.
        device: Device of the result.
        copied: Frames of each further copy. None: all.
    """
    if torch.compiler.is_compiling():  # tracing bypasses caches
        return _clip_frames(length, copies, device, copied)
    with torch.inference_mode(False):  # frames created in validation are also used in training
        return _cached_clip_frames(length, copies, device, copied)


def _clip_frames(length: int, copies: int, device: torch.device, copied: int | None) -> Frames:
    time = torch.arange(length, device=device)
    last = time[length - (length if copied is None else copied) :]
    copy = torch.arange(1, copies, device=device).repeat_interleave(len(last))
    return Frames(torch.cat([time, last.repeat(copies - 1)])[None], torch.cat([torch.zeros_like(time), copy]))


_cached_clip_frames = lru_cache(maxsize=32)(_clip_frames)


def visible(query: Frames, key: Frames, window: int, sink: int = 0, causal: bool = True) -> Tensor:
    """Return which frames attend to which.

    A frame attends to itself, to the context of the previous ``window`` frames of its document, and to the first
    ``sink`` frames of its document. Without ``causal`` it attends to all frames of its copy and document.

    Returns:
        bool[1 or B, Q, K].
    """
    asking, asked = query.time[:, :, None], key.time[:, None, :]
    own_copy = query.copy[:, None] == key.copy[None, :]
    if causal:
        near = (asking - asked <= window) | (asked < sink)
        seen = (key.copy == 0) & (asked < asking) & near | own_copy & (asked == asking)
    else:
        seen = own_copy.expand(len(asking), -1, -1)
    seen = seen & (asked != NEVER) & (asking != NEVER)
    if query.document is not None and key.document is not None:
        seen = seen & (query.document[:, :, None] == key.document[:, None, :])
    return seen


def tokens_of(frames: Tensor, tokens: int) -> Tensor:
    """Repeat a mask over frames for their tokens: [B, Q, K] of any dtype -> [B, 1, Q * tokens, K * tokens]."""
    batch, queries, keys = frames.shape
    wide = frames[:, :, None, :, None].expand(-1, -1, tokens, -1, tokens)
    return wide.reshape(batch, 1, queries * tokens, keys * tokens)


def masked(dtype: torch.dtype) -> float:
    """Return the value of masked scores, added or assigned, for which the softmax is 0.

    Minus infinity would make the rows of padding NaN. Half of the smallest number leaves a margin to add the score.
    """
    return torch.finfo(dtype).min / 2


@dataclass(frozen=True)
class Chunk:
    """A chunk of queries with all keys that any of them attends to, in tokens.

    Attributes:
        queries: Range of the queries.
        keys: Ranges of consecutive keys.
        seen: bool[1 or B, 1, queries, keys], which query attends to which key; None if all attend to all.
    """

    queries: slice
    keys: list[slice]
    seen: Tensor | None

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """Return the additive mask in a dtype; filling scores in place takes sixty times as long on CPUs."""
        if self.seen is None:
            return None
        return torch.zeros(self.seen.shape, dtype=dtype, device=self.seen.device).masked_fill_(
            ~self.seen, masked(dtype)
        )


class ChunkedAttention:
    """Attention on CPUs in chunks of queries, each with only the keys that at least one of them attends to.

    PyTorch's CPU kernel also computes masked scores; this class skips most of them. Within a chunk, two matrix products
    and a softmax take a third of the time of that kernel, forward and backward, with heads of 64 channels in bfloat16.

    Args:
        seen: bool[1 or B, Q, K], which frames attend to which.
        tokens: Tokens per frame.
    """

    def __init__(self, seen: Tensor, tokens: int) -> None:
        self._run = uncompiled()
        self.chunks: list[Chunk] = []
        self._masks: dict[torch.dtype, list[Tensor | None]] = {}
        union, step = seen.any(0), max(1, CHUNK_TOKENS // tokens)
        for start in range(0, seen.shape[1], step):
            stop = min(start + step, seen.shape[1])
            needed = union[start:stop].any(0).nonzero().flatten()
            if not len(needed):  # padding: its outputs are not used
                needed = needed.new_zeros(1)
            part = seen[:, start:stop, needed]
            which = None if part.all() else tokens_of(part, tokens)
            self.chunks.append(Chunk(slice(start * tokens, stop * tokens), runs(needed.tolist(), tokens), which))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend."""
        return self._run(self, query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.dtype not in self._masks:  # all layers of a pass share them
            with torch.inference_mode(False):  # see `clip_frames`
                self._masks[query.dtype] = [chunk.mask(query.dtype) for chunk in self.chunks]
        return AttendInChunks.apply(query * query.shape[-1] ** -0.5, key, value, self.chunks, self._masks[query.dtype])


@cache
def uncompiled() -> Callable[..., Tensor]:
    """Return attention in chunks, excluded from compilation, since each packing has other chunks and would recompile.

    Created on first use, since it imports the compiler, which takes a second.
    """
    attend: Callable[..., Tensor] = torch.compiler.disable(ChunkedAttention._attend)
    return attend


class AttendInChunks(torch.autograd.Function):
    """Attention in chunks whose backward pass adds gradients in place; autograd would fill a full tensor per slice."""

    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, chunks: list[Chunk], masks: list[Tensor | None]
    ) -> Tensor:
        """float[B, H, Q, e], float[B, H, K, e], float[B, H, K, e] -> float[B, H, Q, e]; queries are already scaled."""
        batch, heads = query.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        attended = torch.empty_like(q)
        weights = []
        for chunk, mask in zip(chunks, masks, strict=True):
            scores = q[:, chunk.queries] @ gather(k, chunk.keys).mT
            if mask is not None:
                scores.unflatten(0, (batch, heads)).add_(mask)
            weights.append(scores.softmax(-1).to(scores.dtype))  # autocast on GPUs gives float32
            attended[:, chunk.queries] = weights[-1] @ gather(v, chunk.keys)
        context.save_for_backward(q, k, v, *weights)
        context.chunks = chunks
        return attended.unflatten(0, (batch, heads))

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        q, k, v, *weights = context.saved_tensors
        batch, heads = gradient.shape[:2]
        gradient = gradient.flatten(0, 1)
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for chunk, weight in zip(context.chunks, weights, strict=True):
            received = gradient[:, chunk.queries]
            scatter(of_v, chunk.keys, weight.mT @ received)
            of_weight = received @ gather(v, chunk.keys).mT
            of_scores = torch._softmax_backward_data(of_weight, weight, -1, weight.dtype)
            of_q[:, chunk.queries] = of_scores @ gather(k, chunk.keys)
            scatter(of_k, chunk.keys, of_scores.mT @ q[:, chunk.queries])
        of_q, of_k, of_v = (x.unflatten(0, (batch, heads)) for x in (of_q, of_k, of_v))
        return of_q, of_k, of_v, None, None


def gather(x: Tensor, slices: list[slice]) -> Tensor:
    """Concatenate slices of rows of float[B, S, e]; a view if there is one slice."""
    return x[:, slices[0]] if len(slices) == 1 else torch.cat([x[:, part] for part in slices], 1)


def scatter(x: Tensor, slices: list[slice], rows: Tensor) -> None:
    """Add rows to the positions read by `gather`."""
    for part, own in zip(slices, rows.split([part.stop - part.start for part in slices], 1), strict=True):
        x[:, part] += own


class BlockAttention:
    """FlexAttention with a block mask, which skips masked blocks, for GPUs, where it is compiled.

    Args:
        seen: bool[1 or B, Q, K], which frames attend to which.
        tokens: Tokens per frame.
    """

    def __init__(self, seen: Tensor, tokens: int) -> None:
        # takes a second; on GPUs only
        from torch.nn.attention.flex_attention import create_block_mask

        def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return table[batch % len(table), query // tokens, key // tokens]

        self.seen, self.tokens = seen, tokens
        table, (batch, queries, keys) = seen, seen.shape
        self.mask = create_block_mask(
            rule, batch if batch > 1 else None, None, queries * tokens, keys * tokens, device=str(seen.device)
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend."""
        if is_in_torch_dispatch_mode():  # operator counters do not support FlexAttention
            return ChunkedAttention(self.seen, self.tokens)(query, key, value)
        attended: Tensor = flex_kernel(query.is_cuda)(query, key, value, block_mask=self.mask)
        return attended


def flex_kernel(on_gpu: bool) -> Callable[..., Any]:
    """FlexAttention as it is to run here: blocks built by eager code may be used by compiled code too."""
    if torch.compiler.is_compiling():  # not compiled separately within compiled code
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention
    return compiled_flex_attention() if on_gpu else uncompiled_flex_attention


def uncompiled_flex_attention(*given: Any, **more: Any) -> Any:
    """Run FlexAttention on a CPU for tests, without its warning about speed."""
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flex_attention(*given, **more)


@cache
def compiled_flex_attention() -> Callable[..., Any]:
    """Return the kernel, compiled on the first call."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def training_attention(seen: Tensor, tokens: int) -> Attend:
    """Return attention for whole sequences: in blocks on GPUs, in chunks on CPUs."""
    return BlockAttention(seen, tokens) if seen.is_cuda else ChunkedAttention(seen, tokens)


def attention_among(frames: Frames, window: int, sink: int, causal: bool, tokens: int) -> Attend:
    """Return attention of a whole sequence by `visible`, with ``tokens`` per frame; built once for the same frames."""
    if torch.compiler.is_compiling():
        return training_attention(visible(frames, frames, window, sink, causal), tokens)
    key = (window, sink, causal, tokens)
    if key not in frames.attends:
        with torch.inference_mode(False):  # see `clip_frames`
            frames.attends[key] = training_attention(visible(frames, frames, window, sink, causal), tokens)
    return frames.attends[key]


def runs(numbers: list[int], scale: int) -> list[slice]:
    """Merge ascending numbers into ranges, multiplied by ``scale``: [0, 1, 4] -> [slice(0, 2), slice(4, 5)]."""
    breaks = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1), len(numbers)]
    return [slice(numbers[a] * scale, (numbers[b - 1] + 1) * scale) for a, b in pairwise(breaks)]
