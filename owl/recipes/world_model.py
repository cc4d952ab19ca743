"""Training of the world model: rectified flow on latents, with an independent noise level for each frame."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric

from owl.distributed.reduction import mean_over_processes
from owl.distributed.sharding import shard
from owl.flow_matching import add_noise, each, logit_normal, velocity_loss
from owl.latents import described, load_latent_stats
from owl.losses.reconstruction import weighted_sum
from owl.models.streams import hide
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.nn.attention import NEVER, Frames, clip_frames
from owl.optim.configuration import parameter_groups, with_schedule
from owl.recipes.arguments import fractions, store_arguments
from owl.recipes.compilation import compile_for_training
from owl.recipes.hooks import ChecksEncoder, MeasuresEpochs, SeedsByWindow
from owl.recipes.logging import log_losses
from owl.recipes.randomness import step_generator, windows
from owl.rollout.clips import clip_inputs, draw
from owl.rollout.loading import Forcing

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels at which validation measures the loss."""


class WorldModel(ChecksEncoder, SeedsByWindow, MeasuresEpochs):
    """Train a world model to predict the latents of each frame from previous frames and the controls.

    ``forcing`` selects how a clip is presented:

    - ``teacher``: the clip twice, once (almost) clean as context and once noisy; a noisy frame attends to the clean
      frames before it and to itself. This matches streaming, without noisy context. Uses twice the tokens.
    - ``diffusion``: once, each frame at an independent noise level (Diffusion Forcing, Chen et al. 2024).
    - ``full``: once, all frames at one level with bidirectional attention: the bidirectional teacher of self forcing.

    The loss is the mean squared error of the velocity, averaged over the elements of each stream. A stream with
    ``dropout`` is hidden at the input of some frames, for inner guidance (VideoJAM, Chefer et al. 2025).

    Args:
        network: The world model.
        forcing: "teacher", "diffusion" or "full", see above.
        logit_mean: Mean of the logits of noise levels, which are sigmoid(N(logit_mean, logit_std)).
        logit_std: Standard deviation of the logits.
        context_noise: With ``teacher``: the noise levels of the context are uniform between 0 and this value, for
            robustness to the errors of a rollout.
        control_dropout: Probability of replacing the controls of a frame by the null control, for guidance.
        optimizer: Called with the parameters; e.g. ``owl.optim.MuonAdamW``.
        warmup_steps: Steps of linear warm-up; a cosine follows until training ends.
        final_lr: Learning rate at the end, as a fraction of its peak.
        compile: Whether to compile the blocks with ``torch.compile``; on CPUs this requires a C++ compiler.
    """

    def __init__(
        self,
        network: WorldTransformer,
        forcing: Forcing = "teacher",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        context_noise: float = 0.15,
        control_dropout: float = 0.1,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=3e-4, weight_decay=0.01),
        warmup_steps: int = 100,
        final_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        fractions(context_noise=context_noise, control_dropout=control_dropout)
        store_arguments(self, logger=False)
        self.network = network
        self.forcing = forcing
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self.context_noise = context_noise
        self.control_dropout = control_dropout
        self.weights = {name: stream.weight for name, stream in network.generated.items()}
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.final_lr = final_lr
        self.compile_network = compile
        # Lightning's means are wrong if processes have unequal numbers of samples: it rounds the mean batch size
        self.means = {(name, t): MeanMetric(nan_strategy="disable") for name in network.generated for t in NOISE_LEVELS}
        self.metrics = nn.ModuleList(self.means.values())  # registered, so that they move to the device

    def configure_model(self) -> None:
        """Compile each block, which keeps the parameter names in checkpoints."""
        if self.compile_network:
            compile_for_training(self, *self.network.blocks)
        if self.device_mesh is not None:
            shard(self.network, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Read the statistics of the latents and the encoder's fingerprint from the dataset; checkpoints store them."""
        self._described = described(self.trainer.datamodule)  # type: ignore[attr-defined]
        load_latent_stats(self.network, *self._described)

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Streams, Controls, Tensor | None]:
        """Return standardised latents, controls, and the documents of packed clips (int64[B, F], ``NEVER``: padding).

        Raises:
            OwlError: The batch lacks a modality that the network needs.
        """
        return clip_inputs(self.network, batch)

    def losses(
        self,
        latents: Streams,
        controls: Controls,
        document: Tensor | None,
        noise_level: Tensor,
        context_noise_level: Tensor,
        noise: Streams,
        context_noise: Streams,
        hidden: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of every frame of every stream.

        Args:
            latents: x0, standardised.
            controls: Controls of each frame. Their mask of known controls, with teacher forcing, is bool[B, 2 F]: the
                frames of the context, then the frames to predict.
            document: int64[B, F] or None.
            noise_level: float[B, F], of the frames to predict.
            context_noise_level: float[B, F], of the context; used only with teacher forcing.
            noise: eps of the frames to predict, shaped like ``latents``.
            context_noise: eps of the context; used only with teacher forcing.
            hidden: bool[B, F], by stream: the frames to predict in which its input is hidden.

        Returns:
            float[B, F] for each stream.
        """
        noisy = {name: add_noise(x, noise[name], noise_level) for name, x in latents.items()}
        for name, frames_without in (hidden or {}).items():
            noisy[name] = hide(noisy[name], frames_without)
        copies, clip = 2 if self.forcing == "teacher" else 1, noise_level.shape[1]
        frames = clip_frames(clip, copies, noise_level.device) if document is None else packed_frames(document, copies)
        if self.forcing == "teacher":
            context = {name: add_noise(x, context_noise[name], context_noise_level) for name, x in latents.items()}
            noisy = {name: torch.cat([context[name], x], 1) for name, x in noisy.items()}
            doubled = Controls.joined([replace(controls, known=None)] * 2)
            doubled.known = controls.known
            velocity = self.network(noisy, torch.cat([context_noise_level, noise_level], 1), doubled, frames)
            velocity = {name: v[:, noise_level.shape[1] :] for name, v in velocity.items()}
        else:
            velocity = self.network(noisy, noise_level, controls, frames, causal=self.forcing == "diffusion")
        return {name: velocity_loss(v, latents[name], noise[name]) for name, v in velocity.items()}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the weighted loss of a batch, and log that of each stream."""
        latents, controls, document = self.inputs(batch)
        frames = controls.buttons.shape[1]
        # noise depends on the window and the step: the distribution over processes does not change the training
        generators = [step_generator(self.global_step, window, self.device) for window in windows(batch)]
        noise_level = logit_normal(each(torch.randn, generators, frames), self.logit_mean, self.logit_std)
        if self.forcing == "full":
            noise_level = noise_level[:, :1].expand(noise_level.shape)
        context_noise_level = self.context_noise * each(torch.rand, generators, frames)
        copies = 2 if self.forcing == "teacher" else 1
        # also if none are dropped: DDP expects a gradient of the null control
        controls.known = each(torch.rand, generators, frames * copies) >= self.control_dropout
        noise = draw(generators, latents)
        context_noise = draw(generators, latents) if self.forcing == "teacher" else noise
        hidden = {
            name: each(torch.rand, generators, frames) < stream.dropout
            for name, stream in self.network.generated.items()
            if stream.dropout > 0
        }
        losses = self.losses(
            latents, controls, document, noise_level, context_noise_level, noise, context_noise, hidden
        )
        means = {name: masked_mean(loss, document) for name, loss in losses.items()}
        total = weighted_sum(means, self.weights)
        log_losses(self, total, means)
        return total

    def measure(self, batch: dict[str, Tensor]) -> None:
        """Measure the loss of every stream at each of `NOISE_LEVELS`, with the same noise at every validation."""
        latents, controls, document = self.inputs(batch)
        # depends only on the window: neither the batch size nor the number of processes changes the result
        generators = [torch.Generator(self.device).manual_seed(window) for window in windows(batch)]
        noise = draw(generators, latents)
        context_noise = draw(generators, latents) if self.forcing == "teacher" else noise
        context_noise_level = torch.full(controls.buttons.shape[:2], self.context_noise / 2, device=self.device)
        real = torch.ones_like(context_noise_level) if document is None else (document != NEVER).to(context_noise_level)
        for t in NOISE_LEVELS:
            noise_level = torch.full_like(context_noise_level, t)
            losses = self.losses(latents, controls, document, noise_level, context_noise_level, noise, context_noise)
            for name, loss in losses.items():
                self.means[name, t].update(loss, real)

    def log_measured(self, split: str) -> None:
        """Log the mean loss of every stream and noise level and the weighted sum; reset the means."""
        values = {key: metric.compute() for key, metric in self.means.items()}
        for metric in self.means.values():
            metric.reset()
        logged = {f"{split}/{name}_t_{t:.1f}": value for (name, t), value in values.items()}
        for name in self.network.generated:
            logged[f"{split}/{name}"] = torch.stack([values[name, t] for t in NOISE_LEVELS]).mean()
        means = {name: logged[f"{split}/{name}"] for name in self.network.generated}
        logged[f"{split}/loss"] = weighted_sum(means, self.weights)
        self.log_dict(logged, sync_dist=True)  # already equal in all processes; avoids Lightning's warning

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with warm-up and a cosine schedule over the trainer's steps."""
        optimizer = self.optimizer(parameter_groups(self.network))
        return with_schedule(self, optimizer, self.warmup_steps, self.final_lr)


def packed_frames(document: Tensor, copies: int) -> Frames:
    """Return the frames of packed clips, int64[B, F], repeated for each copy."""
    time = document_time(document).repeat(1, copies)
    copy = torch.arange(copies, device=document.device).repeat_interleave(document.shape[1])
    return Frames(time, copy, document.repeat(1, copies))


def document_time(document: Tensor) -> Tensor:
    """Compute the index of each frame within its document: int64[B, F] -> int64[B, F], ``NEVER`` for padding."""
    position = torch.arange(document.shape[1], device=document.device)
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    first = torch.where(begins, position, 0).cummax(1).values
    return torch.where(document == NEVER, NEVER, position - first)


def masked_mean(loss: Tensor, document: Tensor | None) -> Tensor:
    """Compute the mean over all frames except padding.

    All frames have equal weight over all processes: a process with more frames than average returns more than its mean.
    """
    if document is None:
        return loss.mean()
    real = (document != NEVER).to(loss)
    return (loss * real).sum() / mean_over_processes(real.sum()).clamp(min=1)
