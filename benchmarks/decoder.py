"""Does a decoder without norms and middle block decode faster? Frames/s of both, batch 1, and their ratio.

python -m benchmarks.decoder [--config configs/models/image_autoencoder_360p.yaml] [--rounds 30]

The norm-free decoder has its weight normalisation folded away, as in inference. Its twin has the same stages, with a
group norm before every convolution of a block and with a middle block. Where a GPU is present it is used.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from owl.models.image_autoencoder import ImageAutoencoder

CONFIG = Path(__file__).parent.parent / "configs" / "models" / "image_autoencoder_360p.yaml"
VARIANTS: dict[str, dict[str, Any]] = {
    "weight norm, folded": {"norm": "weight", "middle_block": False},
    "group norm + middle block": {"norm": "group", "middle_block": True},
}


def seconds(decoder: nn.Module, latent: torch.Tensor) -> float:
    """Wall time of one decoder call, float[1, c, h, w] in."""
    start = time.perf_counter()
    decoder(latent)
    if latent.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(init_args: dict[str, Any], dtype: torch.dtype, compiled: bool, rounds: int) -> tuple[float, float, float]:
    """Frames/s without norms, frames/s of the twin, and the first over the second."""
    # As an exported decoder would run: weights are constants, laid out once for the kernels that read them.
    torch._inductor.config.freezing = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoders: list[nn.Module] = []
    for changes in VARIANTS.values():
        network = ImageAutoencoder(**(init_args | changes)).eval().fold_weight_norm()
        decoder = network.decoder.to(device, dtype).to(memory_format=torch.channels_last)
        if compiled:
            decoder.compile(fullgraph=True)
        decoders.append(decoder)
    latent = torch.randn(1, network.latent_channels, *network.latent_size, device=device, dtype=dtype)
    with torch.no_grad():  # freezing does not support inference mode
        for module in decoders * 2:
            module(latent)  # compiles, and chooses kernels
        # In turns, so that a busy machine slows both alike: the median of the rounds' ratios hardly feels it, and the
        # best round is nearest to what the machine can do.
        times = [[seconds(module, latent) for module in decoders] for _ in range(rounds)]
    ratio = statistics.median(twin / plain for plain, twin in times)
    return 1 / min(plain for plain, _ in times), 1 / min(twin for _, twin in times), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="a network's class_path and init_args")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    init_args = yaml.safe_load(options.config.read_text())["init_args"]
    table = Table("mode", *(f"{name}, frames/s" for name in VARIANTS), "ratio", title=options.config.stem)
    for compiled in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            plain, twin, ratio = compare(init_args, dtype, compiled, options.rounds)
            mode = f"{'compiled' if compiled else 'eager'}, {str(dtype).removeprefix('torch.')}"
            table.add_row(mode, f"{plain:.2f}", f"{twin:.2f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
