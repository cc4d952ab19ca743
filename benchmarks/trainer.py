"""What the trainer costs: steps/s of fit with every default callback against a bare PyTorch loop.

Both train the quickstart's network with its losses on the same windows from the same loader, in turns, so that the
machine's drift hits both alike. Where the machine drifts by more than what is looked for, one number does not depend on
it: the share of fit's own time in which it does none of what the bare loop does. Run with
``python -m benchmarks.trainer``.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from torch.utils.data.dataloader import _BaseDataLoaderIter

from owl.callbacks.throughput import Throughput
from owl.cli.lightning import main as fit
from owl.data.datamodule import ShardDataModule
from owl.data.recorder import GameRecording
from owl.hardware import multiplies_bfloat16
from owl.losses.reconstruction import weighted_sum
from owl.optim.configuration import parameter_groups
from owl.recipes import image_vae
from owl.recipes.image_vae import ImageVAE
from owl.recipes.images import images

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "quickstart.yaml"
WARM_UP = 5
SHARED_WORK = (
    (image_vae, "images"),
    (_BaseDataLoaderIter, "__next__"),
    (torch.Tensor, "backward"),
    (torch.nn.utils, "clip_grad_norm_"),
    (torch.optim.Optimizer, "zero_grad"),
)
"""What both loops call, besides the recipe's forward pass and the optimiser."""


def build_recipe() -> ImageVAE:
    """Build the quickstart's recipe."""
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_subclass_arguments(ImageVAE, "model")
    model = yaml.safe_load(EXPERIMENT.read_text())["model"]
    with contextlib.chdir(EXPERIMENT.parent):  # it names its network by a path relative to itself
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


def bare_step() -> Callable[[dict[str, torch.Tensor], bool], None]:
    """A training step of the quickstart's recipe in plain PyTorch, of a batch, in bfloat16 or float32."""
    recipe = build_recipe()
    recipe.configure_model()
    recipe.train()
    optimizer = recipe.optimizer(parameter_groups(recipe.network))

    def step(batch: dict[str, torch.Tensor], mixed: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            reconstruction, image, encoding, _ = recipe.reconstruct(images(batch))
            loss = weighted_sum(recipe.terms(reconstruction, image, encoding), recipe.weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(recipe.network.parameters(), 1.0)
        optimizer.step()

    return step


def bare_loop(data: ShardDataModule, steps: int) -> float:
    """Seconds per step of the plain loop."""
    train = bare_step()
    start = 0.0
    for step, batch in enumerate(batches(data, steps + WARM_UP)):
        if step == WARM_UP:
            start = time.perf_counter()
        train(batch, multiplies_bfloat16("cpu"))  # as the experiment's "auto"
    return (time.perf_counter() - start) / steps


class Clock(Callback):
    """Takes the time from the end of the warm-up to the end of training, and that of what any loop does.

    ``fit`` makes its own instance; the result is left in the class.
    """

    seconds = 0.0
    work = 0.0
    between = 0.0

    def on_train_start(self, trainer, pl_module):
        for name in ("reconstruct", "terms"):
            setattr(pl_module, name, self.timed(getattr(pl_module, name)))
        (optimizer,) = trainer.optimizers
        step = self.timed(optimizer.step)

        def step_after(closure):
            loss = closure()
            step()
            return loss

        optimizer.step = step_after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == WARM_UP:
            Clock.work = 0.0
            self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer, *arguments):
        Clock.seconds = time.perf_counter() - self.begin if trainer.global_step > WARM_UP else 0.0

    def on_fit_end(self, trainer, pl_module):
        throughput = next(c for c in trainer.callbacks if isinstance(c, Throughput))
        Clock.between = throughput.wait_seconds / (throughput.wait_seconds + throughput.step_seconds)

    @staticmethod
    def timed(function):
        """The same function, which adds the time that it takes to ``work``."""

        def run(*arguments, **options):
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                Clock.work += time.perf_counter() - start

        return run


def trainer_loop(folder: str, steps: int) -> tuple[float, float, float]:
    """Seconds per step of the command fit, and two shares of them.

    The first is that in which it does what the bare loop does not, the second lies between steps: an upper bound of
    waiting for data.
    """
    sys.argv = [
        *("owl", "fit", "--config", str(EXPERIMENT), "--runs", folder, "--overwrite", "true"),
        *("--data.init_args.path", f"{folder}/data", "--data.init_args.record", "null"),
        *("--trainer.max_steps", str(steps + WARM_UP), "--trainer.max_time", "null"),
        *("--trainer.limit_val_batches", "0", "--trainer.callbacks+", "benchmarks.trainer.Clock"),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # the clock replaces the optimiser's step
        for place, name in SHARED_WORK:
            stack.enter_context(mock.patch.object(place, name, Clock.timed(getattr(place, name))))
        fit(sys.argv[1:])
    return Clock.seconds / steps, 1 - Clock.work / Clock.seconds, Clock.between


def main() -> None:
    """Run both in turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = ShardDataModule(
            f"{folder}/data", batch_size=8, num_workers=1, record=GameRecording(frames=1500, size=(96, 160))
        )
        data.prepare_data()
        data.setup("fit")
        bare, rounds = [], []
        for _ in range(arguments.rounds):
            bare.append(bare_loop(data, arguments.steps))
            rounds.append(trainer_loop(folder, arguments.steps))
    fit, own, between = zip(*rounds, strict=True)
    print(f"bare PyTorch loop       {1 / median(bare):5.2f} steps/s   baseline")
    print(f"Trainer, all callbacks  {1 / median(fit):5.2f} steps/s   {median(bare) / median(fit):.3f}x by the medians")
    print(f"the trainer's own       {median(own):.2%} of its time ({min(own):.2%} to {max(own):.2%} in single rounds)")
    print(f"between steps           {median(between):.2%} of it: waiting for data and bookkeeping together")


if __name__ == "__main__":
    from benchmarks import trainer  # fit imports the clock by this name, and must find the one that is read here

    trainer.main()
