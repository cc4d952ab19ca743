"""Self forcing: a few-step student learns on its own rollouts to generate what its teacher would."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric

from owl.distributed.sharding import shard
from owl.errors import OwlError, at_least
from owl.flow_matching import shifted
from owl.losses.distribution_matching import dmd_gradient, dmd_loss
from owl.losses.reconstruction import weighted_sum
from owl.losses.score_identity import sid_loss
from owl.models.sampling import Sampling
from owl.models.world_model import Controls, Streams
from owl.nn.frozen import freeze, trained
from owl.optim.configuration import parameter_groups, with_schedule
from owl.optim.stepping import ManualStep, manual_step, with_gradient
from owl.recipes.adversarial import refuse_penalties
from owl.recipes.arguments import store_arguments
from owl.recipes.compilation import compile_for_training
from owl.recipes.critic_lag import CriticLag
from owl.recipes.hooks import ChecksEncoder, MeasuresEpochs, SeedsByWindow
from owl.recipes.logging import log_losses
from owl.recipes.memory import check_rollout
from owl.recipes.presentation import Presentation, present
from owl.recipes.randomness import MEASURED, step_generator, windows
from owl.recipes.student_adversary import Adversary
from owl.recipes.student_rollouts import Generated, Plan, StudentRollouts
from owl.recipes.teachers import check_data, check_same, copied, forcing_of
from owl.rollout.clips import unpacked_inputs
from owl.rollout.generate import Schedule
from owl.rollout.loading import Forcing, check_causal, load_source

LOWEST, HIGHEST = 0.02, 0.98
"""Noise levels of distribution matching are clamped to this range."""
STUDENT, CRITIC, FRAMES = 0, 1, 2
"""Parts of a window's noise: of the two losses, and of the first frame of its rollout."""


def student_adamw(parameters: Iterable) -> Optimizer:
    """Return the student's default optimiser; the command line can read no lambda with a tuple."""
    return AdamW(parameters, lr=2e-6, betas=(0.0, 0.999))


def critic_adamw(parameters: Iterable) -> Optimizer:
    """Return the critic's default optimiser."""
    return AdamW(parameters, lr=4e-7, betas=(0.0, 0.999))


