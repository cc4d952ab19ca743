"""Train an inverse dynamics model, which predicts controls from frames."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer

from owl.data.controls import check_controls
from owl.data.windows import WindowDataset
from owl.distributed.reduction import mean_over_processes
from owl.distributed.sharding import shard
from owl.errors import OwlError
from owl.latents import datasets
from owl.metrics.controls import AxisAccuracy, ButtonAccuracy
from owl.models.inverse_dynamics import InverseDynamicsModel
from owl.nn.frozen import trained
from owl.nn.symlog import symlog
from owl.optim.configuration import with_schedule
from owl.pixels import to_float
from owl.recipes.arguments import store_arguments
from owl.recipes.compilation import compile_for_training
from owl.recipes.hooks import MeasuresEpochs
from owl.recipes.logging import log_losses
from owl.viz.pictures import controls_strip

SOFTENING = 0.05  # share of the frames of a batch: bounds the weight of a button that is down in at most one of them


@dataclass
class Augmentation:
    """Random augmentation of each training clip, so that the model does not depend on texture that a decoder loses.

    Args:
        blur: Maximum standard deviation of a Gaussian blur, in pixels of the frames in a batch.
        noise: Maximum standard deviation of white noise, for frames in [-1, 1].
        brightness: Maximum change of brightness and, as a fraction, of contrast.
    """

    blur: float = 1.5
    noise: float = 0.1
    brightness: float = 0.2


class InverseDynamics(MeasuresEpochs):
    """Train `InverseDynamicsModel` on batches of rgb and controls.

    loss = balanced binary cross-entropy of the buttons + smooth L1 of symlog(axes).
    The first frame of a window is excluded from loss and metrics, since its controls cannot be inferred.

    Args:
        network: Inverse dynamics model with the buttons and axes of the dataset, in the same order.
        augmentation: Augmentation of training clips.
        dead_zone: Axes closer to 0 than this, in their unit and summed over the stride, count as none.
        optimizer: Called with the parameters; e.g. ``owl.optim.MuonAdamW``.
        warmup_steps: Steps of linear warm-up; a cosine follows until training ends.
        final_lr: Learning rate at the end, as a fraction of its peak.
        compile: Whether the network runs through ``torch.compile``.
    """

    def __init__(
        self,
        network: InverseDynamicsModel,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (a dataclass of floats, never changed)
        dead_zone: float = 1.0,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=1e-3, weight_decay=1e-4),
        warmup_steps: int = 50,
        final_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        store_arguments(self)
        self.network = network
        self.augmentation = augmentation
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.final_lr = final_lr
        self.compile_network = compile
        self.axis_accuracy = AxisAccuracy(network.axes, dead_zone)
        self.button_accuracy = ButtonAccuracy(network.buttons)

    def setup(self, stage: str) -> None:
        """Check that the dataset has the network's controls; datasets of other data modules are not checked."""
        for dataset in datasets(self.trainer.datamodule):  # type: ignore[attr-defined]
            if isinstance(dataset, WindowDataset):
                check_dataset(self.network, dataset)

    def configure_model(self) -> None:
        """Set the memory format of convolutions; compile in place, which keeps the names in checkpoints."""
        self.network.to(memory_format=torch.channels_last)
        if self.compile_network:
            compile_for_training(self, self.network)
        if self.device_mesh is not None:
            shard(self.network, self.device_mesh["data_parallel"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss on augmented clips."""
        check_batch(self.network, batch)
        logits, axes = self.network(augment(video(batch), self.augmentation))
        terms = {}
        if self.network.buttons:
            buttons = batch["buttons"][:, 1:]
            pressed = mean_over_processes(buttons.mean((0, 1)))
            terms["buttons"] = balanced_cross_entropy(logits[:, 1:], buttons, pressed)
        if self.network.axes:
            terms["axes"] = F.smooth_l1_loss(axes[:, 1:], symlog(batch["axes"][:, 1:]))
        loss = torch.stack(list(terms.values())).sum()
        log_losses(self, loss, terms)
        return loss

    def measure(self, batch: dict[str, Tensor]) -> None:
        """Update the metrics."""
        check_batch(self.network, batch)
        buttons, axes = self.network.label(video(batch))
        self.button_accuracy.update(buttons[:, 1:].flatten(0, 1), batch["buttons"][:, 1:].flatten(0, 1))
        self.axis_accuracy.update(axes[:, 1:].flatten(0, 1), batch["axes"][:, 1:].flatten(0, 1))

    def log_measured(self, split: str) -> None:
        """Log and reset every metric."""
        for metric in (self.axis_accuracy, self.button_accuracy):
            values = metric.compute()
            metric.reset()
            # already the same on every rank, which Lightning cannot know
            self.log_dict({f"{split}/{name}": value for name, value in values.items()}, sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the controls predicted by `InverseDynamicsModel.label`."""
        buttons, axes = self.network.label(video(batch))
        return {"buttons": buttons, "axes": axes}

    @torch.no_grad()
    def media(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Draw up to 4 clips with true and predicted controls below each frame, uint8[H, W, 3]."""
        chosen = slice(0, None, -(-len(batch["rgb"]) // 4))
        clips = video(batch)[chosen]
        read = self.network.label(clips)
        played = batch["buttons"][chosen], batch["axes"][chosen]
        return {"controls": controls_strip(clips, played, read, self.network.buttons, self.network.axes)}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser with warm-up and cosine over the trainer's steps."""
        optimizer = self.optimizer(trained(self.network).values())
        return with_schedule(self, optimizer, self.warmup_steps, self.final_lr)


def check_dataset(network: InverseDynamicsModel, dataset: WindowDataset) -> None:
    """Check that a dataset matches a network.

    Raises:
        OwlError: The dataset lacks pictures or controls, has other controls than the network, or windows of one frame.
    """
    if not {"rgb", "controls"} <= set(dataset.modalities) or dataset.length < 2:
        raise OwlError(
            "recipe.dataset",
            f"windows of {dataset.path} hold {dataset.length} frames of {', '.join(dataset.modalities)}, expected at "
            "least 2 of rgb and controls; set data.init_args.modalities to [rgb, controls] and length to 8",
        )
    check_controls(
        dataset.info.modalities,
        dataset.path,
        network.buttons,
        network.axes,
        "set model.init_args.network.init_args.{kind} to those of the dataset",
    )


def check_batch(network: InverseDynamicsModel, batch: dict[str, Tensor]) -> None:
    """Check that a batch of any data module matches a network.

    Raises:
        OwlError: A tensor is missing, or has another number of buttons or axes.
    """
    rgb = tuple(batch["rgb"].shape) if "rgb" in batch else ()
    shown = rgb[:2] or ("B", "T")
    expected = {
        "rgb": (*shown, 3, *(rgb[3:5] or ("H", "W"))),
        "buttons": (*shown, len(network.buttons)),
        "axes": (*shown, len(network.axes)),
    }
    for name, shape in expected.items():
        found = tuple(batch[name].shape) if name in batch else "missing"
        if found != shape:
            raise OwlError(
                "recipe.dataset",
                f"{name} of a batch is {found}, expected {shape}; change the data module, or the network's buttons "
                "and axes",
            )


def video(batch: dict[str, Tensor]) -> Tensor:
    """Convert ``rgb`` of a batch, uint8[B, T, 3, H, W], to float[B, T, 3, H, W] in [-1, 1]."""
    return to_float(batch["rgb"])


def balanced_cross_entropy(logits: Tensor, buttons: Tensor, pressed: Tensor) -> Tensor:
    """Compute binary cross-entropy in which pressed and released frames of a button have about the same total weight.

    Args:
        logits: float[B, T, buttons].
        buttons: The same shape, 0 or 1.
        pressed: float[buttons], share of the frames in which each is 1.

    Returns:
        A scalar: mean over frames and buttons.
    """
    pressed = (pressed + SOFTENING) / (1 + 2 * SOFTENING)
    weight = torch.where(buttons > 0, 0.5 / pressed, 0.5 / (1 - pressed))
    return F.binary_cross_entropy_with_logits(logits, buttons, weight)


def augment(clips: Tensor, augmentation: Augmentation) -> Tensor:
    """Blur each clip, change its brightness and contrast, and add noise, with uniformly distributed magnitudes.

    Args:
        clips: float[B, T, 3, H, W] in [-1, 1].
        augmentation: Maximum magnitudes.

    Returns:
        The same shape, in [-1, 1].
    """

    def draw(largest: float, lowest: float = 0.0) -> Tensor:
        return torch.empty(len(clips), 1, 1, 1, 1, device=clips.device).uniform_(lowest, largest)

    if augmentation.blur:
        clips = blur(clips, draw(augmentation.blur).flatten(), augmentation.blur)
    strength = augmentation.brightness
    clips = clips * (1 + draw(strength, -strength)) + draw(strength, -strength)
    return (clips + draw(augmentation.noise) * torch.randn_like(clips)).clamp(-1, 1)


def blur(clips: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Blur each clip with a separate Gaussian.

    Args:
        clips: float[B, T, 3, H, W].
        sigma: float[B], standard deviations in pixels.
        largest: Maximum of ``sigma``, which determines the kernel size without synchronising the GPU.

    Returns:
        The same shape.
    """
    radius = max(1, int(2 * largest + 0.5))
    offset = torch.arange(-radius, radius + 1, device=clips.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]).square())
    kernel = kernel / kernel.sum(1, keepdim=True)  # [B, taps]
    rows = clips.flatten(1, 2).transpose(0, 1)  # [T * 3, B, H, W]: one group of the convolution per clip
    across, down = kernel[:, None, None, :], kernel[:, None, :, None]
    rows = F.conv2d(F.pad(rows, (radius, radius, 0, 0), mode="replicate"), across, groups=len(clips))
    rows = F.conv2d(F.pad(rows, (0, 0, radius, radius), mode="replicate"), down, groups=len(clips))
    return rows.transpose(0, 1).unflatten(1, clips.shape[1:3])
