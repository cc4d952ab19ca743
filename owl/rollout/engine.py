"""The streaming engine: one frame at a time, memory bounded. Validation, play, benchmarks and self forcing share it.

Two passes per frame, one to denoise it and one to write its clean version into the cache, are made one: the pass that
commits frame n takes the first denoising step of frame n + 1 too. It is exact, and reads the weights once.
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from owl import models
from owl.errors import OwlError
from owl.flow_matching import Step, adams_bashforth, add_noise, consistency, euler
from owl.latents import encoder_of
from owl.models.world_model import Cache, Controls, Streams, WorldTransformer
from owl.nn.attention import Frames
from owl.nn.compilation import can_compile
from owl.nn.placement import placement
from owl.precision.inference import Quantization, quantize
from owl.rollout.compiled import CompiledBlocks

Sampler = Literal["adams_bashforth", "euler", "consistency"]
SAMPLERS = {"adams_bashforth": adams_bashforth, "euler": euler, "consistency": consistency}


@dataclass(frozen=True)
class Frame:
    """One generated frame.

    Attributes:
        latents: Of every stream, as the encoder makes them: "video" float[B, c, h, w], "audio" float[B, k, c], ...
        decoded: What the decoders made of them: "video" float[B, 3, H, W] in [-1, 1], ...
        seconds: Time spent: "commit" (of the frame before, with this one's first denoising step), "denoise" (the
            other steps), "decode".
    """

    latents: Streams
    decoded: dict[str, Tensor]
    seconds: dict[str, float]


@dataclass
class Snapshot:
    """A rollout's whole state."""

    cache: list[Tensor]
    pending: tuple[Streams, Controls] | None
    time: int
    random: Tensor


