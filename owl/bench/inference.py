"""Measure the speed of trained networks: autoencoders and decoders of images and sound, world models and others."""

import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import nn

from owl import models
from owl.atomic import atomic_write
from owl.bench.measurement import (
    PROFILED,
    Measurement,
    most_expensive,
    peak_memory,
    reset_peak_memory,
    start_profiler,
)
from owl.bench.roofline import Operator, Operators, Precision, matmul_rate, synchronize, total_flops
from owl.errors import OwlError
from owl.hardware import DTYPES, default_device
from owl.models.audio_autoencoder import AudioAutoencoder
from owl.models.audio_decoder import AudioDecoder
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.inverse_dynamics import InverseDynamicsModel
from owl.models.multimodal_autoencoder import MultimodalAutoencoder
from owl.models.world_model import WorldTransformer
from owl.nn.compilation import can_compile
from owl.rollout.engine import Engine
from owl.rollout.episodes import load_decoder
from owl.rollout.evaluation import latency_of
from owl.rollout.generate import Schedule

CLIP = 8
"""Frames per call of an inverse dynamics model."""

Run = Callable[[], dict[str, float]]
"""Runs once and returns the seconds of each stage."""


def measure_network(
    path: str,
    precision: Precision,
    compile: bool,
    decoder: str | None,
    denoising_steps: int | None,
    steps: int,
    warm_up: int,
    kernels: int,
    trace: Path | None,
) -> Measurement:
    """Time a network with batch size 1 on synthetic inputs.

    Args:
        path: Checkpoint or export.
        precision: "fp32" or "bf16"; decoders of world models keep their precision, as in rollouts.
        compile: Whether to use ``torch.compile``: for the whole graph, or for each block of a world model.
        decoder: For world models: checkpoint or export of the autoencoder that decodes; None: do not decode.
        denoising_steps: For world models: evaluations of the network per frame; None: those of its checkpoint.
        steps: Number of timed runs.
        warm_up: Number of runs before, at least 1.
        kernels: Rows of the kernel table; 0 for none.
        trace: Where to write a Chrome trace.

    Raises:
        OwlError: The file contains none of these networks, or the decoder belongs to another encoder.
    """
    device = default_device().type
    network = models.load(path).requires_grad_(False)
    compile = compile and can_compile(device)
    if isinstance(network, WorldTransformer):
        decoders = {"video": load_decoder(decoder)} if decoder else {}
        schedule = Schedule.of(network.sampling.override(steps=denoising_steps))
        settings: dict[str, Any] = vars(schedule) | {"dtype": DTYPES[precision]}
        operators = count(play(Engine(network, decoders, device=device, **settings)))
        engine = Engine(network, decoders, compile=compile, device=device, **settings)
        kind, unit, run = "world model", "frame", play(engine)
        compile = engine.wait_compiled()
    else:
        kind, unit, stages = stages_of(network, path, device, DTYPES[precision], compile)
        run = take_turns(stages, device, compile)
        with torch.no_grad():
            operators = count(run)
    with torch.no_grad():
        for _ in range(warm_up):
            run()
        reset_peak_memory(device)
        times = [run() for _ in range(steps)]
        memory = peak_memory(device)
        rows = profile_runs(run, kernels, trace, device) if kernels or trace else []
    metrics = latency_of(times)
    rate, flops = matmul_rate(device, DTYPES[precision]), total_flops(operators)
    seconds = 1 / metrics["frames_per_second"]
    if kind == "inverse dynamics model":
        metrics["frames_per_second"] *= CLIP
    if kind in ("autoencoder", "audio autoencoder", "audio decoder"):  # an image is rarely both encoded and decoded
        del metrics["frames_per_second"]
    if isinstance(network, AudioAutoencoder | AudioDecoder):
        duration = latents_per_second(network) * network.hop / network.sample_rate
        metrics |= {
            name.replace("latency", "real_time").replace("_p50", ""): duration / seconds
            for name, seconds in metrics.items()
            if name in ("latency_encode_p50", "latency_decode_p50")
        }
    metrics |= {
        f"gflop_per_{unit}": flops / 1e9,
        "matmul_gflop_per_second": rate / 1e9,
        "mfu": flops / seconds / rate,
        "peak_memory_mib": memory,
    }
    return Measurement(kind, unit, device, precision, compile, metrics, operators, rows)


