"""OWL's autoencoder of sound against stable-audio-tools' Oobleck: equal stages, recipe, sound and steps, on one core.

    pip install --no-deps --target build/stable-audio-tools stable-audio-tools==0.0.19
    python -m benchmarks.audio [--stable-audio-tools build/stable-audio-tools] [--minutes 3] [OPTIONS OF fit]

``fit`` trains both with ``experiments/audio_vae_quickstart.yaml``, its recipe, losses, optimiser and recording (made
first if missing), for as many steps as the package's network computes gradients in the given minutes. Other options are
passed to it. The metrics are those of the last validation. Speeds are in processor time, and both take turns, so that a
busy machine slows both alike.

The strides are the package's defaults: at odd ones, its decoder returns too few samples.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

from owl.cli.lightning import main as fit
from owl.hardware import multiplies_bfloat16
from owl.losses.audio import AudioLoss, AudioWeights
from owl.models.audio_autoencoder import AudioAutoencoder
from owl.nn.posterior import Posterior

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "audio_vae_quickstart.yaml"
SIZE: dict[str, Any] = {"strides": [2, 4, 8, 8], "widths": [8, 32, 64, 128, 256], "latent_channels": 64}
SEGMENTS, SECONDS = 4, 0.4  # of sound in a training step, as in the experiment
DECODED = 2.0  # seconds of sound
ROUNDS = 7
PACKAGE = "stable_audio_tools"
UNUSED = (
    "torchaudio",
    "alias_free_torch",
    *(f"{PACKAGE}.models.{name}" for name in ("pretrained", "pretransforms", "transformer", "diffusion")),
    *(f"{PACKAGE}.inference.{name}" for name in ("sampling", "utils")),
)
"""What the package imports beside its autoencoder, and Oobleck does not call."""


class Unused(ModuleType):
    """Stands for one of these modules; whatever is imported from it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@functools.cache
def autoencoders(folder: str) -> ModuleType:
    """Import the package's autoencoders from the folder that pip has installed it to."""
    sys.path.append(folder)
    sys.modules.update({name: Unused(name) for name in UNUSED})
    from stable_audio_tools.models import autoencoders

    for name in UNUSED:
        del sys.modules[name]
    autoencoders.weight_norm = weight_norm  # the same function as its older form, and its networks can be copied
    return autoencoders


class Oobleck(AudioAutoencoder):
    """The package's encoder and decoder, with the settings of Stable Audio Open, as a network that OWL's recipe trains.

    Args:
        folder: Of the package.
        strides: As of `AudioAutoencoder`.
        widths: Likewise; multiples of the first one.
        latent_channels: Likewise.
    """

    def __init__(self, folder: str, strides: list[int], widths: list[int], latent_channels: int) -> None:
        super().__init__(strides=strides, widths=widths, latent_channels=latent_channels)
        multiples = [width // widths[0] for width in widths[1:]]
        shared = {"channels": widths[0], "c_mults": multiples, "strides": strides, "use_snake": True}
        package = autoencoders(folder)
        self.encoder = package.OobleckEncoder(latent_dim=2 * latent_channels, **shared)
        self.decoder = package.OobleckDecoder(latent_dim=latent_channels, final_tanh=False, **shared)

    def encode(self, audio: Tensor) -> Posterior:
        """Encode float[B, 2, n]; mean and variance are those of the package's ``VAEBottleneck``."""
        encoded: Tensor = self.encoder(F.pad(audio, (0, -audio.shape[-1] % self.hop))).to(audio.dtype)
        mean, scale = encoded.chunk(2, 1)
        return Posterior(mean, 2 * torch.log(F.softplus(scale) + 1e-4))


def train(folder: str, name: str, network: dict[str, Any], options: list[str]) -> dict[str, float]:
    """Run ``fit``; return the metrics of its run."""
    sys.argv = [
        *("owl", "fit", "--config", str(EXPERIMENT), "--runs", folder, "--name", name),
        *("--model.init_args.network", json.dumps(network), "--model.init_args.frechet", "false", *options),
    ]
    if status := fit(sys.argv[1:]):
        sys.exit(status)
    metrics: dict[str, float] = json.loads((Path(folder) / name / "metrics.json").read_text())
    return metrics


def gradient(network: AudioAutoencoder) -> Callable[[], object]:
    """Compute the gradient of the recipe's loss of some segments."""
    loss = AudioLoss(AudioWeights())
    audio = 0.1 * torch.randn(SEGMENTS, network.channels, round(SECONDS * network.sample_rate))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16("cpu")):  # as the experiment's "auto"
            reconstruction, posterior = network(audio, sample=True)
            total = torch.stack([*loss(reconstruction, audio).values(), posterior.kl()]).sum()
        network.zero_grad()
        total.backward()

    return step


def decoding(network: AudioAutoencoder) -> Callable[[], object]:
    """Decode `DECODED` seconds of sound in float32, without weight normalisation."""
    network = network.eval().fold_weight_norm()
    latent = torch.randn(1, network.latent_channels, round(DECODED * network.sample_rate / network.hop))
    return torch.inference_mode()(lambda: network.decode(latent))


def processor_seconds(works: list[Callable[[], object]]) -> list[float]:
    """Processor time of each, the least of some rounds in turns."""
    best = [float("inf")] * len(works)
    for _ in range(ROUNDS):
        for number, work in enumerate(works):
            start = time.process_time()
            work()
            best[number] = min(best[number], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stable-audio-tools", default="build/stable-audio-tools", help="where pip has installed it")
    parser.add_argument("--minutes", type=float, default=3.0, help="training time of the package's network")
    arguments, options = parser.parse_known_args()
    folder = arguments.stable_audio_tools
    if not (Path(folder) / PACKAGE).is_dir():
        parser.error(f"{folder} does not contain {PACKAGE}; install it there with pip, as --help shows")
    torch.set_num_threads(1)
    networks = {
        "stable-audio-tools": (Oobleck, SIZE | {"folder": folder}),
        "OWL": (AudioAutoencoder, SIZE | {"causal": False}),
    }
    built = [kind(**init_args) for kind, init_args in networks.values()]
    seconds = processor_seconds([gradient(network) for network in built])
    steps = max(1, round(60 * arguments.minutes / seconds[0]))
    options += ["--trainer.max_time", "null", "--trainer.max_steps", str(steps)]
    with tempfile.TemporaryDirectory() as root:
        runs = [
            train(root, name, {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": init_args}, options)
            for name, (kind, init_args) in networks.items()
        ]
    values: dict[str, list[float]] = {
        "parameters": [sum(p.numel() for p in network.parameters()) for network in built],
        "gradient of a step, s of one core": seconds,
        "STFT distance": [run["val/stft"] for run in runs],
        "mel distance, dB": [run["val/mel"] for run in runs],
        "sound decoded by one core, s/s": [DECODED / s for s in processor_seconds([decoding(n) for n in built])],
    }
    table = Table(f"{steps} steps", "stable-audio-tools (baseline)", "OWL", "OWL against it")
    for name, (theirs, ours) in values.items():
        table.add_row(name, f"{theirs:.4g}", f"{ours:.4g}", f"{ours / theirs:.2f}x")
    theirs, ours = (run["val/si_sdr"] for run in runs)
    table.add_row("SI-SDR", f"{theirs:.2f} dB", f"{ours:.2f} dB", f"{ours - theirs:+.2f} dB")
    Console().print(table)


if __name__ == "__main__":
    from benchmarks import audio  # fit imports Oobleck by this name

    audio.main()
