"""A frame-causal diffusion transformer over latent video and audio, conditioned on controls: the world model."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from owl.errors import OwlError
from owl.nn.attention import Attend, Frames, attention_among, clip_frames
from owl.nn.cache import CachedAttention, LayerCache, Ring
from owl.nn.rotary import rotation
from owl.nn.transformer import Block, ControlEmbedding, Head, LevelEmbedding, zero_linear

Streams = dict[str, Tensor]
"""Latents of every stream: "video" float[B, F, c, h, w], and where the model has them "audio" float[B, F, k, c] and
"motion" float[B, F, m, h, w]."""


@dataclass
class Controls:
    """What is given for each frame: above all what the player does, which leads from the frame before to this one.

    Attributes:
        buttons: float[B, F, number of buttons], 1 where one is down.
        axes: float[B, F, number of axes], movement in the axis's own unit.
        known: bool[B, F]; where False, the learned null control stands in. None: all are known.
        conditioning: float[B, F, conditioning channels, h, w], a latent of what the frame is to show, such as its
            encoded depth, standardised like the others. None: nothing is given.
    """

    buttons: Tensor
    axes: Tensor
    known: Tensor | None = None
    conditioning: Tensor | None = None


@dataclass
class Cache:
    """Keys and values of a rollout, and which frames they belong to.

    Attributes:
        rings: By window.
        layers: One per layer.
        length: Frames committed since the rollout began, of which the last ones are kept.
    """

    rings: dict[int, Ring]
    layers: list[LayerCache]
    length: int = 0

    def tensors(self) -> list[Tensor]:
        """All state, for snapshots."""
        return [r.time for r in self.rings.values()] + [t for layer in self.layers for t in (layer.key, layer.value)]

    def read_only(self) -> "Cache":
        """A copy that passes with gradients see and do not write, and that later commits to this one do not reach.

        Were it not a copy, recomputing activations in the backward pass would see frames that did not exist yet.
        """
        layers = [LayerCache(layer.key.clone(), layer.value.clone(), writable=False) for layer in self.layers]
        return Cache(deepcopy(self.rings), layers, self.length)


class WorldTransformer(nn.Module):
    """Predicts the velocity of the rectified flow of every frame's latents from the frames before it.

    A frame is ``h / patch * w / patch`` video tokens, then its audio tokens. Attention is causal over frames: a frame
    sees itself and the ``window`` frames before it (every ``global_every``-th layer: ``global_window`` frames), and the
    first ``sink`` frames always. Noise level and controls belong to frames and enter through adaLN (DiT, Peebles and
    Xie 2023); positions through rotary embedding in time, row and column, for rollouts of any length.

    The convention of the whole project: x_t = (1 - t) x0 + t eps with t in [0, 1], velocity v = eps - x0.

    Args:
        latent: (channels, height, width) of a frame's video latent.
        patch: Side of the squares of latent positions that become one token.
        buttons: Names of the buttons, as the dataset has them.
        axes: Names of the axes.
        width: Channels of a token.
        depth: Layers.
        heads: Heads, each of a multiple of 16 channels.
        mlp_ratio: Channels within the MLPs, as a multiple of ``width``.
        window: Frames before itself that a frame sees in a local layer.
        global_window: The same in a global layer. Bounded, so that memory stays flat however long a rollout is.
        global_every: Every n-th layer is global; 0: none.
        sink: First frames that all later ones see. Their distance grows with the rollout, so train with clips as long
            as those that will be played, or expect to leave what was trained.
        audio: (tokens per frame, channels) of audio latents; absent without sound.
        motion_channels: Channels of a second latent on the video's grid that is generated along with it, such as
            encoded flow or depth (VideoJAM, Chefer et al. 2025). Its input begins at zero, so that a model extended
            by it begins as the model it extends.
        conditioning_channels: Channels of a given latent on the video's grid, such as an encoded depth or a rendered
            point cloud of the frame to come; its input begins at zero too.
        checkpoint: Whether training recomputes activations in the backward pass to save memory.

    Attributes:
        streams: Shape of every generated stream's latent of one frame.
        inputs: The same with the latent that is given, "conditioning", where there is one. For each of these the
            buffers ``<name>_mean``, ``<name>_std`` (float, per channel) and ``<name>_encoder`` (uint8[8], fingerprint
            of the encoder) say which latents the network was trained on.
        config: The arguments above as plain values; building from them gives a network of the same shape.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    def __init__(
        self,
        latent: tuple[int, int, int] = (4, 12, 20),
        patch: int = 2,
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
        audio: tuple[int, int] | None = None,
        motion_channels: int = 0,
        conditioning_channels: int = 0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        _check(latent, patch, width, depth, heads, window, global_window, global_every, sink)
        _check_channels(width, mlp_ratio, audio, motion_channels, conditioning_channels)
        self.config: dict[str, Any] = {
            "latent": list(latent),
            "patch": patch,
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
            "audio": list(audio) if audio else None,
            "motion_channels": motion_channels,
            "conditioning_channels": conditioning_channels,
            "checkpoint": checkpoint,
        }
        channels, height, columns = latent
        self.patch, self.width, self.heads, self.sink = patch, width, heads, sink
        self.buttons, self.axes = list(buttons), list(axes)
        self.conditioning_channels, self.checkpoint = conditioning_channels, checkpoint
        self.grid = (height // patch, columns // patch)
        self.windows = [
            global_window if global_every and layer % global_every == global_every - 1 else window
            for layer in range(depth)
        ]
        self.streams: dict[str, tuple[int, ...]] = {"video": (channels, height, columns)}
        if audio:
            self.streams["audio"] = (int(audio[0]), int(audio[1]))
        if motion_channels:
            self.streams["motion"] = (motion_channels, height, columns)

        self.level = LevelEmbedding(width)
        self.controls = ControlEmbedding(len(buttons), len(axes), width)
        self.video_in = nn.Linear(channels * patch**2, width)
        self.video_out = Head(width, channels * patch**2)
        if audio:
            self.audio_in = nn.Linear(audio[1], width)
            self.audio_out = Head(width, audio[1])
        if motion_channels:
            self.motion_in = zero_linear(motion_channels * patch**2, width, bias=False)
            self.motion_out = Head(width, motion_channels * patch**2)
        if conditioning_channels:
            self.conditioning_in = zero_linear(conditioning_channels * patch**2, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads, round(width * mlp_ratio)) for _ in range(depth))
        self.inputs = dict(self.streams)
        if conditioning_channels:
            self.inputs["conditioning"] = (conditioning_channels, height, columns)
        for name, shape in self.inputs.items():
            channels_of = shape[-1] if name == "audio" else shape[0]
            self.register_buffer(f"{name}_mean", torch.zeros(channels_of))
            self.register_buffer(f"{name}_std", torch.ones(channels_of))
            self.register_buffer(f"{name}_encoder", torch.zeros(8, dtype=torch.uint8))

    @property
    def video_tokens(self) -> int:
        """Video tokens per frame."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Tokens per frame, video and audio."""
        return self.video_tokens + (self.streams["audio"][0] if "audio" in self.streams else 0)

    def standardize(self, latents: Streams) -> Streams:
        """Bring every channel to mean 0 and standard deviation 1 over the training data, in float32."""
        return {name: (x.float() - self._of(name, "mean")) / self._of(name, "std") for name, x in latents.items()}

    def restore(self, latents: Streams) -> Streams:
        """Undo `standardize`."""
        return {name: x.float() * self._of(name, "std") + self._of(name, "mean") for name, x in latents.items()}

    def _of(self, name: str, statistic: str) -> Tensor:
        values: Tensor = getattr(self, f"{name}_{statistic}")
        return values if name == "audio" else values[:, None, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WorldTransformer":
        """Keep the latents' statistics in float32 where ``to`` gives the network another dtype."""
        exact = {name: buffer for name, buffer in self._buffers.items() if name.endswith(("_mean", "_std"))}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if buffer is not None and (moved := self._buffers[name]) is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(
        self,
        latents: Streams,
        level: Tensor,
        controls: Controls,
        frames: Frames | None = None,
        causal: bool = True,
        cache: Cache | None = None,
        apply: Callable[[Block, Tensor, Tensor, Tensor, Attend], Tensor] | None = None,
    ) -> Streams:
        """Velocity of every stream.

        Args:
            latents: Standardised latents x_t of F frames, of any dtype, as everything else that is given: the network
                computes in that of its weights.
            level: float[B, F], the noise level t of each frame in [0, 1].
            controls: Of each frame.
            frames: Time, copy and document of each frame; None: F frames of one clip, in order.
            causal: Whether a frame sees earlier ones only.
            cache: Keys and values of earlier frames, of `new_cache`; frames of copy 0 are added to it, unless it is
                read-only, as it must be where gradients are wanted.
            apply: What applies a block to what `Block.forward` takes, such as compiled code; None: the block itself.

        Returns:
            For each stream the velocity, shaped like its latents.
        """
        if frames is None:
            frames = clip_frames(level.shape[1], 1, level.device)
        condition = nn.functional.silu(
            self.level(level) + self.controls(controls.buttons, controls.axes, controls.known)
        )
        x = self.embed(latents, controls.conditioning)
        rows, columns = self._positions(level.device)
        turns = rotation(frames.time, rows, columns, self.width // self.heads)
        if cache is None:
            by_window: dict[int, Attend] = {
                window: attention_among(frames, window, self.sink, causal, self.tokens)
                for window in sorted(set(self.windows))
            }
            attends = [by_window[window] for window in self.windows]
        else:
            attends = self._cached_attention(cache, frames)
        for block, attend in zip(self.blocks, attends, strict=True):
            if apply is not None:
                x = apply(block, x, condition, turns, attend)  # type: ignore[arg-type]
            elif self.checkpoint and self.training:
                x = activation_checkpoint(block, x, condition, turns, attend, use_reentrant=False)
            else:
                x = block(x, condition, turns, attend)
        return self.unembed(x, condition)

    def embed(self, latents: Streams, conditioning: Tensor | None) -> Tensor:
        """Latents to tokens, float[B, F, tokens, width]."""
        dtype = self.video_in.weight.dtype
        x = self.video_in(self._patches(latents["video"]).to(dtype))
        if "motion" in self.streams:
            x = x + self.motion_in(self._patches(latents["motion"]).to(dtype))
        if conditioning is not None:
            x = x + self.conditioning_in(self._patches(conditioning).to(dtype))
        if "audio" in self.streams:
            x = torch.cat([x, self.audio_in(latents["audio"].to(dtype))], 2)
        return x

    def unembed(self, x: Tensor, condition: Tensor) -> Streams:
        """Tokens to velocities."""
        video = x[:, :, : self.video_tokens]
        velocities = {"video": self._pixels(self.video_out(video, condition))}
        if "motion" in self.streams:
            velocities["motion"] = self._pixels(self.motion_out(video, condition))
        if "audio" in self.streams:
            velocities["audio"] = self.audio_out(x[:, :, self.video_tokens :], condition)
        return velocities

    def new_cache(
        self, batch: int, copies: int = 1, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Cache:
        """An empty cache.

        Args:
            batch: Rollouts side by side.
            copies: Noisy copies that a pass may hold.
            dtype: Of keys and values.
            device: Of everything.
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

    def _patches(self, latent: Tensor) -> Tensor:
        return rearrange(latent, "b f c (h p) (w q) -> b f (h w) (c p q)", p=self.patch, q=self.patch)

    def _pixels(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b f (h w) (c p q) -> b f c (h p) (w q)", h=self.grid[0], p=self.patch, q=self.patch)

    def _positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and column of each token; audio lies in a row of its own below the picture."""
        rows, columns = torch.meshgrid(
            torch.arange(self.grid[0], device=device), torch.arange(self.grid[1], device=device), indexing="ij"
        )
        audio = torch.arange(self.tokens - self.video_tokens, device=device)
        row = torch.cat([rows.flatten(), torch.full_like(audio, self.grid[0])])
        return row.float(), torch.cat([columns.flatten(), audio]).float()


def _check(
    latent: tuple[int, int, int],
    patch: int,
    width: int,
    depth: int,
    heads: int,
    window: int,
    global_window: int,
    global_every: int,
    sink: int,
) -> None:
    """Refuse what cannot be built, naming the value at fault."""
    if len(latent) != 3 or min(latent) < 1:
        raise OwlError(
            "network.arguments", f"latent is {list(latent)}, expected channels, height and width; correct latent"
        )
    if patch < 1 or latent[1] % patch or latent[2] % patch:
        raise OwlError(
            "network.arguments",
            f"patch is {patch}, expected a divisor of the latent's {latent[1]}x{latent[2]} positions; change patch",
        )
    if depth < 1 or heads < 1 or width % heads or width // heads % 16:
        raise OwlError(
            "network.arguments",
            f"width {width}, heads {heads}, depth {depth}: expected at least one layer and heads of a multiple of 16 "
            "channels; change width or heads",
        )
    if window < 1 or sink < 0 or global_every < 0 or (global_every and global_window < window):
        raise OwlError(
            "network.arguments",
            f"window {window}, global_window {global_window}, global_every {global_every}, sink {sink}: expected a "
            "window of at least one frame, a global one no smaller, and no negative number; change them",
        )


def _check_channels(
    width: int, mlp_ratio: float, audio: tuple[int, int] | None, motion_channels: int, conditioning_channels: int
) -> None:
    """The same for the number of channels of everything else."""
    if round(width * mlp_ratio) < 1:
        raise OwlError(
            "network.arguments", f"mlp_ratio is {mlp_ratio:g}, expected a number above 0 such as 4; change mlp_ratio"
        )
    if audio and (len(audio) != 2 or min(audio) < 1):
        raise OwlError(
            "network.arguments",
            f"audio is {list(audio)}, expected tokens per frame and channels; correct audio or leave it out",
        )
    for name, channels in (("motion_channels", motion_channels), ("conditioning_channels", conditioning_channels)):
        if channels < 0:
            raise OwlError(
                "network.arguments", f"{name} is {channels}, expected 0 or a number of channels; correct {name}"
            )
