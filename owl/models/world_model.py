"""World model: a frame-causal diffusion transformer over streams of latents, conditioned on controls."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from owl.errors import OwlError
from owl.models.sampling import Sampling
from owl.models.streams import Stream, declared
from owl.nn.attention import Attend, Frames, attention_among, clip_frames
from owl.nn.cache import CachedAttention, LayerCache, Ring
from owl.nn.rope import rope
from owl.nn.statistics import register_latent
from owl.nn.transformer import Block, ControlEmbedding, Head, NoiseLevelEmbedding, zero_linear

VIDEO = {"video": Stream((4, 12, 20), patch=2, modality="latent")}

Streams = dict[str, Tensor]
"""Latents by stream: "video" float[B, F, c, h, w], "audio" float[B, F, k, c], ..."""


@dataclass
class Controls:
    """Conditioning of each frame: the player's controls, which lead from the previous frame to this one, and latents.

    Attributes:
        buttons: float[B, F, number of buttons], 1 where one is down.
        axes: float[B, F, number of axes], movement in the unit of each axis.
        known: bool[B, F]; False: use the learned null control. None: all are known.
        given: Latents of given streams, standardised like the others. A missing stream is replaced by zeros, its mean.
    """

    buttons: Tensor
    axes: Tensor
    known: Tensor | None = None
    given: Streams = field(default_factory=dict)

    @staticmethod
    def joined(parts: Sequence["Controls"]) -> "Controls":
        """Concatenate controls of frames in time. All must have the same given streams."""
        return Controls(
            torch.cat([part.buttons for part in parts], 1),
            torch.cat([part.axes for part in parts], 1),
            torch.cat([part._all_known() for part in parts], 1),  # DDP requires the gradient of the null control
            {name: torch.cat([part.given[name] for part in parts], 1) for name in parts[0].given},
        )

    def at(self, frames: slice) -> "Controls":
        """Return the controls of some frames."""
        return Controls(
            self.buttons[:, frames],
            self.axes[:, frames],
            None if self.known is None else self.known[:, frames],
            {name: x[:, frames] for name, x in self.given.items()},
        )

    def _all_known(self) -> Tensor:
        if self.known is not None:
            return self.known
        return torch.ones(self.buttons.shape[:2], dtype=torch.bool, device=self.buttons.device)


@dataclass
class Cache:
    """KV cache of a rollout.

    Attributes:
        rings: Slot assignments by window.
        layers: Keys and values, one per layer.
        length: Number of committed frames since the start of the rollout, of which the last ones are cached.
    """

    rings: dict[int, Ring]
    layers: list[LayerCache]
    length: int = 0

    def tensors(self) -> list[Tensor]:
        """All state, for snapshots."""
        return [r.time for r in self.rings.values()] + [t for layer in self.layers for t in (layer.key, layer.value)]

    def read_only(self) -> "Cache":
        """Return a read-only copy for passes with gradients, which later commits do not change.

        Without a copy, recomputing activations in the backward pass would see frames committed in the meantime.
        """
        layers = [LayerCache(layer.key.clone(), layer.value.clone(), writable=False) for layer in self.layers]
        return Cache(deepcopy(self.rings), layers, self.length)


class WorldTransformer(nn.Module):
    """Predict the velocity of the rectified flow of every frame's latents from the previous frames.

    A frame consists of the tokens of the grid, shared by all streams on it, and those of each stream with separate
    tokens. Attention is causal over frames: a frame attends to itself, the previous ``window`` frames
    (``global_window`` in every ``global_every``-th layer), and the first ``sink`` frames. Noise level and controls are
    per frame and enter through adaLN (DiT, Peebles and Xie 2023); positions through rotary embedding in time, row and
    column, for rollouts of any length.

    The convention of the whole project: x_t = (1 - t) x0 + t eps with t in [0, 1], velocity v = eps - x0.

    Args:
        streams: The latents of a frame by name, see `Stream`. The inputs of streams on the grid after the first are
            initialised to zero, so that adding them to a trained model does not change its output (VideoJAM, Chefer et
            al. 2025).
        buttons: Names of the buttons, as the dataset has them.
        axes: Names of the axes.
        width: Channels of a token.
        depth: Layers.
        heads: Number of heads, each with a multiple of 16 channels.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of ``width``.
        window: Previous frames that a frame attends to in a local layer.
        global_window: The same in a global layer. Bounded, so that memory is constant in long rollouts.
        global_every: Every n-th layer is global; 0: none.
        sink: First frames that all later ones attend to. Their distance grows during a rollout, so rollouts that are
            longer than the training clips are out of distribution.
        checkpoint: Whether training recomputes activations in the backward pass to save memory.
        sampling: How frames are generated in rollouts and in play, unless options say otherwise.

    Attributes:
        streams: Streams by name; also divided into the dictionaries ``generated`` and ``given``.
        inputs: Shape of one frame's latent of every stream. For each the buffers ``<name>_mean``, ``<name>_std``
            (float, per channel) and ``<name>_encoder`` (uint8[8], fingerprint of the encoder) identify the latents that
            the network was trained on.
        latent_modalities: Modality in datasets of each stream.
        config: The arguments above as plain values; building from them gives a network of the same shape.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    def __init__(
        self,
        streams: dict[str, Stream] = VIDEO,
        buttons: list[str] = ["ATTACK", "MOVE_FORWARD", "MOVE_BACKWARD", "MOVE_LEFT", "MOVE_RIGHT"],  # noqa: B006
        axes: list[str] = ["mouse_x"],  # noqa: B006  (never changed; a list is what YAML gives)
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        window: int = 16,
        global_window: int = 64,
        global_every: int = 4,
        sink: int = 0,
        checkpoint: bool = False,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        self.streams = declared(streams)
        _check(width, depth, heads, mlp_ratio, window, global_window, global_every, sink)
        self.config: dict[str, Any] = {
            "streams": {name: asdict(stream) | {"shape": list(stream.shape)} for name, stream in self.streams.items()},
            "buttons": list(buttons),
            "axes": list(axes),
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "window": window,
            "global_window": global_window,
            "global_every": global_every,
            "sink": sink,
            "checkpoint": checkpoint,
        }
        self.sampling = Sampling(**sampling) if isinstance(sampling, dict) else sampling
        self.width, self.heads, self.sink = width, heads, sink
        self.buttons, self.axes, self.checkpoint = list(buttons), list(axes), checkpoint
        self.generated = {name: stream for name, stream in self.streams.items() if stream.role == "generated"}
        self.given = {name: stream for name, stream in self.streams.items() if stream.role == "given"}
        self.inputs = {name: stream.shape for name, stream in self.streams.items()}
        self.latent_modalities = {name: stream.modality or f"{name}_latent" for name, stream in self.streams.items()}
        on_grid = [name for name, stream in self.streams.items() if stream.on_grid]
        self.grid = self.streams[on_grid[0]].grid if on_grid else (0, 0)
        self.windows = [
            global_window if global_every and layer % global_every == global_every - 1 else window
            for layer in range(depth)
        ]

        self.level = NoiseLevelEmbedding(width)
        self.controls = ControlEmbedding(len(buttons), len(axes), width)
        for name, stream in self.streams.items():
            extends = name in on_grid[1:]
            make = zero_linear if extends else nn.Linear
            self.add_module(f"{name}_in", make(stream.features, width, bias=not extends))
            if stream.role == "generated":
                self.add_module(f"{name}_out", Head(width, stream.features))
            if stream.sinks:
                self.register_parameter(f"{name}_sinks", nn.Parameter(torch.randn(stream.sinks, width) * 0.02))
        self.blocks = nn.ModuleList(Block(width, heads, round(width * mlp_ratio)) for _ in range(depth))
        for name, stream in self.streams.items():
            register_latent(self, name, stream.channels)

    @property
    def sampling(self) -> Sampling:
        """How frames are generated in rollouts and in play, unless options say otherwise."""
        return Sampling(**self.config["sampling"])

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self.config["sampling"] = asdict(sampling)

    @property
    def outer(self) -> list[nn.Module]:
        """Inputs, outputs and modulations, see `owl.optim.configuration.parameter_groups`."""
        ends = [getattr(self, f"{name}_in") for name in self.streams] + [
            getattr(self, f"{name}_out") for name in self.generated
        ]
        return [self.level, self.controls, *ends, *(block.modulation for block in self.blocks)]

    @property
    def grid_tokens(self) -> int:
        """Tokens of a frame shared by the streams on the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Tokens per frame."""
        return sum(self._token_counts())

    def standardize(self, latents: Streams) -> Streams:
        """Standardise every channel with the statistics of the training data, in float32."""
        return {name: (x.float() - self._of(name, "mean")) / self._of(name, "std") for name, x in latents.items()}

    def restore(self, latents: Streams) -> Streams:
        """Undo `standardize`."""
        return {name: x.float() * self._of(name, "std") + self._of(name, "mean") for name, x in latents.items()}

    def _of(self, name: str, statistic: str) -> Tensor:
        return self.streams[name].by_channel(getattr(self, f"{name}_{statistic}"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WorldTransformer":
        """Keep the latent statistics in float32 when ``to`` changes the dtype of the network."""
        exact = {name: buffer for name, buffer in self._buffers.items() if name.endswith(("_mean", "_std"))}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if buffer is not None and (moved := self._buffers[name]) is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(
        self,
        latents: Streams,
        noise_level: Tensor,
        controls: Controls,
        frames: Frames | None = None,
        causal: bool = True,
        cache: Cache | None = None,
        apply: Callable[[Block, Tensor, Tensor, Tensor, Attend], Tensor] | None = None,
        residuals: Mapping[int, Tensor] | None = None,
        hidden: Sequence[int] = (),
    ) -> Streams | tuple[Streams, list[Tensor]]:
        """Predict the velocity of every generated stream.

        Args:
            latents: Standardised latents x_t of F frames. All inputs can have any dtype: the network computes in that
                of its weights.
            noise_level: float[B, F], t of each frame in [0, 1].
            controls: Controls of each frame.
            frames: Time, copy and document of each frame; None: F frames of one clip, in order.
            causal: Whether a frame attends only to earlier ones.
            cache: Keys and values of earlier frames, of `new_cache`; frames of copy 0 are added to it, unless it is
                read-only, which passes with gradients require.
            apply: Function that applies a block to the arguments of `Block.forward`, such as compiled code; None: the
                block itself.
            residuals: Residuals added to the output of a layer, by its number, float[B, F, tokens, width] (ControlNet,
                Zhang et al. 2023).
            hidden: Layers, from 0, whose outputs are also returned, for losses on features (REPA, Yu et al. 2024) and
                for heads of critics (DMD2, Yin et al. 2024).

        Returns:
            The velocity of each stream, shaped like its latents. With ``hidden``, a pair of these and of the layers'
            outputs after their residuals, float[B, F, tokens, width], in the order of ``hidden``.

        Raises:
            OwlError: A layer does not exist.
        """
        residuals = residuals or {}
        if unknown := {*residuals, *hidden}.difference(range(len(self.windows))):
            raise OwlError(
                "network.layer",
                f"there is no layer {min(unknown)}, the world model has layers 0 to {len(self.windows) - 1}; correct "
                "residuals or hidden",
            )
        if frames is None:
            frames = clip_frames(noise_level.shape[1], 1, noise_level.device)
        condition = nn.functional.silu(
            self.level(noise_level) + self.controls(controls.buttons, controls.axes, controls.known)
        )
        x = self.embed(latents | controls.given)
        rows, columns = self._positions(noise_level.device)
        turns = rope(frames.time, rows, columns, self.width // self.heads, self._placed(noise_level.device))
        if cache is None:
            by_window: dict[int, Attend] = {
                window: attention_among(frames, window, self.sink, causal, self.tokens)
                for window in sorted(set(self.windows))
            }
            attends = [by_window[window] for window in self.windows]
        else:
            attends = self._cached_attention(cache, frames)
        outputs: dict[int, Tensor] = {}
        for layer, (block, attend) in enumerate(zip(self.blocks, attends, strict=True)):
            if apply is not None:
                x = apply(block, x, condition, turns, attend)  # type: ignore[arg-type]
            elif self.checkpoint and self.training:
                x = activation_checkpoint(block, x, condition, turns, attend, use_reentrant=False)
            else:
                x = block(x, condition, turns, attend)
            if layer in residuals:
                x = x + residuals[layer]
            if layer in hidden:
                outputs[layer] = x
        velocities = self.unembed(x, condition)
        return (velocities, [outputs[layer] for layer in hidden]) if hidden else velocities

    def embed(self, latents: Streams) -> Tensor:
        """Embed latents as tokens, float[B, F, tokens, width]; given streams may be missing."""
        like = next(iter(latents.values()))
        on_grid: list[Tensor] = []
        own: list[Tensor] = []
        for name, stream in self.streams.items():
            layer = self.get_submodule(f"{name}_in")
            dtype: torch.dtype = layer.weight.dtype  # type: ignore[assignment]
            if name in latents:
                tokens = stream.tokens(latents[name]).to(dtype)
            elif name in self.given:
                tokens = stream.tokens(like.new_zeros(*like.shape[:2], *stream.shape, dtype=dtype))
            else:
                raise KeyError(name)
            (on_grid if stream.on_grid else own).append(layer(tokens))
            if stream.sinks:
                own.append(self.get_parameter(f"{name}_sinks").expand(*own[-1].shape[:2], -1, -1))
        parts = [reduce(add, on_grid), *own] if on_grid else own
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def unembed(self, x: Tensor, condition: Tensor) -> Streams:
        """Tokens to velocities."""
        grid, *own = x.split(self._token_counts(), 2)
        parts = iter(own)
        velocities = {}
        for name, stream in self.streams.items():
            tokens = grid if stream.on_grid else next(parts)[:, :, : stream.shape[0]]
            if name in self.generated:
                velocities[name] = stream.latent(self.get_submodule(f"{name}_out")(tokens, condition))
        return velocities

    def new_cache(
        self, batch: int, copies: int = 1, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Cache:
        """Create an empty cache.

        Args:
            batch: Number of rollouts.
            copies: Maximum number of noisy copies in a pass.
            dtype: Dtype of keys and values.
            device: Device of the cache.
        """
        rings = {window: Ring(window, self.sink, copies, device) for window in sorted(set(self.windows))}
        layers = []
        for window in self.windows:
            shape = (batch, self.heads, len(rings[window].time), self.tokens, self.width // self.heads)
            layers.append(
                LayerCache(
                    torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
                )
            )
        return Cache(rings, layers)

    def _cached_attention(self, cache: Cache, frames: Frames) -> list[Attend]:
        entered = {window: ring.enter(frames.time[0], frames.copy) for window, ring in cache.rings.items()}
        return [
            CachedAttention(layer, *entered[window]) for layer, window in zip(cache.layers, self.windows, strict=True)
        ]

    def _positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return row and column of each token; each stream with separate tokens has a row below the picture."""
        grid = torch.meshgrid(*(torch.arange(side, device=device) for side in self.grid), indexing="ij")
        rows, columns = ([part.flatten()] for part in grid)
        for number, count in enumerate(self._token_counts()[1:]):
            columns.append(torch.arange(count, device=device))
            rows.append(torch.full_like(columns[-1], self.grid[0] + number))
        return torch.cat(rows).float(), torch.cat(columns).float()

    def _placed(self, device: torch.device) -> Tensor | None:
        """Return whether each token has a position, bool[tokens]; None: all have one."""
        own = [stream for stream in self.streams.values() if not stream.on_grid]
        if not any(stream.sinks for stream in own):
            return None
        parts = [torch.ones(self.grid_tokens, dtype=torch.bool, device=device)]
        parts += [torch.arange(stream.own_tokens, device=device) < stream.shape[0] for stream in own]
        return torch.cat(parts)

    def _token_counts(self) -> list[int]:
        """Return the tokens per frame of the grid, then of each stream with separate tokens."""
        return [self.grid_tokens, *(stream.own_tokens for stream in self.streams.values() if not stream.on_grid)]


def _check(
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    window: int,
    global_window: int,
    global_every: int,
    sink: int,
) -> None:
    """Check the arguments; the error names the invalid value."""
    if depth < 1 or heads < 1 or width % heads or width // heads % 16:
        raise OwlError(
            "network.arguments",
            f"width {width}, heads {heads}, depth {depth}: expected at least one layer and heads of a multiple of 16 "
            "channels; change width or heads",
        )
    if round(width * mlp_ratio) < 1:
        raise OwlError(
            "network.arguments", f"mlp_ratio is {mlp_ratio:g}, expected a number above 0 such as 4; change mlp_ratio"
        )
    if window < 1 or sink < 0 or global_every < 0 or (global_every and global_window < window):
        raise OwlError(
            "network.arguments",
            f"window {window}, global_window {global_window}, global_every {global_every}, sink {sink}: expected a "
            "window of at least one frame, a global one no smaller, and no negative number; change them",
        )
