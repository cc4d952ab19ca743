"""Measure short rollouts while a world model trains."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from owl.callbacks.media import write_picture
from owl.data.windows import WindowDataset
from owl.distributed.agreement import from_first, host_group
from owl.distributed.sharding import gathered
from owl.errors import OwlError, at_least
from owl.losses.lpips import LPIPS
from owl.models.world_model import WorldTransformer
from owl.rollout.checks import check_decoder
from owl.rollout.engine import Engine
from owl.rollout.episodes import Batch, Episodes, load_decoder
from owl.rollout.evaluation import (
    DriftMeter,
    action_following,
    horizon_curves,
    long_rollout,
    roll_out,
)
from owl.rollout.generate import Schedule
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from owl.rollout.report import at_horizons
from owl.viz.rollouts import strip

HORIZONS = (1, 4, 8, 16)


class Rollouts(Callback):
    """Generate the continuation of validation windows from their controls, with the validated weights (with EMA the
    average).

    Logs ``val/rollout_psnr_<h>`` and ``val/rollout_lpips_<h>`` for frame h = 1, 4, 8, 16 after the context, with
    ``val/rollout_repeat_psnr_<h>`` and ``val/rollout_repeat_lpips_<h>`` of a baseline that repeats the context's last
    frame. With ``inverse_dynamics``, logs ``val/rollout_action_accuracy`` and the other values of
    `owl.rollout.evaluation.action_following`; with ``frames``, ``val/rollout_drift`` and the distances of
    `owl.rollout.evaluation.Drift`. A picture of true above generated frames goes to TensorBoard and to
    ``<run folder>/media/step-<step>/rollout.png``. Windows and noise are the same at every validation. Rank 0 generates
    the rollouts; the other ranks wait for its metrics without a timeout.

    Args:
        decoder: Checkpoint or export of the autoencoder that the dataset was encoded with.
        every_n_validations: Roll out after every n-th validation.
        clips: Number of rollouts.
        horizon: Generated frames per rollout.
        context: Context frames per rollout.
        inverse_dynamics: Checkpoint of the recipe owl.recipes.inverse_dynamics.InverseDynamics, trained with the same
            stride, which reads the controls back from generated frames. None: not measured.
        frames: Length of long rollouts, whose drift is measured; 0: none.
        side_by_side: Number of long rollouts.

    Raises:
        OwlError: A number is below its minimum.
    """

    def __init__(
        self,
        decoder: str,
        every_n_validations: int = 1,
        clips: int = 8,
        horizon: int = 16,
        context: int = 8,
        inverse_dynamics: str | None = None,
        frames: int = 0,
        side_by_side: int = 4,
    ) -> None:
        at_least(1, every_n_validations=every_n_validations, clips=clips, horizon=horizon)
        at_least(1, context=context, side_by_side=side_by_side)
        at_least(0, frames=frames)
        self.decoder = decoder
        self.every_n_validations = every_n_validations
        self.clips, self.horizon, self.context, self.inverse_dynamics = clips, horizon, context, inverse_dynamics
        self.frames, self.side_by_side = frames, side_by_side
        self._validations = 0
        self._prepared = False
        self._episodes: Episodes | None = None
        self._windows: Batch = {}
        self._lpips: LPIPS | None = None
        self._reader: InverseDynamicsReader | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the decoder and the clips, so that mismatches are reported before training."""
        self._prepare(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the decoder and the clips for ``validate``."""
        self._prepare(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate rollouts, log their metrics and draw them."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations:
            return
        network = gathered(pl_module.network)  # type: ignore[arg-type]
        metrics: dict[str, float] = self._measure(trainer, pl_module, network) if trainer.is_global_zero else {}
        metrics = from_first(metrics, self._group)
        # already the same on every rank, which Lightning cannot know
        pl_module.log_dict({f"val/rollout_{name}": value for name, value in metrics.items()}, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """Store the count of validations."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._validations = state_dict["validations"]

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._prepared:
            return
        self._prepared, self._group = True, host_group()
        if not trainer.is_global_zero:
            return
        dataset = getattr(trainer.datamodule, "validation_dataset", None)
        network = getattr(pl_module, "network", None)
        if not (isinstance(dataset, WindowDataset) and isinstance(network, WorldTransformer)):
            raise OwlError(
                "rollouts.recipe",
                f"Rollouts got the recipe {type(pl_module).__qualname__}, expected one with a world model and a "
                "dataset of latents; remove the callback",
            )
        decoder = load_decoder(self.decoder).to(pl_module.device).requires_grad_(False)
        check_decoder(network, "video", decoder)
        length = self.context + self.horizon
        self._episodes = Episodes(
            dataset.path, dataset.info, "validation", network, decoder, dataset.stride, length, pl_module.device
        )
        self._windows = self._episodes.windows(self.clips)
        if self.inverse_dynamics is not None:
            self._reader = InverseDynamicsReader.load(self.inverse_dynamics, network, dataset.stride)
            self._reader.network.to(pl_module.device)
        self._lpips = LPIPS().to(pl_module.device)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, network: nn.Module) -> dict[str, float]:
        """Generate rollouts, draw them, and return the metrics."""
        episodes, lpips = self._episodes, self._lpips
        assert episodes is not None
        assert lpips is not None
        with torch.no_grad(), torch.autocast(pl_module.device.type, enabled=False):
            engine = Engine(
                network,  # type: ignore[arg-type]
                {"video": episodes.decoder},
                **vars(Schedule.of(network.sampling)),  # type: ignore[arg-type]
                device=pl_module.device,
            )
            clips = roll_out(engine, episodes, self._windows, self.context)
            curves = horizon_curves(clips, lpips)
            others = action_following(clips, self._reader) if self._reader is not None else {}
            others |= self._drift(engine, episodes) if self.frames else {}
        folder = Path(trainer.default_root_dir) / "media" / f"step-{trainer.global_step:07d}"
        write_picture(trainer, folder, "rollout", strip(clips))
        names = ("psnr", "lpips", "repeat_psnr", "repeat_lpips")
        return at_horizons({name: curves[name] for name in names}, HORIZONS) | others

    def _drift(self, engine: Engine, episodes: Episodes) -> dict[str, float]:
        """Generate long rollouts and return their drift."""
        meter = DriftMeter(episodes, self.frames, engine.device)
        for generated, given in long_rollout(engine, episodes, self.frames, self.side_by_side, self.context):
            meter.update(generated, given)
        drift = meter.compute()
        return drift.metrics() if drift is not None else {}
