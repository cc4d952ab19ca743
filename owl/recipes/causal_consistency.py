"""Few-step initialisation: consistency distillation of a causal world model, on the fly."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor
from torch.optim import AdamW, Optimizer

from owl.errors import at_least
from owl.flow_matching import consistency_target, to_interval
from owl.models.sampling import Sampling
from owl.models.world_model import Streams, WorldTransformer
from owl.recipes.arguments import store_arguments
from owl.recipes.distillation import Distillation
from owl.recipes.presentation import Presentation, present
from owl.recipes.randomness import step_generator, windows
from owl.recipes.teachers import check_same, copied
from owl.rollout.clips import flat, unflat, unpacked_inputs
from owl.rollout.loading import check_causal, load_source


class CausalConsistency(Distillation):
    """Distil a causal world model into a student that generates a frame in one or a few steps.

    The student's prediction of a frame's x0 is moved towards its own prediction a little further along the teacher's
    flow (consistency distillation, Song et al. 2023, algorithm 2), with the true past as context. Nothing is stored:
    the trajectories of the teacher are followed one step at a time, from noisy frames of the dataset. A causal teacher
    makes a student without jumps between frames (Causal Forcing, arXiv 2602.02214).

    The student generates with the sampler "consistency", in any number of steps. `owl.recipes.self_forcing.SelfForcing`
    starts from it.

    loss = mean (x0_student(x_t, t) - sg(x0_student(x_t', t')))^2, averaged over the elements of each stream, with
    t' = t - 1 / intervals and x_t' from one Euler step of the teacher.

    Args:
        teacher: Checkpoint or export of the causal world model.
        student: Checkpoint or export from which the student starts. None: the teacher's.
        intervals: Noise levels are 1 / intervals, 2 / intervals, ..., 1, drawn for each frame.
        guidance: Weight w of the teacher's guidance on controls, null + w (conditional - null); 1: none. The student
            learns the guided flow.
        context_noise: Noise level of the context.
        steps: Default steps in which the student generates a frame; training does not depend on them.
        shift: Shift of their noise levels towards noise (`owl.flow_matching.shifted`).
        checkpoint: Whether activations are recomputed in the backward pass.
        optimizer: Called with the student's parameters.
        warmup_steps: Steps of linear warm-up; a cosine follows until training ends.
        final_lr: Learning rate at the end, as a fraction of its peak.
        compile: Whether to compile the blocks of both networks with ``torch.compile``.

    Raises:
        OwlError: An argument is out of range, a file is none of a world model, the teacher is not causal, or the world
            models differ.
    """

    def __init__(
        self,
        teacher: str,
        student: str | None = None,
        intervals: int = 32,
        guidance: float = 1.0,
        context_noise: float = 0.0,
        steps: int = 2,
        shift: float = 2.0,
        checkpoint: bool = False,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=1e-4, weight_decay=0.0),
        warmup_steps: int = 100,
        final_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, intervals=intervals)
        store_arguments(self, logger=False)
        source = load_source(teacher)
        start = load_source(student, checkpoint) if student else copied(source, checkpoint)
        check_causal(source, "teacher")
        check_causal(start, "student")
        check_same(start, source, "teacher")
        start.network.sampling = Sampling(steps, shift, "consistency", context_noise)
        self.begin(start.network, {"teacher": source, "student": start}, optimizer, warmup_steps, final_lr, compile)
        self.intervals, self.guidance, self.context_noise = intervals, guidance, context_noise

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Compute the mean squared error of x0 for each stream: scalars."""
        latents, controls = unpacked_inputs(self.network, batch, 1)
        # noise depends on the window and the step: the distribution over processes does not change the training
        generators = [step_generator(step, window, self.device) for window in windows(batch)]
        length = controls.buttons.shape[1]

        def levels(uniform: Tensor) -> Tensor:
            return to_interval(1 - uniform, self.intervals)

        shown = present(latents, controls, length, True, self.context_noise, levels, generators)
        (velocity,) = shown.velocities(self.network)
        target = self.target(shown)
        return {name: (x - target[name]).square().mean() for name, x in shown.to_clean(velocity).items()}

    def target(self, shown: Presentation) -> Streams:
        """Compute the targets of x0, which are evaluated for all streams together."""

        def velocity(network: WorldTransformer, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
            def of(x: Tensor, level: Tensor) -> Tensor:
                at = replace(shown, x=unflat(x, network), noise_level=level)
                return flat(at.guided(network, guidance)[1])

            return of

        following = (shown.noise_level - 1 / self.intervals).clamp(min=0)
        teacher, student = velocity(self.teacher, self.guidance), velocity(self.network, 1.0)
        target = consistency_target(teacher, student, flat(shown.x), shown.noise_level, following)
        return unflat(target, self.network)
