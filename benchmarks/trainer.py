"""What the trainer costs: steps/s of fit with every default callback against a bare PyTorch loop.

Both train the quickstart's network with its losses on the same windows from the same loader, in turns, so that the
machine's drift hits both alike. Run with ``python benchmarks/trainer.py``.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from owl.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from owl.callbacks.ema import EMA
from owl.callbacks.media import Media
from owl.callbacks.nonfinite import NonFiniteGuard
from owl.callbacks.report import Report
from owl.callbacks.step_seed import StepSeed
from owl.callbacks.throughput import Throughput
from owl.data.datamodule import ShardDataModule
from owl.data.recorder import GameRecording
from owl.recipes.image_vae import ImageVAE

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "quickstart.yaml"
WARM_UP = 5


def build_recipe() -> ImageVAE:
    """Build the quickstart's recipe."""
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_subclass_arguments(ImageVAE, "model")
    model = yaml.safe_load(EXPERIMENT.read_text())["model"]
    return parser.instantiate_classes(parser.parse_object({"model": model})).model


def batches(data: ShardDataModule, count: int):
    """Yield exactly ``count`` training batches, over as many epochs as that takes."""
    loader = data.train_dataloader()
    while True:
        for batch in loader:
            yield batch
            count -= 1
            if count == 0:
                return


def bare_loop(data: ShardDataModule, steps: int) -> float:
    """Seconds per step of the plain loop."""
    recipe = build_recipe()
    recipe.configure_model()
    recipe.train()
    parameters = list(recipe.network.parameters())
    optimizer = recipe.optimizer(parameters)
    start = 0.0
    for step, batch in enumerate(batches(data, steps + WARM_UP)):
        if step == WARM_UP:
            start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            terms = recipe.terms(*recipe.reconstruct(recipe.images(batch)))
            loss = torch.stack([getattr(recipe.weights, name) * term for name, term in terms.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return (time.perf_counter() - start) / steps


class Clock(Throughput):
    """Also takes the time from the end of the warm-up to the end of training."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == WARM_UP:
            self.begin = time.perf_counter()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer, *arguments):
        super().on_train_batch_end(trainer, *arguments)
        self.end = time.perf_counter()


def trainer_loop(data: ShardDataModule, steps: int, folder: str) -> tuple[float, float]:
    """Seconds per step of fit, and the share of them between steps (an upper bound of waiting for data)."""
    clock = Clock()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=steps + WARM_UP,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=20,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[StepSeed(), NonFiniteGuard(), EMA(0.99), clock, Media(), Report(), Checkpoint()],
    )
    trainer.fit(build_recipe(), datamodule=data)
    return (clock.end - clock.begin) / steps, clock.wait_seconds / (clock.wait_seconds + clock.step_seconds)


def main() -> None:
    """Run both in turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = ShardDataModule(
            f"{folder}/data", batch_size=16, num_workers=1, record=GameRecording(frames=1500, size=(96, 160))
        )
        data.prepare_data()
        data.setup("fit")
        bare, fit, waits = [], [], []
        for _ in range(arguments.rounds):
            bare.append(bare_loop(data, arguments.steps))
            seconds, wait = trainer_loop(data, arguments.steps, folder)
            fit.append(seconds)
            waits.append(wait)
    ratios = sorted(b / f for b, f in zip(bare, fit, strict=True))
    print(f"bare PyTorch loop     {1 / statistics.median(bare):6.2f} steps/s   baseline")
    print(
        f"Trainer, all callbacks {1 / statistics.median(fit):5.2f} steps/s   "
        f"{statistics.median(ratios):.3f}x (from {ratios[0]:.3f} to {ratios[-1]:.3f} in {len(ratios)} rounds)"
    )
    print(
        f"between steps         {statistics.median(waits):.2%} of the time: waiting for data and bookkeeping together"
    )


if __name__ == "__main__":
    main()
