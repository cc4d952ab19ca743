"""Layer pruning: a deep world model is distilled into one that keeps some of its layers."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from owl.errors import OwlError
from owl.flow_matching import logit_normal
from owl.models.world_model import WorldTransformer
from owl.recipes.arguments import store_arguments
from owl.recipes.distillation import Distillation
from owl.recipes.presentation import present
from owl.recipes.randomness import step_generator, windows
from owl.recipes.teachers import forcing_of
from owl.rollout.clips import unpacked_inputs
from owl.rollout.loading import Forcing, load_source


def kept_layers(deep: Sequence[int], shallow: Sequence[int]) -> list[int]:
    """Choose layers that are evenly spaced, preferably with the windows that they have in their new places.

    Args:
        deep: Window of each layer of the teacher.
        shallow: Window of each layer of the student, fewer.

    Returns:
        Positions in the teacher, rising.
    """
    chosen: list[int] = []
    for layer, window in enumerate(shallow):
        ideal = (len(deep) - 1) * layer / max(1, len(shallow) - 1)
        rest = len(shallow) - 1 - layer
        free = range(chosen[-1] + 1 if chosen else 0, len(deep) - rest)
        chosen.append(min(free, key=lambda k: (deep[k] != window, abs(k - ideal))))
    return chosen


def pruned(teacher: WorldTransformer, depth: int) -> WorldTransformer:
    """Return a copy of a world model that keeps some of its layers, see `kept_layers`.

    Raises:
        OwlError: It does not have more layers.
    """
    deep = len(teacher.windows)
    if not 1 <= depth < deep:
        raise OwlError(
            "recipe.arguments",
            f"depth is {depth}, the teacher has {deep} layers, expected 1 to {deep - 1}; correct model.init_args.depth",
        )
    network = WorldTransformer(**teacher.config | {"depth": depth})
    weights = {name: x for name, x in teacher.state_dict().items() if not name.startswith("blocks.")}
    for layer, kept in enumerate(kept_layers(teacher.windows, network.windows)):
        weights |= {f"blocks.{layer}.{name}": x for name, x in teacher.blocks[kept].state_dict().items()}
    network.load_state_dict(weights)
    return network


class LayerPruning(Distillation):
    """Distil a world model into one with fewer layers, for a student that is faster than few steps alone make it.

    The student starts from some of the teacher's layers and learns to predict the teacher's velocity, with and without
    controls, of noisy frames of the dataset after a true past. `owl.recipes.causal_consistency.CausalConsistency`
    then takes it as its ``student``, with the deep world model as ``teacher``.

    loss = mean (v_student - v_teacher)^2, averaged over the elements of each stream.

    Args:
        teacher: Checkpoint or export of the deep world model.
        depth: Layers of the student.
        forcing: How the teacher was trained. None: as stored in its checkpoint or export.
        logit_mean: Mean of the logits of noise levels, which are sigmoid(N(logit_mean, logit_std)).
        logit_std: Standard deviation of the logits.
        context_noise: Noise level of the past.
        checkpoint: Whether activations are recomputed in the backward pass.
        optimizer: Called with the student's parameters.
        warmup_steps: Steps of linear warm-up; a cosine follows until training ends.
        final_lr: Learning rate at the end, as a fraction of its peak.
        compile: Whether to compile the blocks of both networks with ``torch.compile``.

    Raises:
        OwlError: An argument is out of range, or the file is none of a world model.
    """

    def __init__(
        self,
        teacher: str,
        depth: int,
        forcing: Forcing | None = None,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        context_noise: float = 0.0,
        checkpoint: bool = False,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=3e-4, weight_decay=0.01),
        warmup_steps: int = 100,
        final_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        store_arguments(self, logger=False)
        source = load_source(teacher)
        self.hparams["forcing"] = forcing_of(source, forcing)  # that of the student, which its checkpoint stores
        self.causal = self.hparams["forcing"] != "full"
        network = pruned(source.network, depth)
        network.checkpoint = checkpoint
        self.begin(network, {"teacher": source}, optimizer, warmup_steps, final_lr, compile)
        self.logit_mean, self.logit_std, self.context_noise = logit_mean, logit_std, context_noise

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Compute the mean squared difference of the velocities for each stream: scalars."""
        latents, controls = unpacked_inputs(self.network, batch, 1)
        # noise depends on the window and the step: the distribution over processes does not change the training
        generators = [step_generator(step, window, self.device) for window in windows(batch)]
        length = controls.buttons.shape[1]

        def levels(uniform: Tensor) -> Tensor:
            normal = torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6)).to(uniform)
            return logit_normal(normal, self.logit_mean, self.logit_std)

        shown = present(latents, controls, length, self.causal, self.context_noise, levels, generators)
        with torch.no_grad():
            targets = shown.velocities(self.teacher, null=True)
        pairs = list(zip(shown.velocities(self.network, null=True), targets, strict=True))
        return {
            name: torch.stack([(found[name] - target[name]).square().mean() for found, target in pairs]).mean()
            for name in self.weights
        }
