"""Files from strangers name classes; none of their code is imported or called unless the user trusts it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from owl import models
from owl.__main__ import take_trust
from owl.models.image_autoencoder import ImageAutoencoder
from owl.trust import VARIABLE
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, tiny_experiment, write_config

TINY: dict[str, Any] = {"size": (16, 24), "latent_size": (4, 6), "widths": [8, 16], "blocks": [1, 1]}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stranger.py, which leaves a file when it is imported."""
    (tmp_path / "stranger.py").write_text("open('imported', 'w')\nclass Network:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path


def refuse(path: Path, code: str, *tokens: str) -> None:
    with refused(code, str(path), *tokens):
        models.load(path)
    assert not Path("imported").exists()


def checkpoint(path: Path, class_path: str, **init_args: Any) -> Path:
    description = {"class_path": class_path, "init_args": init_args}
    torch.save({"owl": {"networks": {"network": description}}, "state_dict": {}}, path)
    return path


def test_a_checkpoint_runs_no_untrusted_code(lab: Path) -> None:
    ours = "owl.models.image_autoencoder.ImageAutoencoder"
    refuse(checkpoint(lab / "a.ckpt", "stranger.Network"), "network.untrusted", "--trust stranger")
    for hidden in ("stranger.Network", {"class_path": "stranger.Network"}, [{"widths": ["stranger.Network"]}]):
        refuse(checkpoint(lab / "a.ckpt", ours, widths=hidden), "network.untrusted", "--trust stranger")


def test_what_is_imported_but_no_network_is_not_called(lab: Path) -> None:
    for class_path in ("os.mkdir", "pathlib.Path", ""):
        refuse(checkpoint(lab / "a.ckpt", class_path), "network.rebuild")


def test_a_checkpoint_that_describes_no_network_is_refused(lab: Path) -> None:
    torch.save({"owl": {"networks": {}}, "state_dict": {}}, lab / "a.ckpt")
    refuse(lab / "a.ckpt", "network.rebuild", "config")


def test_an_export_runs_no_untrusted_code(lab: Path) -> None:
    models.save(ImageAutoencoder(**TINY), lab / "export")
    (lab / "export" / "config.yaml").write_text(yaml.safe_dump({"class_path": "stranger.Network", "init_args": {}}))
    refuse(lab / "export", "network.untrusted", "--trust stranger")


def test_your_own_network_is_exported_once_you_trust_it(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imports = "from owl.models.image_autoencoder import ImageAutoencoder\n"
    (lab / "mine.py").write_text(f"{imports}\n\nclass Mine(ImageAutoencoder):\n    pass\n")
    make_dataset(lab / "data", episodes=3, frames=6, size=(32, 48), modalities=("rgb",))
    experiment = tiny_experiment(lab / "data", max_steps=1)
    experiment["model"]["init_args"]["network"]["class_path"] = "mine.Mine"
    write_config(lab / "mine.yaml", experiment)
    assert owl_here("fit", "--config", "mine.yaml", cwd=lab) == 0
    export = ("export", "runs/mine/checkpoints/last.ckpt", "exported")
    assert owl_here(*export, cwd=lab) == 0  # of a module that is imported already
    monkeypatch.delitem(sys.modules, "mine")
    with refused("network.untrusted", "mine.Mine", "--trust mine"):
        owl_here(*export, cwd=lab)
    arguments = ["owl", "--trust", "other.package", *export, "--trust=mine"]
    monkeypatch.setenv(VARIABLE, "another")
    take_trust(arguments)
    assert arguments == ["owl", *export]
    assert owl_here(*export, cwd=lab) == 0
    monkeypatch.delitem(sys.modules, "mine")


@pytest.mark.parametrize(
    "arguments", [["owl", "fit", "--trust"], ["owl", "--trust=", "fit"], ["owl", "--trust", "--x"]]
)
def test_trust_must_name_a_package(arguments: list[str]) -> None:
    with refused("arguments.missing-value", "--trust"):
        take_trust(arguments)