class SelfForcing(ChecksEncoder, SeedsByWindow, MeasuresEpochs):
    """Train a student in a few denoising steps per frame on its own rollouts (Self Forcing, Huang et al. 2025).

    In every step the student generates a rollout with its KV cache, as in play: the frames after the context are
    denoised to a random exit step by the consistency sampler, and committed without gradients. At every
    ``critic_steps``-th step the student learns by distribution matching from a frozen teacher and a critic. Gradients
    flow through the last denoising step of the last ``gradient_frames`` frames and no further. At every step the critic
    learns to denoise the student's frames, by flow matching. ``global_step`` counts the critic's steps.

    A causal teacher, trained with ``forcing`` teacher or diffusion, scores each frame after the clean generated frames
    before it. A bidirectional one, trained with ``full``, scores all frames at one noise level.

    Guidance: x_real = null + w (conditional - null) with w = ``guidance``, as everywhere in OWL; w = 1 is none. The
    code of Self Forcing writes conditional + s (conditional - null), which is the same for s = w - 1. The null is the
    learned null control and not idle controls; the context keeps its controls.

    Args:
        student: Checkpoint or export from which the student starts: a causal world model that generates frames in few
            steps, as `owl.recipes.causal_consistency.CausalConsistency` trains it.
        teacher: Checkpoint or export of the frozen teacher.
        critic: Checkpoint or export from which the critic starts. None: the teacher's.
        forcing: How the teacher was trained. None: as stored in its checkpoint or export.
        steps: Denoising steps of the student per frame.
        shift: Shift of noise levels towards noise (`owl.flow_matching.shifted`), of the student's steps and of the
            uniform noise levels at which its frames are scored.
        frames: Longest rollout. Each rollout has a random length from ``gradient_frames`` to this number.
        gradient_frames: Last frames of a rollout that are scored and carry gradients.
        window: Last frames that teacher and critic see, including the scored ones: at most the length of the clips that
            the teacher was trained on, also for longer rollouts. None: that length.
        context: Frames of the dataset before a rollout; 0: none. Clips need ``context + frames`` frames.
        context_noise: Noise level of all context, of the student, the teacher and the critic.
        guidance: Weight w of the teacher's guidance on controls, see above.
        matching: "dmd" (`owl.losses.distribution_matching`), or "sid" (`owl.losses.score_identity`), whose gradient
            also flows through teacher and critic to their inputs.
        sid_alpha: With "sid": its alpha.
        matching_weight: Weight of this loss; 0 trains with the ``adversary`` alone.
        adversary: Discriminator of the student's frames and those of the dataset. None: none.
        weights: Weight of each stream in the losses of student and critic, by name. None: those of the network.
        self_rollout: Whether the student generates its own past. False is the baseline without (CausVid, Yin et al.
            2025): the student predicts frames after the dataset's frames, in one pass, from random noise levels of its
            schedule; it is not shown its own errors.
        critic_steps: Steps of the critic per step of the student.
        two_passes: Whether rollouts are generated without gradients and the scored frames then once more, each with a
            backward pass of its own. The gradients are the same, and memory does not grow with ``gradient_frames``.
        checkpoint: Whether activations are recomputed in the backward pass.
        optimizer: Called with the student's parameters.
        critic_optimizer: Called with the critic's parameters.
        clip: Maximum norm of the gradients of each network. None: no clipping.
        accumulate: Batches per step.
        warmup_steps: Steps of linear warm-up of both learning rates; a cosine follows until training ends.
        final_lr: Learning rates at the end, as a fraction of their peaks.
        compile: Whether to compile the blocks of teacher and critic with ``torch.compile``.

    Raises:
        OwlError: An argument is out of range, a file is none of a world model, or the world models differ.
    """

    exports = ("network",)  # neither averages nor exports the critic

    def __init__(
        self,
        student: str,
        teacher: str,
        critic: str | None = None,
        forcing: Forcing | None = None,
        steps: int = 4,
        shift: float = 5.0,
        frames: int = 16,
        gradient_frames: int = 4,
        window: int | None = None,
        context: int = 0,
        context_noise: float = 0.0,
        guidance: float = 1.0,
        matching: Literal["dmd", "sid"] = "dmd",
        sid_alpha: float = 1.0,
        matching_weight: float = 1.0,
        adversary: Adversary | None = None,
        weights: dict[str, float] | None = None,
        self_rollout: bool = True,
        critic_steps: int = 5,
        two_passes: bool = False,
        checkpoint: bool = False,
        optimizer: Callable[[Iterable], Optimizer] = student_adamw,
        critic_optimizer: Callable[[Iterable], Optimizer] = critic_adamw,
        clip: float | None = 10.0,
        accumulate: int = 1,
        warmup_steps: int = 0,
        final_lr: float = 1.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, steps=steps, gradient_frames=gradient_frames, critic_steps=critic_steps, accumulate=accumulate)
        at_least(0, context=context)
        # forcing is the teacher's: the checkpoint of a student, which is causal, must not store it as its own
        store_arguments(self, logger=False, ignore=["adversary", "forcing"])
        self.automatic_optimization = False
        sources = {
            "student": load_source(student, checkpoint),
            "teacher": load_source(teacher),
        }
        sources["critic"] = load_source(critic, checkpoint) if critic else copied(sources["teacher"], checkpoint)
        check_causal(sources["student"], "student")
        for role in ("teacher", "critic"):
            check_same(sources["student"], sources[role], role)
        self.sources = sources
        self.network = sources["student"].network
        self.teacher = freeze(sources["teacher"].network)
        self.critic = sources["critic"].network
        self.causal = forcing_of(sources["teacher"], forcing) != "full"
        self.network.sampling = Sampling(steps, shift, "consistency", context_noise)
        self.schedule = Schedule.of(self.network.sampling)
        self.shift, self.guidance = shift, guidance
        self.frames, self.gradient_frames, self.context = frames, gradient_frames, context
        window = window or sources["teacher"].length or context + frames
        for name, least in (("frames", frames), ("window", window)):
            if least < gradient_frames:
                raise OwlError(
                    "recipe.arguments",
                    f"gradient_frames is {gradient_frames}, but {name} is {least}, expected at least as many; correct "
                    f"model.init_args.{name}",
                )
        if matching_weight < 0 or (matching_weight == 0 and adversary is None):
            raise OwlError(
                "recipe.arguments",
                f"matching_weight is {matching_weight} and there is {'an' if adversary else 'no'} adversary, expected "
                "a positive weight or an adversary; correct model.init_args.matching_weight",
            )
        if two_passes and not self_rollout:
            raise OwlError(
                "recipe.arguments",
                "two_passes is true, but without self_rollout frames are predicted in one pass; set "
                "model.init_args.two_passes to false",
            )
        if adversary is not None:
            adversary.check(self.network)
        self.matching, self.sid_alpha, self.matching_weight = matching, sid_alpha, matching_weight
        self.adversary, self.self_rollout = adversary, self_rollout
        self.rollouts = StudentRollouts(self.network, self.schedule, frames, gradient_frames, window, context)
        self.critic_steps, self.two_passes = critic_steps, two_passes
        self.weights = {name: stream.weight for name, stream in self.network.generated.items()}
        if unknown := (weights or {}).keys() - self.weights.keys():
            raise OwlError(
                "recipe.arguments",
                f"weights name {min(unknown)}, the student generates {', '.join(self.weights)}; correct "
                "model.init_args.weights",
            )
        self.weights |= weights or {}
        self.optimizer, self.critic_optimizer = optimizer, critic_optimizer
        self.clip, self.accumulate = clip, accumulate
        self.warmup_steps, self.final_lr = warmup_steps, final_lr
        self.compile_networks = compile
        self.lag = CriticLag()
        self.measured = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in ("critic", "teacher")})
        self._fits = False

    def configure_model(self) -> None:
        """Compile the blocks of teacher and critic; spread all weights under FSDP2.

        Raises:
            OwlError: FSDP2 is used with penalties of the adversary.
        """
        if self.compile_networks:
            compile_for_training(self, *self.teacher.blocks, *self.critic.blocks)
        if self.device_mesh is not None:
            networks: list[nn.Module] = [self.network, self.critic, self.teacher]
            if self.adversary is not None:
                refuse_penalties(self.adversary.gamma, "model.init_args.adversary.init_args.gamma")
                networks += [self.adversary.discriminator, *filter(None, [self.adversary.decoder])]
            for network in networks:
                shard(network, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Check that the dataset has the latents, controls and stride of the world models."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._described = check_data(self.network, self.sources, data)

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Streams, Controls]:
        """Return the standardised latents of a batch and its controls."""
        return unpacked_inputs(self.network, batch, self.context + self.frames)

    def generators(self, batch: dict[str, Tensor], step: int) -> Callable[[int], list[torch.Generator]]:
        """Return a function that returns a generator of each window of a batch for a part of its noise.

        Noise depends on the window and the step: the distribution over processes does not change the training.
        """
        numbers = windows(batch)
        return lambda part: [step_generator(step, number, self.device, part) for number in numbers]

    def roll_out(
        self, latents: Streams, controls: Controls, plan: Plan, of: Callable[[int], list[torch.Generator]], grad: bool
    ) -> Generated:
        """Generate a rollout, whose last frames carry gradients, in one pass or in two, if ``grad`` is true."""

        def of_frame(frame: int) -> list[torch.Generator]:
            return of(FRAMES + frame)

        if not self.self_rollout:
            return self.rollouts.after_data(latents, controls, plan, of_frame, grad)
        own = (grad and not self.two_passes, grad and self.two_passes)
        return self.rollouts(latents, controls, plan, of_frame, *own)

    def compared(self, latents: Streams, generated: Generated) -> tuple[Tensor, Tensor]:
        """Return the frames of the dataset and of the student that the adversary compares, float[B, K, c, h, w]."""
        own = generated.last["video"].detach()
        return latents["video"][:, generated.end - own.shape[1] : generated.end], own

    def present(self, generated: Generated, generators: list[torch.Generator]) -> Presentation:
        """Add noise of random levels to the scored frames of a rollout, to show them to teacher and critic."""
        count, noise = self.gradient_frames, self.schedule.context_noise

        def levels(uniform: Tensor) -> Tensor:
            return shifted(uniform, self.shift).clamp(LOWEST, HIGHEST)

        return present(
            generated.clip, generated.controls, count, self.causal, noise, levels, generators, generated.past
        )

    def score(self, shown: Presentation) -> tuple[dict[str, Tensor], Streams]:
        """Compute the loss of distribution matching, and note how well the critic follows.

        Returns:
            The loss of each stream, float[], and the gradient of their weighted sum towards the scored frames, "video"
            float[B, K, c, h, w], ...
        """
        scored = {name: x[:, -self.gradient_frames :].detach().requires_grad_() for name, x in shown.clean.items()}
        # views, because networks that are given a leaf cannot be watched by torch's counter of operators
        seen = shown.of({name: x.view_as(x) for name, x in scored.items()})
        with torch.set_grad_enabled(self.matching == "sid"):
            real, fake = self.predictions(seen)
        losses = {
            name: sid_loss(x, real[name], fake[name], self.sid_alpha)
            if self.matching == "sid"
            else dmd_loss(x, dmd_gradient(x, real[name], fake[name]))
            for name, x in scored.items()
        }
        total = self.matching_weight * weighted_sum(losses, self.weights)
        slopes = torch.autograd.grad(total, list(scored.values()))
        return {name: loss.detach() for name, loss in losses.items()}, dict(zip(scored, slopes, strict=True))

    def predictions(self, shown: Presentation) -> tuple[Streams, Streams]:
        """Return x0 of the scored frames as predicted by the teacher, with guidance, and by the critic."""
        (critic,) = shown.velocities(self.critic)
        conditional, teacher = shown.guided(self.teacher, self.guidance)
        self.lag.update(*(weighted_sum(shown.errors(velocity), self.weights) for velocity in (critic, conditional)))
        return shown.to_clean(teacher), shown.to_clean(critic)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Step the critic, the discriminator if there is one and, when it is due, the student."""
        latents, controls = self.inputs(batch)
        of = self.generators(batch, self.global_step)
        self.check_memory(latents, controls, of)
        with manual_step(self, self.accumulate) as step:
            student, critic, *others = self.trainer.optimizers
            due = step.due(self.critic_steps)
            generated = self.roll_out(latents, controls, self.rollouts.plan(step.number), of, grad=due)
            terms: dict[str, Tensor] = {}
            if due:
                matched, gradient = self.score(self.present(generated, of(STUDENT)))
                terms = {f"{self.matching}_{name}": loss for name, loss in matched.items()}
                terms |= {"critic_lag": self.lag.ratio}
                if self.adversary is not None:
                    pair = self.compared(latents, generated)
                    terms["adversarial"], slope = self.adversary.gradient(self.network, *pair, step.number)
                    gradient["video"] = gradient["video"] + slope
                self.step_student(step, student, generated, gradient)
                terms["student_gradient"] = get_total_norm(gradient.values())
            shown = self.present(generated, of(CRITIC))
            (velocity,) = shown.velocities(self.critic)
            losses = shown.errors(velocity)
            loss = weighted_sum(losses, self.weights)
            step(critic, loss, self.clip)
            if self.adversary is not None:
                with_penalties = step.due(self.adversary.penalty_every)
                judged, found = self.adversary.loss(self.network, *self.compared(latents, generated), with_penalties)
                step(others[0], judged)
                terms |= found
        log_losses(self, loss, terms | {f"critic_{name}": own for name, own in losses.items()})
        return loss

    def step_student(self, step: ManualStep, student: Optimizer, generated: Generated, gradient: Streams) -> None:
        """Run the backward pass of a gradient towards the last frames, of all of them or of one after another."""
        frames = [generated.last] if generated.again is None else generated.again
        nothing, first = torch.zeros((), device=self.device), 0
        for part in frames:
            last = first + next(iter(part.values())).shape[1]
            parts = [with_gradient(nothing, x, gradient[name][:, first:last]) for name, x in part.items()]
            step(student, torch.stack(parts).sum(), self.clip)
            first = last

    def check_memory(self, latents: Streams, controls: Controls, of: Callable[[int], list[torch.Generator]]) -> None:
        """Check before the first step that the activations of the frames with gradients fit into memory.

        Raises:
            OwlError: They do not.
        """
        if not self._fits:
            per_frame = self.rollouts.bytes_per_frame(latents, controls, of)
            check_rollout(per_frame, 1 if self.two_passes else self.gradient_frames, self.device)
            self._fits = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check at the logging interval, since reading a number waits for the device, that the critic follows."""
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.lag.check()

    def measure(self, batch: dict[str, Tensor]) -> None:
        """Measure the errors of critic and teacher on rollouts with all steps, with the same noise every time."""
        latents, controls = self.inputs(batch)
        of = self.generators(batch, MEASURED)
        shown = self.present(self.roll_out(latents, controls, self.rollouts.whole, of, grad=False), of(CRITIC))
        for name, network in (("critic", self.critic), ("teacher", self.teacher)):
            (velocity,) = shown.velocities(network)
            self.measured[name].update(weighted_sum(shown.errors(velocity), self.weights), len(controls.buttons))  # type: ignore[operator]

    def log_measured(self, split: str) -> None:
        """Log the errors of critic and teacher, and their ratio."""
        errors = {name: metric.compute() for name, metric in self.measured.items()}  # type: ignore[operator]
        for metric in self.measured.values():
            metric.reset()  # type: ignore[operator]
        values = errors | {"critic_lag": errors["critic"] / errors["teacher"]}
        # already equal in all processes; avoids Lightning's warning
        self.log_dict({f"{split}/{name}": value for name, value in values.items()}, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimisers of student, critic and discriminator, each with warm-up and cosine."""
        optimizers = [
            self.optimizer(parameter_groups(self.network)),
            self.critic_optimizer(parameter_groups(self.critic)),
        ]
        if self.adversary is not None:
            optimizers.append(self.adversary.optimizer(trained(self.adversary.discriminator).values()))
        return [with_schedule(self, each, self.warmup_steps, self.final_lr, self.accumulate) for each in optimizers]
