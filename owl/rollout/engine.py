"""Streaming engine: generates rollouts of a world model one frame at a time, with constant memory.

It holds the state for `owl.rollout.generate`: a copy of the network, optionally quantised and compiled, the cache, the
generators and the decoders.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from owl import models
from owl.errors import OwlError
from owl.models.world_model import Cache, Controls, Streams, WorldTransformer
from owl.nn.compilation import can_compile
from owl.nn.placement import placement
from owl.precision.inference import Quantization, quantize
from owl.rollout.checks import check_context, check_decoder, check_guidance, check_step
from owl.rollout.compiled import CompiledBlocks
from owl.rollout.generate import Context, Sampler, Schedule, as_context, commit_frame, denoise
from owl.rollout.loading import load_world_model
from owl.rollout.sound import SoundDecoder

T = TypeVar("T")


class Decoded(Mapping[str, Tensor]):
    """Decoded latents of a frame by the name of their stream; reading one waits until it is decoded.

    Args:
        parts: Functions that return them, each from any thread and any number of times.
    """

    def __init__(self, parts: dict[str, Callable[[], Tensor]]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


@dataclass(frozen=True)
class Frame:
    """One generated frame.

    Attributes:
        latents: Latents of every stream, not standardised: "video" float[B, c, h, w], "audio" float[B, k, c], ...
        decoded: Decoded latents: "video" float[B, 3, H, W] in [-1, 1], "audio" float[B, channels, samples], the sound
            that is now determined (`owl.rollout.sound.SoundDecoder`), ... On a CPU sound is decoded while the next
            frame is made; reading it waits for it.
        seconds: Time spent: "commit" (of the previous frame, with this one's first denoising step), "denoise" (the
            other steps), "decode" (what is not decoded while the next frame is made).
    """

    latents: Streams
    decoded: Mapping[str, Tensor]
    seconds: dict[str, float]


@dataclass
class Snapshot:
    """State of a rollout: the cache, the number of frames, the pending frame, the generator, the last pictures and the
    decoders of sound."""

    cache: list[Tensor]
    length: int
    pending: Context | None
    random: Tensor
    decoded: dict[str, Tensor]
    sound: dict[str, SoundDecoder]


class Engine:
    """Generate rollouts of a world model, frame by frame.

    Args:
        network: The world model.
        decoders: By stream, networks with ``decode(latent float[B, ...])``; other streams are not decoded. One with the
            attribute ``previous`` also gets the frame that it decoded before; see
            `owl.models.image_decoder.ImageDecoder`. One with ``stream`` decodes sound, see
            `owl.rollout.sound.SoundDecoder`.
        noise_levels: Noise levels of the steps of a frame, from 1 down; the last step ends at 0. This and the next
            three arguments are by default the world model's ``sampling``.
        sampler: "adams_bashforth" (of second order; a single step is Euler's), "euler", or "consistency" for few-step
            students.
        context_noise: Noise level at which frames are committed; the training's context noise covers it.
        guidance: Weight w of classifier-free guidance, null + w (conditional - null); 1: no guidance. Both predictions
            are copies of the frame within one pass, over one cache.
        inner_guidance: Weight of inner guidance by the streams with ``dropout``, such as motion; 0: none. See
            `owl.rollout.generate.Schedule`.
        one_pass: Whether a frame is committed together with the next frame's first denoising step. False commits it
            immediately: more work per frame, but less latency from controls to their frame.
        dtype: Dtype of weights and cache, e.g. torch.bfloat16; None: that of the network. The given network is not
            changed. Frames, noise and latent statistics stay in float32, since their errors would accumulate.
        quantization: Quantise the weights of linear layers, also of the decoders, to eight bits; see
            `owl.precision.inference.quantize`.
        compile: Whether to compile blocks with ``torch.compile``, in the background: frames are generated eagerly until
            a compiled block was compared with the eager one. If compilation fails, the engine warns and stays eager.
            The code is cached for the next start, see `owl.rollout.compiled.cache_folder`.
        device: Device to run on.

    Raises:
        OwlError: The settings are invalid, the device does not support the quantisation, or a decoder belongs to
            another encoder than the world model.
    """

    def __init__(
        self,
        network: WorldTransformer,
        decoders: dict[str, nn.Module] | None = None,
        *,
        noise_levels: Sequence[float] | None = None,
        sampler: Sampler | None = None,
        context_noise: float | None = None,
        guidance: float | None = None,
        inner_guidance: float = 0.0,
        one_pass: bool = True,
        dtype: torch.dtype | None = None,
        quantization: Quantization | None = None,
        compile: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        sampling = network.sampling.override(sampler=sampler, context_noise=context_noise, guidance=guidance)
        self.schedule = Schedule.of(sampling, inner_guidance)
        if noise_levels is not None:
            self.schedule = replace(self.schedule, noise_levels=tuple(map(float, noise_levels)))
        check_guidance(network, self.schedule)
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
        self.one_pass = one_pass
        self.batch = 0  # before `reset`
        self._later = ThreadPoolExecutor(1, thread_name_prefix="owl-sound")
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
            OwlError: A file is missing or contains another kind of network.
        """
        network = load_world_model(world_model)[0]
        loaded = {name: models.load(path) for name, path in (decoders or {}).items()}
        return cls(network, loaded, **settings)  # type: ignore[arg-type]

    @torch.no_grad()
    def reset(
        self,
        context: Streams | None = None,
        controls: Controls | None = None,
        batch: int = 1,
        seed: int = 0,
        picture: Tensor | None = None,
    ) -> None:
        """Start a rollout.

        Args:
            context: Latents of any number of previous frames, not standardised ("video" float[B, T, c, h, w], ...);
                None: no context.
            controls: Controls of these frames, with the latents of given streams, not standardised.
            batch: Batch size, without a context.
            seed: Seed of all noise; equal seeds give equal rollouts.
            picture: The context's last frame, float[B, 3, H, W] in [-1, 1], for decoders of "video" that continue it;
                None: as they decode its latent.

        Raises:
            OwlError: Context and controls do not match each other or the world model, or contain no frame, NaN or
                infinity.
        """
        if context is not None:
            if controls is None:
                raise OwlError(
                    "context.controls",
                    "the context has no controls, expected those of each of its frames; give them",
                )
            batch = check_context(self.network, context, controls)
        self.batch = batch
        self._random = torch.Generator().manual_seed(seed)
        self._prepare(batch)
        self.cache: Cache = self.network.new_cache(batch, self.schedule.copies, self.dtype, self.device)
        self._pending: Context | None = None
        self._decoded: dict[str, Tensor] = {}
        self._sound = {
            name: SoundDecoder(decoder, None if context is None else context[name].to(self.device))
            for name, decoder in self.decoders.items()
            if hasattr(decoder, "stream")
        }
        if context is None or controls is None:
            return
        latents = self.network.standardize({name: x.to(self.device) for name, x in context.items()})
        for t in range(controls.buttons.shape[1]):
            self._commit()
            shown = {name: x[:, t : t + 1] for name, x in latents.items()}
            given = {name: x[:, t] for name, x in controls.given.items()}
            self._await_commit(shown, self._controls(controls.buttons[:, t], controls.axes[:, t], given))
        if not self.one_pass:
            self._commit()
        for name in self.decoders:
            if name == "video" and picture is not None:
                self._decoded[name] = picture.to(self.device)
            elif name not in self._sound:
                self._decode_picture(name, context[name][:, -1].to(self.device))

    def wait_compiled(self, batch: int | None = None) -> bool:
        """Wait until all code is compiled, for reproducible frames and representative timings.

        Args:
            batch: Batch size of the next rollouts, before ``reset``; None: that of the current ones.

        Returns:
            Whether compiled code is used. False immediately without ``compile``, or if compilation fails.

        Raises:
            OwlError: Without a batch, ``reset`` was not called.
        """
        if batch is None:
            self._check_reset()
        else:
            self._prepare(batch)
        return self._blocks is not None and self._blocks.wait()

    @torch.no_grad()
    def step(self, buttons: Tensor, axes: Tensor, given: Streams | None = None) -> Frame:
        """Generate the next frame.

        Args:
            buttons: float[B, number of buttons], 1 where one is down.
            axes: float[B, number of axes], movement in the unit of each axis.
            given: Latents of given streams, float[B, ...], not standardised; missing ones are replaced by their mean.

        Returns:
            The frame that these controls lead to.

        Raises:
            OwlError: ``reset`` was not called, or the inputs do not match the batch size or the world model.
        """
        self._check_reset()
        check_step(self.network, self.batch, buttons, axes, given or {})
        if self._blocks is not None:
            self._blocks.warn_of_failure()
        start = self._clock()
        controls = self._controls(buttons, axes, given or {})
        noise = [self._noise() for _ in range(self.schedule.draws)]
        pending, self._pending = self._pending, None
        steps = denoise(self.network, self.cache, controls, self.schedule, noise, pending=pending, apply=self._blocks)
        x = next(steps)
        committed = self._clock()
        for further in steps:
            x = further
        self._await_commit(x, controls)
        if not self.one_pass:
            self._commit()
        denoised = self._clock()
        latents = {name: latent[:, 0] for name, latent in self.network.restore(x).items()}
        decoded = self._decode(latents)
        seconds = {"commit": committed - start, "denoise": denoised - committed, "decode": self._clock() - denoised}
        return Frame(latents, decoded, seconds)

    @torch.no_grad()
    def change(self, schedule: Schedule) -> None:
        """Generate the following frames with another schedule; the rollout and its context stay as they are.

        Args:
            schedule: The new one. Snapshots of the rollout under a schedule with guidance cannot be restored under one
                without, and vice versa.

        Raises:
            OwlError: The world model does not have the streams for inner guidance.
        """
        check_guidance(self.network, schedule)
        before, self.schedule = self.schedule.copies, schedule
        if not self.batch or schedule.copies == before:
            return
        self._prepare(self.batch)
        cache = self.network.new_cache(self.batch, schedule.copies, self.dtype, self.device)
        cache.length = self.cache.length
        for new, old in zip(cache.tensors(), self.cache.tensors(), strict=True):
            slots = 0 if new.ndim == 1 else 2  # of rings, and of keys and values: those for noisy copies are the last
            committed = new.shape[slots] - schedule.copies
            new.narrow(slots, 0, committed).copy_(old.narrow(slots, 0, committed))
        self.cache = cache

    def snapshot(self) -> Snapshot:
        """Copy the rollout's state.

        Raises:
            OwlError: ``reset`` was not called.
        """
        self._check_reset()
        cached = [tensor.clone() for tensor in self.cache.tensors()]
        random = self._random.get_state()
        sound = self._in_turn(lambda: {name: decoder.copy() for name, decoder in self._sound.items()})()
        return Snapshot(cached, self.cache.length, deepcopy(self._pending), random, dict(self._decoded), sound)

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a state of this rollout.

        Raises:
            OwlError: ``reset`` was not called, or the snapshot has another batch size, network or cache.
        """
        self._check_reset()
        found = snapshot.cache[-1].shape[0]
        if found != self.batch:
            raise OwlError(
                "engine.snapshot",
                f"the snapshot has {found} rollouts, the engine {self.batch}; reset with that batch first",
            )
        if [t.shape for t in snapshot.cache] != [t.shape for t in self.cache.tensors()]:
            raise OwlError(
                "engine.other-snapshot",
                "the snapshot comes from another world model or an engine with other guidance, expected one of this "
                "engine; restore it there",
            )
        for tensor, stored in zip(self.cache.tensors(), snapshot.cache, strict=True):
            tensor.copy_(stored)
        self.cache.length, self._pending = snapshot.length, deepcopy(snapshot.pending)
        self._random.set_state(snapshot.random)
        self._decoded = dict(snapshot.decoded)
        self._sound = {name: decoder.copy() for name, decoder in snapshot.sound.items()}

    @property
    def time(self) -> int:
        """Frames since the start of the rollout, including the context."""
        return self.cache.length + (self._pending is not None)

    def _prepare(self, batch: int) -> None:
        """Start to compile the code for rollouts of this batch size."""
        if self._blocks is not None:
            copies = self.schedule.copies
            joined = [copies + 1] if self.one_pass else []
            self._blocks.prepare(batch, list(dict.fromkeys([copies, *joined, 1])), copies)

    def _await_commit(self, latents: Streams, controls: Controls) -> None:
        """Let the next pass commit a frame; draw its context noise now, independent of the number of passes."""
        level = self.schedule.context_noise
        self._pending = as_context(latents, controls, self._noise(), level) if level else Context(latents, controls)

    def _commit(self) -> None:
        """Write the pending frame to the cache in a separate pass."""
        if self._pending is not None:
            commit_frame(self.network, self.cache, self._pending, self.schedule.context_noise, self._blocks)
            self._pending = None

    def _controls(self, buttons: Tensor, axes: Tensor, given: Streams) -> Controls:
        """Return the controls and given streams of one frame as inputs of the network."""
        latents = self.network.standardize({name: x.to(self.device) for name, x in given.items()})
        for name, stream in self.network.given.items():
            if name not in latents:  # zero is the standardised mean
                latents[name] = torch.zeros(self.batch, *stream.shape, device=self.device)
        pressed, moved = (x[:, None].to(self.device, torch.float32) for x in (buttons, axes))
        return Controls(pressed, moved, given={name: x[:, None] for name, x in latents.items()})

    def _noise(self) -> Streams:
        # drawn on the CPU, so that a seed gives the same noise on every device
        return {
            name: torch.randn(self.batch, 1, *stream.shape, generator=self._random).to(self.device)
            for name, stream in self.network.generated.items()
        }

    def _decode(self, latents: Streams) -> Decoded:
        sounds = {
            name: self._in_turn(partial(_without_gradient, decoder, latents[name]))
            for name, decoder in self._sound.items()
        }
        pictures = {name: self._decode_picture(name, latents[name]) for name in self.decoders if name not in sounds}
        return Decoded({name: partial(_same, picture) for name, picture in pictures.items()} | sounds)

    def _in_turn(self, work: Callable[[], T]) -> Callable[[], T]:
        """Do what concerns the state of the decoders of sound, after what was asked for before.

        Returns:
            What waits for the result.
        """
        if self.device.type == "cpu":
            return self._later.submit(work).result
        return partial(_same, work())  # on a GPU, another thread may have another current stream

    def _decode_picture(self, name: str, latent: Tensor) -> Tensor:
        decoder = self.decoders[name]
        latent = latent.to(placement(decoder).dtype)
        memory = (self._decoded.get(name),) if getattr(decoder, "previous", False) else ()
        # also that of a decoder without memory: another one may take over
        self._decoded[name] = decoder.decode(latent, *memory).float()  # type: ignore[operator]
        return self._decoded[name]

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _check_reset(self) -> None:
        if not self.batch:
            raise OwlError("engine.not-reset", "the engine has no rollout yet; call reset first")


@torch.no_grad()  # which holds for one thread
def _without_gradient(decoder: SoundDecoder, latent: Tensor) -> Tensor:
    return decoder(latent)


def _same(value: T) -> T:
    return value
