"""What does LPIPS cost in a training step? Milliseconds of its cheap forms, and how many times cheaper they are.

python benchmarks/lpips.py [--batch 16] [--height 96] [--width 160] [--rounds 5] [--threads 2]

A step is the distance and its gradient for one of the two images. "plain" computes the network as its paper draws
it; "exact" is what ``owl.losses.lpips`` computes, with the same result; crops estimate the mean over whole frames.
Printed are the milliseconds on the clock in the best round, and the processor time, of which the ratio is taken.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from owl.losses.lpips import LPIPS, random_crops


class Plain(nn.Module):
    """Every convolution at stride 1 and channels first, each blur a convolution of its own."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.convs = trunk.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> list[Tensor]:
        net = self.convs
        first = F.relu(self.blur(net.conv1(image)))
        second = F.relu(net.conv2(self.blur(F.max_pool2d(first, 3, stride=1))))
        third = F.relu(net.conv3(self.blur(F.max_pool2d(second, 3, stride=1))))
        fourth = F.relu(net.conv4(third))
        return [first, second, third, fourth, F.relu(net.conv5(fourth))]

    def blur(self, x: Tensor) -> Tensor:
        kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
        padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(padded, kernel.expand(x.shape[1], 1, 3, 3), stride=2, groups=x.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    image = torch.rand(options.batch, 3, options.height, options.width) * 2 - 1
    noisy = (image + 0.1 * torch.randn(image.shape)).clamp(-1, 1)
    lpips, plain = LPIPS(), LPIPS()
    plain.trunk = Plain(plain.trunk)

    def step(network: LPIPS, size: int | None = None, count: int | None = None, bfloat16: bool = False) -> None:
        x, y = noisy.detach().requires_grad_(), image
        crops = (x, y) if size is None else random_crops(x, y, size, count)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            distance = network(*crops).mean()
        distance.backward()

    half = options.batch // 2
    forms: dict[str, Callable[[], None]] = {
        "plain": lambda: step(plain),
        "exact": lambda: step(lpips),
        "exact, bfloat16": lambda: step(lpips, bfloat16=True),
        f"half of the batch ({half})": lambda: step(lpips, 10_000, half),
        "crops of 64": lambda: step(lpips, 64),
        "crops of 64, bfloat16": lambda: step(lpips, 64, bfloat16=True),
        f"crops of 64 of {half}": lambda: step(lpips, 64, half),
        f"crops of 64 of {half}, bfloat16": lambda: step(lpips, 64, half, bfloat16=True),
        "crops of 48": lambda: step(lpips, 48),
        f"crops of 48 of {half}": lambda: step(lpips, 48, half),
    }
    wall, processor = dict.fromkeys(forms, float("inf")), dict.fromkeys(forms, float("inf"))
    for form in forms.values():
        form()
    for _ in range(options.rounds):  # in turns, so that a busy machine slows all of them alike
        for name, form in forms.items():
            start, start_processor = time.perf_counter(), time.process_time()
            form()
            wall[name] = min(wall[name], time.perf_counter() - start)
            processor[name] = min(processor[name], time.process_time() - start_processor)
    table = Table(
        "form", "ms", "processor ms", "times cheaper", title=f"{options.batch} frames, {options.threads} threads"
    )
    for name in forms:
        ratio = processor["plain"] / processor[name]
        table.add_row(name, f"{wall[name] * 1e3:.0f}", f"{processor[name] * 1e3:.0f}", f"{ratio:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
