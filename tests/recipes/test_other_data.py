"""Every recipe trains on batches of a data module that is not ours, or says in one sentence what it misses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.errors import refused
from tests.helpers.latents import FINGERPRINT, LATENT, dot_experiment
from tests.helpers.shards import AXES, BUTTONS
from tests.helpers.tiny import owl_here, tiny_experiment, tiny_inverse_dynamics, write_config

STATISTICS = {"mean": [0.5, -0.5], "std": [2.0, 4.0]}
CONTROLS = {"buttons": BUTTONS, "axes": AXES, "shape": [len(BUTTONS) + len(AXES)]}


class Clips(LightningDataModule):
    """Clips from memory.

    Args:
        recipe: For which.
        missing: What is left out of the batches.
        described: Whether the dataset says what its latents are.
    """

    def __init__(self, recipe: str, missing: str = "", described: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        clips: dict[str, Tensor] = {
            "buttons": torch.randint(0, 2, (8, 4, len(BUTTONS)), generator=generator).float(),
            "axes": torch.randn(8, 4, len(AXES), generator=generator),
        }
        if recipe == "world_model":
            clips |= {"latent": torch.randn(8, 4, *LATENT, generator=generator), "window": torch.arange(8)}
        else:
            size = (32, 48) if recipe == "image_vae" else (16, 24)
            clips["rgb"] = torch.randint(0, 256, (8, 4, 3, *size), dtype=torch.uint8, generator=generator)
        clips.pop(missing, None)
        self.clips = [{name: values[number] for name, values in clips.items()} for number in range(8)]
        if described:
            latent = STATISTICS | {"shape": list(LATENT), "encoder": {"fingerprint": FINGERPRINT}}
            modalities = {"latent": latent, "controls": CONTROLS}
            self.train_dataset = SimpleNamespace(info=SimpleNamespace(modalities=modalities), path="memory")

    def train_dataloader(self) -> DataLoader:
        """Two clips at a time."""
        return DataLoader(self.clips, batch_size=2)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


EXPERIMENTS = {"world_model": dot_experiment, "image_vae": tiny_experiment, "inverse_dynamics": tiny_inverse_dynamics}


def fit(folder: Path, recipe: str, **clips: Any) -> dict[str, Any]:
    experiment = EXPERIMENTS[recipe](Path("unused"), max_steps=2)
    experiment["data"] = {"class_path": "tests.recipes.test_other_data.Clips", "init_args": {"recipe": recipe} | clips}
    write_config(folder / "other.yaml", experiment)
    assert owl_here("fit", "--config", "other.yaml", cwd=folder) == 0
    return torch.load(folder / "runs" / "other" / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("recipe", EXPERIMENTS)
def test_a_data_module_of_your_own_is_trained_on(tmp_path: Path, recipe: str) -> None:
    stored = fit(tmp_path, recipe)
    assert stored["global_step"] == 2
    if recipe == "world_model":
        assert stored["state_dict"]["network.video_mean"].tolist() == STATISTICS["mean"]
        assert stored["state_dict"]["network.video_std"].tolist() == STATISTICS["std"]


@pytest.mark.parametrize(
    ("recipe", "clips", "code"),
    [
        ("world_model", {"described": False}, "recipe.data-module"),
        ("world_model", {"missing": "latent"}, "recipe.dataset"),
        ("world_model", {"missing": "window"}, "recipe.dataset"),
        ("image_vae", {"missing": "rgb"}, "recipe.dataset"),
        ("inverse_dynamics", {"missing": "rgb"}, "recipe.dataset"),
        ("inverse_dynamics", {"missing": "axes"}, "recipe.dataset"),
    ],
)
def test_what_a_data_module_misses_is_reported(tmp_path: Path, recipe: str, clips: dict[str, Any], code: str) -> None:
    with refused(code, clips.get("missing", "Clips")):
        fit(tmp_path, recipe, **clips)
