"""What recipes have in common that train a world model to agree with another one, frame by frame."""

from collections.abc import Callable, Iterable

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from owl.distributed.sharding import shard
from owl.losses.reconstruction import weighted_sum
from owl.models.world_model import WorldTransformer
from owl.nn.frozen import freeze
from owl.optim.configuration import parameter_groups, with_schedule
from owl.recipes.compilation import compile_for_training
from owl.recipes.hooks import ChecksEncoder, MeasuresEpochs, SeedsByWindow
from owl.recipes.logging import log_losses, log_means
from owl.recipes.randomness import MEASURED
from owl.recipes.teachers import check_data
from owl.rollout.loading import Source


class Distillation(ChecksEncoder, SeedsByWindow, MeasuresEpochs):
    """Base class of these recipes, which define `losses` and call `begin` in their constructor.

    Attributes:
        network: The student.
        teacher: The frozen world model, if ``sources`` name one.
        sources: Where the world models come from, by their role.
        weights: Weight of the loss of each generated stream.
    """

    network: WorldTransformer
    teacher: WorldTransformer

    def begin(
        self,
        network: WorldTransformer,
        sources: dict[str, Source],
        optimizer: Callable[[Iterable], Optimizer],
        warmup_steps: int,
        final_lr: float,
        compile: bool,
    ) -> None:
        """Store the world models and the settings of their training.

        Args:
            network: The student.
            sources: See above.
            optimizer: Called with the student's parameters.
            warmup_steps: Steps of linear warm-up; a cosine follows until training ends.
            final_lr: Learning rate at the end, as a fraction of its peak.
            compile: Whether to compile the blocks of both networks.
        """
        self.sources = sources
        self.network = network
        if "teacher" in sources:
            self.teacher = freeze(sources["teacher"].network)
        self.weights = {name: stream.weight for name, stream in network.generated.items()}
        self.optimizer = optimizer
        self.warmup_steps, self.final_lr = warmup_steps, final_lr
        self.compile_networks = compile
        self.means = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in self.weights})

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Compute the loss of each stream, scalars, with the noise of a step."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Compile the blocks, and spread the weights under FSDP2."""
        networks = [part for part in self.children() if isinstance(part, WorldTransformer)]
        if self.compile_networks:
            compile_for_training(self, *(block for network in networks for block in network.blocks))
        if self.device_mesh is not None:
            for network in networks:
                shard(network, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Check that the dataset has the latents, controls and stride of the world models."""
        self._described = check_data(self.network, self.sources, self.trainer.datamodule)  # type: ignore[attr-defined]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step."""
        losses = self.losses(batch, self.global_step)
        loss = weighted_sum(losses, self.weights)
        log_losses(self, loss, losses)
        return loss

    def measure(self, batch: dict[str, Tensor]) -> None:
        """Measure the loss of every stream."""
        for name, loss in self.losses(batch, MEASURED).items():
            self.means[name].update(loss, len(batch["buttons"]))  # type: ignore[operator]

    def log_measured(self, split: str) -> None:
        """Log the mean loss of every stream and the weighted sum; reset the means."""
        log_means(self, self.means, self.weights, split)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with warm-up and a cosine schedule over the trainer's steps."""
        return with_schedule(self, self.optimizer(parameter_groups(self.network)), self.warmup_steps, self.final_lr)