class Engine:
    """Rolls a world model out, frame by frame.

    Args:
        network: The world model.
        decoders: For any of its streams a network with ``decode(latent float[B, ...])``; others are not decoded.
        levels: Noise levels of the steps of a frame, from 1 down; the last step ends at 0.
        sampler: "adams_bashforth" (of second order; a single step is Euler's), "euler", or "consistency" for few-step
            students.
        context_level: Noise level at which frames are committed; the training's context noise covers it.
        guidance: Weight w of classifier-free guidance, null + w (conditional - null); 1 costs nothing. Both
            predictions are copies of the frame within one pass, over one cache.
        one_pass: Whether committing a frame waits for the next frame's first denoising step. False commits at once:
            more work per frame, less between the controls and their frame.
        dtype: Of weights and cache, e.g. torch.bfloat16; None keeps the network's. The network given is not changed.
            Frames, noise and the latents' statistics are float32 all the same: their errors would add up.
        quantization: Stores the weights of linear layers in eight bits, the decoders' too; see
            `owl.precision.inference.quantize`.
        compile: Whether blocks run through ``torch.compile``. That happens in the background: frames are made eagerly
            until what is compiled was compared with the eager block, or for ever, with a warning, where compiling
            fails. The code is kept for the next start, see `owl.rollout.compiled.cache_folder`.
        device: Where to run.

    Raises:
        OwlError: The settings make no sense, the device does not run the quantisation, or a decoder is of another
            encoder than the world model was trained with.
    """

    def __init__(
        self,
        network: WorldTransformer,
        decoders: dict[str, nn.Module] | None = None,
        *,
        levels: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
        sampler: Sampler = "adams_bashforth",
        context_level: float = 0.0,
        guidance: float = 1.0,
        one_pass: bool = True,
        dtype: torch.dtype | None = None,
        quantization: Quantization | None = None,
        compile: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if not levels or levels[0] != 1 or any(a <= b for a, b in zip(levels, [*levels[1:], 0.0], strict=True)):
            raise OwlError(
                "engine.levels",
                f"levels are {list(levels)}, expected falling noise levels from 1 to above 0; correct them",
            )
        if sampler not in SAMPLERS:
            raise OwlError("engine.sampler", f'sampler is "{sampler}", expected {" or ".join(SAMPLERS)}')
        for name, decoder in (decoders or {}).items():
            check_decoder(network, name, decoder)
        self.network = deepcopy(network).eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.decoders = {name: decoder.to(device) for name, decoder in (decoders or {}).items()}
        self.quantization = quantization
        if quantization is not None:
            quantize(self.network, quantization)
            self.decoders = {name: deepcopy(decoder) for name, decoder in self.decoders.items()}
            for decoder in self.decoders.values():
                quantize(decoder, quantization)
        self.dtype = placement(self.network).dtype
        self.device = torch.device(device)
        self.levels = [*map(float, levels), 0.0]
        self.sampler, self.context_level, self.guidance, self.one_pass = sampler, context_level, guidance, one_pass
        self.batch = 0  # no rollout yet
        self.compile = compile and can_compile(self.device.type)
        self._blocks = CompiledBlocks(self.network, quantization) if self.compile else None

    @classmethod
    def load(
        cls, world_model: str | Path, decoders: dict[str, str | Path] | None = None, **settings: object
    ) -> "Engine":
        """Build an engine from files.

        Args:
            world_model: Checkpoint or export of a world model.
            decoders: Checkpoint or export of the autoencoder of each stream to be decoded, e.g. {"video": ...}.
            settings: See `Engine`.

        Raises:
            OwlError: A file is missing or holds something else.
        """
        network = as_world_model(models.load(world_model), world_model)
        loaded = {name: models.load(path) for name, path in (decoders or {}).items()}
        return cls(network, loaded, **settings)  # type: ignore[arg-type]

    @torch.no_grad()
    def reset(
        self, context: Streams | None = None, controls: Controls | None = None, batch: int = 1, seed: int = 0
    ) -> None:
        """Begin a rollout.

        Args:
            context: Latents of the frames that came before, as the encoder makes them ("video" float[B, T, c, h, w],
                ...), any number of them; None begins from nothing.
            controls: Of each of these frames, and their conditioning as its encoder makes it.
            batch: Rollouts side by side, where there is no context to tell.
            seed: Of all noise; equal seeds give equal rollouts.

        Raises:
            OwlError: Context and controls do not fit each other or the world model, or hold no frame or no numbers.
        """
        if context is not None:
            if controls is None:
                raise OwlError(
                    "context.controls",
                    "the context has no controls, those of each of its frames were expected; give them",
                )
            batch = _check_context(self.network, context, controls)
        self.batch, self.time = batch, 0
        self._random = torch.Generator().manual_seed(seed)
        self._prepare(batch)
        self.cache: Cache = self.network.new_cache(batch, self._copies, self.dtype, self.device)
        self._pending: tuple[Streams, Controls] | None = None
        if context is None or controls is None:
            return
        latents = self.network.standardize({name: x.to(self.device) for name, x in context.items()})
        for t in range(controls.buttons.shape[1]):
            self._commit()
            shown = {name: x[:, t : t + 1] for name, x in latents.items()}
            scene = None if controls.conditioning is None else controls.conditioning[:, t]
            self._await_commit(shown, self._controls(controls.buttons[:, t], controls.axes[:, t], scene))
            self.time += 1
        if not self.one_pass:
            self._commit()

    def wait_compiled(self, batch: int | None = None) -> bool:
        """Wait until everything is compiled, so that equal seeds give equal frames and times are those of later.

        Args:
            batch: Of the rollouts to come, before ``reset``; None for those at hand.

        Returns:
            Whether the code that runs is compiled. False at once where it is not to be, and where compiling fails.

        Raises:
            OwlError: Without a batch, ``reset`` was not called.
        """
        if batch is None:
            self._check_begun()
        else:
            self._prepare(batch)
        return self._blocks is not None and self._blocks.wait()

    @torch.no_grad()
    def step(self, buttons: Tensor, axes: Tensor, conditioning: Tensor | None = None) -> Frame:
        """Generate the next frame.

        Args:
            buttons: float[B, number of buttons], 1 where one is down.
            axes: float[B, number of axes], movement in the axis's own unit.
            conditioning: float[B, conditioning channels, h, w], as its encoder makes it; None: nothing is given.

        Returns:
            The frame that these controls lead to.

        Raises:
            OwlError: ``reset`` was not called, or the controls or the conditioning are of another batch or another
                world model.
        """
        self._check_step(buttons, axes, conditioning)
        start = self._clock()
        controls = self._controls(buttons, axes, conditioning)
        x = {name: self._noise(shape) for name, shape in self.network.streams.items()}
        committed, before = start, 1.0
        earlier: Streams = {}
        for number, (level, following) in enumerate(zip(self.levels, self.levels[1:], strict=False)):
            velocity = self._velocity(x, level, controls)
            if number == 0:
                committed = self._clock()
            for name in x:
                v = velocity[name]
                fresh = self._noise(v.shape[2:]) if self.sampler == "consistency" else v
                x[name] = SAMPLERS[self.sampler](Step(x[name], v, level, following, earlier.get(name), before, fresh))
            earlier, before = velocity, level
        self._await_commit(x, controls)
        self.time += 1
        if not self.one_pass:
            self._commit()
        denoised = self._clock()
        latents = {name: latent[:, 0] for name, latent in self.network.restore(x).items()}
        decoded = {name: self._decode(name, latents[name]) for name in self.decoders}
        seconds = {"commit": committed - start, "denoise": denoised - committed, "decode": self._clock() - denoised}
        return Frame(latents, decoded, seconds)

    def snapshot(self) -> Snapshot:
        """Copy the rollout's state.

        Raises:
            OwlError: ``reset`` was not called.
        """
        self._check_begun()
        pending = deepcopy(self._pending)
        return Snapshot([t.clone() for t in self.cache.tensors()], pending, self.time, self._random.get_state())

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a state of this rollout.

        Raises:
            OwlError: ``reset`` was not called, or the snapshot is of another batch size, network or cache.
        """
        self._check_begun()
        found = snapshot.cache[-1].shape[0]
        if found != self.batch:
            raise OwlError(
                "engine.snapshot",
                f"the snapshot holds {found} rollouts, {self.batch} run now; reset with that batch first",
            )
        if [t.shape for t in snapshot.cache] != [t.shape for t in self.cache.tensors()]:
            raise OwlError(
                "engine.other-snapshot",
                "the snapshot is of another world model or of an engine with other guidance, one of this engine was "
                "expected; restore it there",
            )
        for tensor, stored in zip(self.cache.tensors(), snapshot.cache, strict=True):
            tensor.copy_(stored)
        self._pending, self.time = deepcopy(snapshot.pending), snapshot.time
        self._random.set_state(snapshot.random)

    @property
    def _copies(self) -> int:
        """Noisy copies of a frame in one pass."""
        return 1 if self.guidance == 1 else 2

    def _prepare(self, batch: int) -> None:
        """Begin to compile what rollouts of this batch run."""
        if self._blocks is not None:
            joined = [self._copies + 1] if self.one_pass else []
            self._blocks.prepare(batch, list(dict.fromkeys([self._copies, *joined, 1])), self._copies)

    def _velocity(self, x: Streams, level: float, controls: Controls) -> Streams:
        """Predict the velocity of the frame at hand, committing the one before in the same pass if that is due."""
        noisy = [(x, level, controls, 1)]
        if self.guidance != 1:
            unknown = torch.zeros_like(controls.buttons[..., 0], dtype=torch.bool)
            noisy.append((x, level, replace(controls, known=unknown), 2))
        velocity = self._pass([*self._take_pending(), *noisy])
        if self.guidance == 1:
            return {name: v[:, -1:].float() for name, v in velocity.items()}
        velocity = {name: v.float() for name, v in velocity.items()}
        return {name: v[:, -1:] + self.guidance * (v[:, -2:-1] - v[:, -1:]) for name, v in velocity.items()}

    def _await_commit(self, latents: Streams, controls: Controls) -> None:
        """Have a frame committed by the next pass, with its context noise: drawn now, however many passes there are."""
        if self.context_level:
            level = torch.full((self.batch, 1), self.context_level, device=self.device)
            latents = {name: add_noise(x, self._noise(x.shape[2:]), level) for name, x in latents.items()}
        self._pending = (latents, controls)

    def _take_pending(self) -> list[tuple[Streams, float, Controls, int]]:
        """The frame that waits to be committed, as part of a pass; none if none waits."""
        if self._pending is None:
            return []
        (latents, controls), self._pending = self._pending, None
        return [(latents, self.context_level, controls, 0)]

    def _commit(self) -> None:
        """Write the frame that waits into the cache by a pass of its own."""
        if self._pending is not None:
            self._pass(self._take_pending())

    def _pass(self, parts: list[tuple[Streams, float, Controls, int]]) -> Streams:
        """Run the network on frames given as (latents, noise level, controls, copy)."""
        latents = {name: torch.cat([part[0][name] for part in parts], 1) for name in self.network.streams}
        levels = torch.tensor([part[1] for part in parts], device=self.device)
        scenes = [scene for part in parts if (scene := part[2].conditioning) is not None]  # of all frames or of none
        controls = Controls(
            torch.cat([part[2].buttons for part in parts], 1),
            torch.cat([part[2].axes for part in parts], 1),
            torch.cat([_known(part[2]) for part in parts], 1),
            torch.cat(scenes, 1) if scenes else None,
        )
        copies = torch.tensor([part[3] for part in parts], device=self.device)
        now = torch.where(copies == 0, self.time - 1, self.time)
        if self._blocks is not None:
            self._blocks.tell()
        return self.network(
            latents,
            levels.expand(self.batch, -1),
            controls,
            Frames(now[None], copies),
            cache=self.cache,
            apply=self._blocks,
        )

    def _controls(self, buttons: Tensor, axes: Tensor, conditioning: Tensor | None) -> Controls:
        """What is given for one frame, as the network takes it."""
        given = None
        if "conditioning" in self.network.inputs:
            if conditioning is None:  # standardised, nothing is the mean
                given = buttons.new_zeros(self.batch, *self.network.inputs["conditioning"])
            else:
                given = self.network.standardize({"conditioning": conditioning.to(self.device)})["conditioning"]
            given = given[:, None].to(self.device, torch.float32)
        pressed, moved = (x[:, None].to(self.device, torch.float32) for x in (buttons, axes))
        return Controls(pressed, moved, conditioning=given)

    def _noise(self, shape: Sequence[int]) -> Tensor:
        # drawn on the CPU, so that a seed means the same everywhere
        return torch.randn(self.batch, 1, *shape, generator=self._random).to(self.device)

    def _decode(self, name: str, latent: Tensor) -> Tensor:
        decoder = self.decoders[name]
        return decoder.decode(latent.to(placement(decoder).dtype)).float()  # type: ignore[operator]

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _check_begun(self) -> None:
        if not self.batch:
            raise OwlError("engine.not-reset", "the engine has no rollout yet; call reset first")

    def _check_step(self, buttons: Tensor, axes: Tensor, conditioning: Tensor | None) -> None:
        self._check_begun()
        network = self.network
        for kind, values, names in (("buttons", buttons, network.buttons), ("axes", axes, network.axes)):
            if tuple(values.shape) != (self.batch, len(names)):
                raise OwlError(
                    "engine.shape",
                    f"{kind} have shape {list(values.shape)}, expected {[self.batch, len(names)]}: one row for each "
                    f"rollout since reset, one column for each of {', '.join(names) or 'no ' + kind}",
                )
        expected = [self.batch, network.conditioning_channels, *network.streams["video"][1:]]
        if conditioning is not None and list(conditioning.shape) != expected:
            raise OwlError(
                "engine.shape",
                f"the conditioning has shape {list(conditioning.shape)}, expected {expected}: one row for each rollout "
                "since reset, the channels that the world model was trained with; correct it or leave it out",
            )


def _known(controls: Controls) -> Tensor:
    if controls.known is not None:
        return controls.known
    return torch.ones(controls.buttons.shape[:2], dtype=torch.bool, device=controls.buttons.device)


def as_world_model(network: nn.Module, path: str | Path) -> WorldTransformer:
    """What was loaded from a file, where it is a world model.

    Raises:
        OwlError: It is something else.
    """
    if not isinstance(network, WorldTransformer):
        raise OwlError(
            "network.kind",
            f"{path} holds a {type(network).__qualname__}, a world model was expected; give a checkpoint of the recipe "
            "owl.recipes.world_model.WorldModel or its export",
        )
    return network


def check_decoder(network: WorldTransformer, name: str, decoder: nn.Module) -> None:
    """Refuse a decoder that is not of the encoder that a world model was trained with.

    Raises:
        OwlError: It is not.
    """
    if name not in network.streams:
        raise OwlError(
            "decoder.stream",
            f"there is a decoder for {name}, the world model has {', '.join(network.streams)}; leave it out",
        )
    if not isinstance(getattr(decoder, "encoder", None), nn.Module):
        raise OwlError(
            "decoder.kind",
            f"the {name} decoder is a {type(decoder).__name__}, an autoencoder with its encoder was expected, "
            "which tells whether it fits the world model; give that",
        )
    expected = encoder_of(network, name)
    found = models.fingerprint(decoder.encoder)  # type: ignore[arg-type]
    if found != expected:
        raise OwlError(
            "decoder.encoder",
            f"the {name} decoder belongs to encoder {found}, the world model was trained on latents of encoder "
            f"{expected}; give the autoencoder that encoded its dataset, or a decoder trained on it",
        )


def _check_context(network: WorldTransformer, context: Streams, controls: Controls) -> int:
    """Return the batch size of a valid context."""
    batch, length = controls.buttons.shape[:2]
    if length == 0:
        raise OwlError(
            "context.empty",
            "the context holds 0 frames, at least one was expected; give some, or None to begin from nothing",
        )
    expected: dict[str, tuple[int, ...]] = {name: (batch, length, *s) for name, s in network.streams.items()}
    for name, shape in expected.items():
        if name not in context or tuple(context[name].shape) != shape:
            found = list(context[name].shape) if name in context else "missing"
            raise OwlError(
                "context.shape",
                f"the context's {name} is {found}, expected {list(shape)} for these controls; correct it",
            )
        if not context[name].isfinite().all():
            raise OwlError(
                "context.non-finite",
                f"the context's {name} holds NaN or infinite numbers, latents were expected; encode it anew",
            )
    scene, size = controls.conditioning, (batch, length, network.conditioning_channels, *network.streams["video"][1:])
    if scene is not None and tuple(scene.shape) != size:
        raise OwlError(
            "context.shape", f"the context's conditioning is {list(scene.shape)}, expected {list(size)}; correct it"
        )
    for kind, values, names in (
        ("buttons", controls.buttons, network.buttons),
        ("axes", controls.axes, network.axes),
    ):
        if tuple(values.shape) != (batch, length, len(names)):
            raise OwlError(
                "context.shape",
                f"the context's {kind} are {list(values.shape)}, expected {[batch, length, len(names)]}: one column "
                f"for each of {', '.join(names) or 'no ' + kind}",
            )
    return int(batch)
