"""Decoders and world models as ONNX graphs, which run without PyTorch.

A decoder becomes a function of the latent. A world model becomes `StepGraph`, one denoising step of one frame as a
function without state: the caller passes the cache from call to call.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from owl.atomic import atomic_write
from owl.errors import OwlError
from owl.flow_matching import add_noise
from owl.models.world_model import Cache, Controls, WorldTransformer
from owl.nn.attention import Frames
from owl.nn.cache import LayerCache, Ring

DECODER, STEP = "decoder.onnx", "step.onnx"
TOLERANCE = 1e-3
"""Largest difference between the outputs of a graph and of PyTorch."""
TURNS = 10
"""Calls that are timed."""
MOST_BYTES = 2 * 10**9
"""An ONNX file is a protocol buffer, which holds less than 2 GiB."""


class DecoderGraph(nn.Module):
    """A decoder: latent float[1, c, h, w], not standardised, to picture float[1, 3, H, W].

    A decoder that remembers the frame before also takes that, as ``previous``.

    Args:
        decoder: The decoder.
    """

    unit = "frames"
    decoder: Any

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def inputs(self) -> dict[str, Tensor]:
        """Return inputs by name."""
        decoder = self.decoder
        inputs = getattr(decoder, "inputs", None) or {"latent": (decoder.latent_channels, *decoder.latent_size)}
        found = {"latent": torch.randn(1, *inputs["latent"])}
        if getattr(decoder, "previous", False):
            found["previous"] = torch.rand(1, decoder.channels, *decoder.size) * 2 - 1
        return found

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return ["picture"]

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        """Decode."""
        return (self.decoder.decode(*inputs),)


class StepGraph(nn.Module):
    """A denoising step of a frame, in the same pass with the frame before, which becomes context.

    Inputs, with all latents as in datasets, not standardised, and "video" standing for each generated stream:

    - ``video``, float[1, 1, c, h, w]: the estimate of the frame, anything finite at noise level 1;
    - ``video_noise``: normal noise of the same shape, and ``level``, float[1, 1]: the noise level of the step;
    - ``buttons``, float[1, 1, number of buttons], and ``axes``: the controls that lead to the frame;
    - ``before_video``, ``before_video_noise``, ``before_level``, ``before_buttons``, ``before_axes``: the same of the
      frame before, with its context noise;
    - ``time``, int64[]: number of the frame before since the start of the rollout;
    - the cache, zeros for an empty one except ``ring_<window>``, int64[places], which is -1.

    Outputs: ``clean_video``, the estimate of the clean frame, and the cache as ``next_<name>``. With that, a one-step
    student has made its frame (the sampler "consistency"); with more steps, the estimate and fresh noise enter the next
    one. All steps of a frame get the same cache and frame before, and return the same next cache.

    Args:
        network: The world model; given streams are replaced by their mean.
    """

    unit = "denoising steps"

    def __init__(self, network: WorldTransformer) -> None:
        super().__init__()
        self.network = network
        self.cached = self._names(network.new_cache(1))
        self.names = list(self.inputs())

    @staticmethod
    def _names(cache: Cache) -> dict[str, Tensor]:
        rings = {f"ring_{window}": ring.time for window, ring in cache.rings.items()}
        keys = {f"key_{number}": layer.key for number, layer in enumerate(cache.layers)}
        return rings | keys | {f"value_{number}": layer.value for number, layer in enumerate(cache.layers)}

    def inputs(self) -> dict[str, Tensor]:
        """Return inputs by name: those of the first step of a rollout, with an empty cache."""
        controls = {"buttons": len(self.network.buttons), "axes": len(self.network.axes)}
        found = {}
        for prefix in ("", "before_"):
            for name, stream in self.network.generated.items():
                found[f"{prefix}{name}"] = torch.randn(1, 1, *stream.shape)
                found[f"{prefix}{name}_noise"] = torch.randn(1, 1, *stream.shape)
            found[f"{prefix}level"] = torch.full((1, 1), 0.0 if prefix else 1.0)
            found |= {f"{prefix}{name}": torch.zeros(1, 1, count) for name, count in controls.items()}
        return found | {"time": torch.tensor(0)} | self.cached

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return [*(f"clean_{name}" for name in self.network.generated), *(f"next_{name}" for name in self.cached)]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Make the step."""
        given = dict(zip(self.names, inputs, strict=True))
        names, network = self.network.generated, self.network
        level = torch.cat([given["before_level"], given["level"]], 1)
        clean, noise = (
            {name: torch.cat([given[f"before_{name}{kind}"], given[f"{name}{kind}"]], 1) for name in names}
            for kind in ("", "_noise")
        )
        x = {name: add_noise(latent, noise[name], level) for name, latent in network.standardize(clean).items()}
        buttons, axes = (torch.cat([given[f"before_{name}"], given[name]], 1) for name in ("buttons", "axes"))
        cache = self._cache(given)
        frames = Frames(torch.stack([given["time"], given["time"] + 1])[None], torch.tensor([0, 1]))
        velocity = network(x, level, Controls(buttons, axes), frames, cache=cache)
        estimate = {
            name: x[name][:, 1:] - given["level"].reshape(1, 1, *[1] * (v.ndim - 2)) * v[:, 1:]
            for name, v in velocity.items()
        }
        return (*network.restore(estimate).values(), *self._names(cache).values())

    def _cache(self, given: dict[str, Tensor]) -> Cache:
        """Return a copy of the cache, since a graph must not change its inputs."""
        rings = {}
        for window in sorted(set(self.network.windows)):
            rings[window] = Ring(window, self.network.sink, 1)
            rings[window].time = given[f"ring_{window}"].clone()
        layers = [
            LayerCache(given[f"key_{number}"].clone(), given[f"value_{number}"].clone())
            for number in range(len(self.network.windows))
        ]
        return Cache(rings, layers)


