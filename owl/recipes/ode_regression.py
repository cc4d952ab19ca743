"""Few-step initialisation: regression of a causal world model's flow map on stored trajectories."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from owl.errors import OwlError
from owl.models.sampling import Sampling
from owl.recipes.arguments import store_arguments
from owl.recipes.distillation import Distillation
from owl.recipes.presentation import present
from owl.recipes.randomness import step_generator, windows
from owl.rollout.clips import unflat, unpacked_inputs
from owl.rollout.loading import check_causal, load_source
from owl.rollout.trajectories import MODALITY, standardization


class ODERegression(Distillation):
    """Train a student to jump to the end of its teacher's trajectories, in the noise levels at which they are stored.

    The comparison to `owl.recipes.causal_consistency.CausalConsistency`, from the same kind of teacher (causal ODE
    regression: CausVid, Yin et al. 2025, section 4.3; Self Forcing, Huang et al. 2025, section 4). ``python -m owl data
    trajectories`` writes the dataset: for each frame the points x_t of the teacher's flow after a true past. The
    student's prediction of x0 from a random point of each frame is moved to the last point of its trajectory.

    The student generates with the sampler "consistency" in as many steps as there are points, with the same shift.

    loss = mean (x0_student(x_t, t) - x_0)^2, averaged over the elements of each stream.

    Args:
        student: Checkpoint or export from which the student starts, such as the teacher's.
        context_noise: Noise level of the context.
        checkpoint: Whether activations are recomputed in the backward pass.
        optimizer: Called with the student's parameters.
        warmup_steps: Steps of linear warm-up; a cosine follows until training ends.
        final_lr: Learning rate at the end, as a fraction of its peak.
        compile: Whether to compile the blocks with ``torch.compile``.

    Raises:
        OwlError: The file is none of a causal world model.
    """

    def __init__(
        self,
        student: str,
        context_noise: float = 0.0,
        checkpoint: bool = False,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=1e-4, weight_decay=0.0),
        warmup_steps: int = 100,
        final_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        store_arguments(self, logger=False)
        source = load_source(student, checkpoint)
        check_causal(source, "student")
        self.begin(source.network, {"student": source}, optimizer, warmup_steps, final_lr, compile)
        self.context_noise = context_noise

    def setup(self, stage: str) -> None:
        """Check that the dataset has trajectories of the student's latents.

        Raises:
            OwlError: It does not.
        """
        super().setup(stage)
        modalities, url = self._described
        described = modalities.get(MODALITY)
        if described is None:
            raise OwlError(
                "dataset.modalities",
                f"{url} has no {MODALITY}, the recipe learns from those of its teacher; make them with `python -m owl "
                "data trajectories`",
            )
        if list(described["streams"].items()) != list(standardization(self.network).items()):  # also in their order
            raise OwlError(
                "recipe.teacher",
                f"the trajectories of {url} have the streams or latent statistics of the teacher "
                f"{described['teacher']['checkpoint']}, expected those of the student {self.sources['student'].path}; "
                "give a student of that teacher",
            )
        self.noise_levels, self.length = described["noise_levels"], described["length"]
        steps, shift = len(self.noise_levels), described["shift"]
        self.network.sampling = Sampling(steps, shift, "consistency", self.context_noise)

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Compute the mean squared error of x0 for each stream: scalars."""
        latents, controls = unpacked_inputs(self.network, batch, self.length)
        if MODALITY not in batch:
            raise OwlError(
                "recipe.dataset",
                f"samples hold no {MODALITY}, expected those of the dataset; add it to data.init_args.modalities",
            )
        # noise depends on the window and the step: the distribution over processes does not change the training
        generators = [step_generator(step, window, self.device) for window in windows(batch)]
        known = torch.tensor(self.noise_levels, device=self.device)

        def levels(uniform: Tensor) -> Tensor:
            return known[(uniform * len(known)).long()]

        shown = present(latents, controls, self.length, True, self.context_noise, levels, generators)
        points = batch[MODALITY]
        drawn = (shown.noise_level[..., None] == known).int().argmax(-1)
        x = points.take_along_dim(drawn[..., None, None], 2).squeeze(2)
        shown = replace(shown, x=unflat(x, self.network))
        (velocity,) = shown.velocities(self.network)
        clean = unflat(points[:, :, -1], self.network)
        return {name: (found - clean[name]).square().mean() for name, found in shown.to_clean(velocity).items()}
