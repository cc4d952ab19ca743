"""What the written rules of docs/architecture.md say about imports holds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from importlinter.cli import lint_imports

from owl import models
from owl.models.image_autoencoder import ImageAutoencoder
from tests.helpers.tiny import REPOSITORY


def test_packages_import_what_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order and the forbidden imports stand in pyproject.toml under ``tool.importlinter``."""
    monkeypatch.chdir(REPOSITORY)
    assert lint_imports(cache_dir=None) == 0


def test_networks_are_loaded_from_a_checkpoint_without_lightning(tmp_path: Path) -> None:
    """Neither do the libraries that networks need import it."""
    network = ImageAutoencoder(3, (16, 16), (4, 4), 2, [4, 4], [1, 1])
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    described = {"networks": {"network": models.describe(network)}}
    torch.save({"owl": described, "state_dict": state}, tmp_path / "network.ckpt")
    program = f"""
import importlib, pkgutil, sys
from owl import models, nn
for package in (models, nn):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(type(models.load({str(tmp_path / "network.ckpt")!r})).__name__, "lightning" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout == "ImageAutoencoder False\n"