@dataclass(frozen=True)
class Comparison:
    """How a graph compares with PyTorch.

    Attributes:
        difference: Largest difference of an output.
        calls_per_second: Of onnxruntime, and of PyTorch (eager, float32) with as many threads.
        unit: What a call makes.
    """

    difference: float
    calls_per_second: tuple[float, float]
    unit: str

    def __str__(self) -> str:
        onnx, eager = self.calls_per_second
        speeds = f"{onnx:.1f} {self.unit}/s in onnxruntime, {eager:.1f} in PyTorch"
        return f"outputs differ by at most {self.difference:.1e}; {speeds}"


def export_onnx(network: nn.Module, directory: str | Path) -> tuple[Path, Comparison]:
    """Write a network as ONNX and compare it with PyTorch: decoder.onnx, or step.onnx of a world model.

    Args:
        network: A world model, an autoencoder of pictures or a decoder, in float32 on the CPU.
        directory: Local folder.

    Returns:
        The file, and the comparison.

    Raises:
        OwlError: A package is missing, the network is of another kind, too large or not convertible, or its outputs
            differ by more than `TOLERANCE`.
    """
    graph: DecoderGraph | StepGraph
    if isinstance(network, WorldTransformer):
        graph, path = StepGraph(network).eval(), Path(directory) / STEP
    elif hasattr(network, "decode") and hasattr(network, "size"):
        graph, path = DecoderGraph(network).eval(), Path(directory) / DECODER
    else:
        raise OwlError(
            "export.onnx",
            f"{type(network).__name__} is no decoder of pictures and no world model, which ONNX export supports; leave "
            "out --onnx",
        )
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > MOST_BYTES:
        raise OwlError(
            "export.onnx",
            f"{type(network).__name__} has {size / 1e9:.1f} GB of weights, an ONNX file holds 2; leave out --onnx",
        )
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise OwlError(
            "export.onnx-package", f"--onnx needs {error.name}; run pip install 'owl-platform[onnx]'"
        ) from error
    inputs = graph.inputs()
    with torch.no_grad():
        expected = graph(*inputs.values())
        content = converted(graph, inputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    taken = {item.name for item in session.get_inputs()}
    fed = {name: tensor.numpy() for name, tensor in inputs.items() if name in taken}
    found = session.run(graph.outputs, fed)
    difference = largest_difference(found, expected)
    if not difference <= TOLERANCE:
        raise OwlError(
            "export.onnx",
            f"{type(network).__name__} differs by {difference:.1e} between onnxruntime and PyTorch, expected at "
            f"most {TOLERANCE:g}; leave out --onnx",
        )
    with torch.no_grad():
        speeds = seconds(lambda: session.run(graph.outputs, fed)), seconds(lambda: graph(*inputs.values()))
    atomic_write(path, content)
    return path, Comparison(difference, (1 / speeds[0], 1 / speeds[1]), graph.unit)


def converted(graph: DecoderGraph | StepGraph, inputs: dict[str, Tensor]) -> bytes:
    """Convert a graph to the bytes of an ONNX file.

    Raises:
        OwlError: It uses something that ONNX or the converter does not have.
    """
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of what the converter itself has written
    try:
        program: Any = torch.onnx.export(
            graph,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=graph.outputs,
        )
        serialized: bytes = program.model_proto.SerializeToString()
    except RuntimeError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise OwlError(
            "export.onnx", f"the network cannot be converted to ONNX ({reason}); leave out --onnx"
        ) from error
    return serialized


def largest_difference(found: Sequence[np.ndarray], expected: Sequence[Tensor]) -> float:
    """Return the largest absolute difference between outputs of the same shapes; NaN if one of them contains NaN."""
    pairs = zip(found, expected, strict=True)
    return float(np.max([np.abs(one.astype(np.float64) - other.numpy()).max() for one, other in pairs]))


def seconds(call: Callable[[], object]) -> float:
    """Return the median time of a call."""
    call()
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)