def stages_of(
    network: nn.Module, path: str, device: str, dtype: torch.dtype, compile: bool
) -> tuple[str, str, dict[str, Callable[[], Any]]]:
    """Return the kind of a network, the unit of one run, and the stages as functions.

    Raises:
        OwlError: The kind of network is unknown.
    """

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=False) if compile else function

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, device=device, dtype=dtype)

    network = network.to(device, dtype)
    if isinstance(network, AudioAutoencoder | AudioDecoder):
        tokens = latents_per_second(network)
        audio, latents = noise(network.channels, tokens * network.hop), noise(network.latent_channels, tokens)
        decoder = compiled(network.decoder)
        stages: dict[str, Callable[[], Any]] = {"decode": lambda: decoder(latents)}
        if isinstance(network, AudioDecoder):
            return "audio decoder", "second_of_sound", stages
        encoder = compiled(network.encoder)
        return "audio autoencoder", "second_of_sound", {"encode": lambda: encoder(audio), **stages}
    if isinstance(network, ImageAutoencoder | MultimodalAutoencoder):
        image, latent = noise(network.channels, *network.size), noise(network.latent_channels, *network.latent_size)
        encoder, decoder = compiled(network.encoder), compiled(network.decoder)
        return "autoencoder", "image", {"encode": lambda: encoder(image), "decode": lambda: decoder(latent)}
    if isinstance(network, InverseDynamicsModel):
        video, reader = noise(CLIP, 3, *network.size), compiled(network)
        return "inverse dynamics model", "clip", {"read": lambda: reader(video)}
    if hasattr(network, "decode") and hasattr(network, "latent_encoder"):
        latent, decode = noise(*network.inputs["latent"]), network.decode  # type: ignore[index]
        if compile and hasattr(network, "blocks"):  # a transformer, around which decode loops over steps
            for block in network.blocks:  # type: ignore[union-attr]
                block.compile(dynamic=False)
        else:
            decode = compiled(decode)  # type: ignore[arg-type, assignment]
        return "decoder", "frame", {"decode": lambda: decode(latent)}  # type: ignore[operator]
    raise OwlError(
        "bench.target",
        f"{path} contains a {type(network).__qualname__}, expected an autoencoder, a decoder, a world model or an "
        "inverse dynamics model; give one, or the YAML of an experiment",
    )


def latents_per_second(network: AudioAutoencoder | AudioDecoder) -> int:
    """Return the number of latents of about one second of sound, at least 1."""
    return max(1, round(network.sample_rate / network.hop))


def take_turns(stages: dict[str, Callable[[], Any]], device: str, compile: bool) -> Run:
    """Return a function that runs all stages in turn."""

    def run() -> dict[str, float]:
        seconds = {}
        # freezing makes the weights constants of the graph, with a layout chosen for its kernels
        with torch._inductor.config.patch(freezing=True) if compile else nullcontext():
            for name, stage in stages.items():
                start = time.perf_counter()
                stage()
                synchronize(device)
                seconds[name] = time.perf_counter() - start
        return seconds

    return run


def play(engine: Engine) -> Run:
    """Return a function that generates frames with idle controls."""
    network = engine.network
    buttons = torch.zeros(1, len(network.buttons))
    axes = torch.zeros(1, len(network.axes))
    engine.reset()

    def run() -> dict[str, float]:
        seconds = engine.step(buttons, axes).seconds
        return seconds if engine.decoders else {name: seconds[name] for name in ("commit", "denoise")}

    return run


def count(run: Run) -> Counter[Operator]:
    """Count the operators of one uncompiled run, after a run whose frame a world model commits in the counted one."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # compiled modules call the counter's hooks twice, which only affects the unused counts per module
        warnings.filterwarnings("ignore", message=".*global hooks on modules.*")
        run()
        with Operators() as operators:
            run()
    return operators.calls


def profile_runs(run: Run, kernels: int, trace: Path | None, device: str) -> list[dict[str, Any]]:
    """Profile some runs; write the trace, return the most expensive kernels."""
    profiler = start_profiler(device)
    for _ in range(PROFILED):
        run()
    profiler.stop()
    if trace is not None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            atomic_write(trace, file.read_bytes())
    return most_expensive(profiler, kernels, device)
