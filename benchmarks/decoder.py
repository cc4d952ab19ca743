"""Does a decoder without norms and middle block decode faster? Frames/s of both, batch 1, and their ratio.

python benchmarks/decoder.py [--config configs/models/image_autoencoder_360p.yaml] [--rounds 5] [--compile]

The norm-free decoder has its weight normalisation folded away, as in inference. Its twin has the same stages, with a
group norm before every convolution of a block and with a middle block. Where a GPU is present it is used.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch._inductor.config
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from owl.models.image_autoencoder import ImageAutoencoder

CONFIG = Path(__file__).parent.parent / "configs" / "models" / "image_autoencoder_360p.yaml"
VARIANTS: dict[str, dict[str, object]] = {
    "weight norm, folded": {"norm": "weight", "middle_block": False},
    "group norm + middle block": {"norm": "group", "middle_block": True},
}


def seconds_per_frame(decoder: nn.Module, latent: torch.Tensor) -> float:
    """Median over a few frames of one decoder call, float[1, c, h, w] in."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        decoder(latent)
        if latent.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(init_args: dict[str, object], dtype: torch.dtype, compiled: bool, rounds: int) -> dict[str, float]:
    """Frames per second of every variant, measured in turns so that a busy machine slows all of them alike."""
    # As an exported decoder would run: weights are constants, laid out once for the kernels that read them.
    torch._inductor.config.freezing = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoders: dict[str, nn.Module] = {}
    for name, changes in VARIANTS.items():
        network = ImageAutoencoder(**(init_args | changes)).eval().fold_weight_norm()  # type: ignore[arg-type]
        decoder = network.decoder.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compiled:
            decoder.compile(fullgraph=True)
        decoders[name] = decoder
    latent = torch.randn(1, network.latent_channels, *network.latent_size, device=device, dtype=dtype)
    times: dict[str, list[float]] = {name: [] for name in decoders}
    with torch.no_grad():  # freezing does not support inference mode
        for decoder in decoders.values():
            decoder(latent)  # compiles, and chooses kernels
        for _ in range(rounds):
            for name, decoder in decoders.items():
                times[name].append(seconds_per_frame(decoder, latent))
    # The best round: everything else the machine does can only add time.
    return {name: 1 / min(measured) for name, measured in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="a network's class_path and init_args")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure the decoders under torch.compile too")
    options = parser.parse_args()
    init_args = yaml.safe_load(options.config.read_text())["init_args"]
    table = Table(
        "mode", *(f"{name}, frames/s" for name in VARIANTS), "ratio of first to last", title=options.config.stem
    )
    for compiled in (False, True) if options.compile else (False,):
        for dtype in (torch.float32, torch.bfloat16):
            speed = list(compare(init_args, dtype, compiled, options.rounds).values())
            mode = f"{'compiled' if compiled else 'eager'}, {str(dtype).removeprefix('torch.')}"
            table.add_row(mode, *(f"{value:.2f}" for value in speed), f"{speed[0] / speed[-1]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
