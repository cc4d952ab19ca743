"""``data encode`` as it is typed: from a checkpoint or an export, twice, refused, and the how-to page."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from owl import models
from owl.commands.data_inspect import main as inspect
from owl.commands.data_verify import main as verify
from owl.data.shards import DatasetInfo
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import REPOSITORY, owl_here, tiny_experiment, write_config
from tests.test_docs import blocks, lines


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with footage and the run of an autoencoder, named as in the how-to page."""
    folder = tmp_path_factory.mktemp("encode")
    make_dataset(folder / "data/doom-mix-96x160", episodes=4, frames=9, size=(32, 48), modalities=("rgb", "controls"))
    experiment = tiny_experiment(Path("data/doom-mix-96x160"), max_steps=2)
    write_config(folder / "quickstart.yaml", experiment)
    assert owl_here("fit", "--config", "quickstart.yaml", "--name", "quickstart", cwd=folder) == 0
    return folder


CHECKPOINT, SOURCE = "runs/quickstart/checkpoints/last.ckpt", "data/doom-mix-96x160"


def test_the_how_to_page_from_top_to_bottom(
    lab: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab)
    names: dict = {}
    for block in blocks(REPOSITORY / "docs" / "how-to" / "encode.md"):
        if block.language == "bash":
            for command in lines(block.content):
                assert owl_here(*command.split()[3:], cwd=lab) == 0, command
        elif block.language == "python":  # the YAML is run by tests/callbacks/test_frozen_encoder.py
            exec(block.content, names)
    assert names["sample"]["latent"].shape == (8, 4, 4, 6)
    latent = names["latent"]
    assert latent["encoder"]["class_path"] == "owl.models.image_autoencoder.ImageAutoencoder"
    assert latent["encoder"]["checkpoint"] == CHECKPOINT
    assert latent["encoder"]["fingerprint"] == models.fingerprint(models.load(CHECKPOINT).encoder)  # type: ignore[arg-type]
    with torch.inference_mode():
        network = models.load(CHECKPOINT)
        pictures = names["WindowDataset"](SOURCE, "train", length=8)[0]["rgb"]
        expected = network.encode(pictures.float() / 127.5 - 1).mean  # type: ignore[operator]
    torch.testing.assert_close(names["sample"]["latent"], expected, atol=1e-5, rtol=2**-10)
    printed, warned = capsys.readouterr()
    assert "data/doom-latents holds 36 frames, latent, controls, latents of 4x4x6" in printed
    assert "data/doom-both holds 36 frames, latent, rgb, controls" in printed
    assert "72 members: all valid" in printed
    assert "warning" not in warned
    assert owl_here("data", "encode", CHECKPOINT, SOURCE, "data/doom-latents", cwd=lab) == 0
    assert "data/doom-latents is complete already and was left as it is: it holds 36" in capsys.readouterr().out


def test_an_export_folded_or_not_is_the_same_encoder_as_its_checkpoint(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert owl_here("data", "encode", CHECKPOINT, SOURCE, "twice", cwd=lab) == 0
    for option in ((), ("--fold",)):
        assert owl_here("export", CHECKPOINT, "exported", *option, cwd=lab) == 0
        assert owl_here("data", "encode", "exported", SOURCE, "twice", cwd=lab) == 0
        assert "twice is complete already" in capsys.readouterr().out


def test_a_network_that_encodes_nothing_is_refused(lab: Path) -> None:
    (lab / "linear").mkdir()
    config = "class_path: torch.nn.Linear\ninit_args: {in_features: 1, out_features: 1}"
    (lab / "linear" / "config.yaml").write_text(config)
    save_file({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}, lab / "linear" / "model.safetensors")
    with refused("network.kind", "network of linear is Linear", "encode"):
        owl_here("data", "encode", "linear", SOURCE, "nothing", cwd=lab)
    assert not (lab / "nothing").exists()


def test_latents_are_shown_and_damage_is_found(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = lab / "shown"
    assert owl_here("data", "encode", CHECKPOINT, SOURCE, folder, cwd=lab) == 0
    inspect(str(folder), out=str(tmp_path / "sheet.png"))
    printed = capsys.readouterr().out
    fingerprint = DatasetInfo.load(folder).modalities["latent"]["encoder"]["fingerprint"]
    for part in (f"{CHECKPOINT} ({fingerprint}) of latent", "posterior mean, shape 4x4x6", "kind encoded"):
        assert part in printed
    with Image.open(tmp_path / "sheet.png") as sheet:
        cell = np.asarray(sheet)[92 : 92 + 144, 24 + 184 : 24 + 184 + 216]
    columns = cell[30, 4::36].astype(int)
    assert (cell[30, 31::36] == columns).all()  # six positions across, each of one colour
    assert len({tuple(colour) for colour in columns}) > 3
    shard = folder / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 255
    shard.write_bytes(data)
    assert verify(str(folder)) == 1
    assert "episode-001/000000.latent.npy: its checksum is wrong" in capsys.readouterr().out
    shutil.rmtree(folder)
