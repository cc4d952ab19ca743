"""Two processes that share the images must report what one process reports; one of them may have none."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torchmetrics.image import StructuralSimilarityIndexMeasure

from owl.losses.lpips import LPIPS
from owl.metrics.controls import AxisAccuracy, ButtonAccuracy
from owl.metrics.flicker import FlickerAlongFlow
from owl.metrics.frechet import FEATURES, FrechetDistance
from owl.metrics.latents import LatentStatistics
from owl.metrics.perceptual import PerceptualDistance
from owl.metrics.psnr import MeanPSNR
from owl.nn.posterior import Posterior

# Which of the five images each process sees: an uneven share, and none at all.
SHARES = {"uneven": ([0, 2, 3], [1, 4]), "one idle": ([0, 1, 2, 3, 4], [])}


class BlockMeans(nn.Module):
    """In place of EfficientNet, whose float32 noise under another batch size would blur the comparison."""

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(image, (20, 64)).mean(1).flatten(1)


def measure(indices: list[int]) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    image, other = (torch.rand(5, 3, 40, 64, generator=generator) for _ in range(2))
    mean = torch.randn(5, 2, 3, 4, generator=generator)
    frechet, latents, perceptual = FrechetDistance(), LatentStatistics(2), PerceptualDistance(LPIPS())
    vars(frechet)["features"] = BlockMeans()
    psnr, flicker = MeanPSNR(), FlickerAlongFlow()
    axes, buttons = AxisAccuracy(["x", "y"], 0.5), ButtonAccuracy(["a", "b"])
    moved, read = torch.randn(2, 5, 2, generator=generator)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
    still = torch.zeros(1, 2, 2, 20, 32)
    for i in indices:
        x, y = image[i : i + 1], other[i : i + 1]
        frechet.update(x, y)
        perceptual.update(x * 2 - 1, y * 2 - 1)
        latents.update(Posterior(mean[i : i + 1], mean[i : i + 1, :1] - 4))
        psnr.update(x, y)
        flicker.update(torch.stack([x, x / 2], 1), torch.stack([y, y], 1), still)
        ssim.update(x, y)
        axes.update(read[i : i + 1], moved[i : i + 1])
        buttons.update(read[i : i + 1] > 0, moved[i : i + 1] > 0)
    values = {"frechet": frechet, "perceptual": perceptual, "psnr": psnr, "ssim": ssim, "flicker": flicker}
    answers = {name: [metric.compute().item()] for name, metric in values.items()}
    answers |= {f"latent_{name}": value.flatten().tolist() for name, value in latents.compute().items()}
    for controls in (axes.compute(), buttons.compute()):
        answers |= {name: [value.item()] for name, value in controls.items()}
    return answers


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    answers = {name: measure(share[rank]) for name, share in SHARES.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    assert FEATURES == 20 * 64
    alone = measure([0, 1, 2, 3, 4])
    mp.start_processes(process, (str(tmp_path),), nprocs=2, start_method="forkserver")
    for rank in range(2):
        answers = json.loads((tmp_path / f"{rank}.json").read_text())
        for share in SHARES:
            for name, value in alone.items():
                assert answers[share][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (rank, share, name)
