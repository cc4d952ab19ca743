"""A run whose target is the latent of a proxy: interrupted, exported, and read without the proxy's folder."""

import shutil
from pathlib import Path
from typing import Any

import torch

from owl import models
from tests.helpers.autoencoders import save_autoencoder, tiny_decoder
from tests.helpers.errors import refused
from tests.helpers.proxies import save_proxy
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, write_config

RECIPE, NETWORK = "owl.recipes.diffusion_decoder.DiffusionDecoder", "owl.models.diffusion_decoder.DiTDecoder"
TINY = {"patch": [4, 4], "width": 32, "depth": 1, "heads": 2, "mlp_ratio": 2.0, "proxy": "proxy"}


def fit(folder: Path, name: str, steps: int, *options: str) -> tuple[str, dict[str, Any]]:
    """Train; the path of the checkpoint and its weights."""
    limits = ("--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0")
    assert owl_here("fit", "--config", "tiny.yaml", "--name", name, *limits, *options, cwd=folder) == 0
    path = folder / "runs" / name / "checkpoints" / "last.ckpt"
    weights: dict[str, Any] = torch.load(path, weights_only=True)["state_dict"]
    return str(path), weights


def test_a_run_towards_a_proxys_latent(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)  # the proxy's path is relative
    make_dataset(tmp_path / "footage", episodes=4, frames=6, size=(32, 48))
    save_autoencoder(tmp_path / "autoencoder")
    save_proxy(tmp_path / "proxy", "AutoencoderKL")
    options: dict[str, Any] = {"network": {"class_path": NETWORK, "init_args": TINY}, "residual": True}
    weights = {"flow": 1.0, "l1": 0.5, "lpips": 0.0}
    write_config(
        tmp_path / "tiny.yaml",
        tiny_decoder("footage", "autoencoder", RECIPE, **options, weights=weights, final_lr=1.0, warmup_steps=0),
    )
    path, whole = fit(tmp_path, "whole", 2)
    fit(tmp_path, "parts", 1)
    _, parts = fit(tmp_path, "parts", 2, "--ckpt_path", "last")
    assert whole.keys() == parts.keys()
    assert not any("proxy" in name for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name
    assert whole["network.target_std"].shape == (4,)

    assert owl_here("export", path, "export", cwd=tmp_path) == 0
    latent = torch.randn(1, 4, 4, 6)
    decoded = models.load(path).decode(latent)  # type: ignore[operator]
    assert decoded.shape == (1, 3, 32, 48)
    shutil.rmtree(tmp_path / "proxy")
    assert torch.equal(models.load(tmp_path / "export").decode(latent), decoded)  # type: ignore[operator]
    with refused("proxy.missing", "proxy/config.json"):
        models.load(path)
