"""The shipped networks, described on the meta device: no memory, no time."""

from pathlib import Path

import pytest
import torch
import yaml

from owl.models.audio_autoencoder import AudioAutoencoder
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.world_model import WorldTransformer

CONFIGS = Path(__file__).parents[2] / "configs" / "models"


@pytest.mark.parametrize(
    ("name", "shape", "million_parameters"),
    [
        ("image_autoencoder_96x160", (8, 12, 20), 1.5),
        ("image_autoencoder_360p", (128, 8, 8), 53.6),
        ("image_autoencoder_720p", (128, 8, 8), 53.6),
        ("image_autoencoder_360p_4x4", (256, 4, 4), 114.0),
        ("image_autoencoder_dcae", (128, 6, 10), 197.9),
    ],
)
def test_shipped_networks_have_the_size_their_comments_state(
    name: str, shape: tuple[int, int, int], million_parameters: float
) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    init_args = yaml.safe_load(text)["init_args"]
    assert "group_size" in init_args  # an experiment to whose command line the file is given would keep its own value
    with torch.device("meta"):
        network = ImageAutoencoder(**init_args)
        mean, logvar = network.encoder(torch.empty(1, 3, *network.size))
        image = network.decoder(mean)
    assert mean.shape[1:] == shape
    assert logvar.shape[1:] == (1, *shape[1:])
    assert image.shape[1:] == (3, *network.size)
    measured = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert measured == pytest.approx(million_parameters, abs=0.06)
    assert f"{million_parameters} million parameters" in text
    assert f"tensor-size reduction {network.tsr:.0f}" in text


@pytest.mark.parametrize(
    ("name", "per_second", "million_parameters"),
    [
        ("audio_autoencoder_735x", 60, 144.9),
        ("audio_autoencoder_105x", 420, 35.0),
        ("audio_autoencoder_game", 70, 142.8),
    ],
)
def test_shipped_audio_networks_have_the_size_their_comments_state(
    name: str, per_second: int, million_parameters: float
) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    init_args = yaml.safe_load(text)["init_args"]
    assert "causal" in init_args  # an experiment to whose command line the file is given would keep its own value
    with torch.device("meta"):
        network = AudioAutoencoder(**init_args)
    measured = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert measured == pytest.approx(million_parameters, abs=0.06)
    assert f"{million_parameters} million parameters" in text
    assert f"tensor-size reduction {network.tsr:.2g}" in text
    assert network.sample_rate / network.hop == per_second
    assert network.sample_rate // 35 % network.hop == 0 or name == "audio_autoencoder_735x"


@pytest.mark.parametrize(
    ("name", "tokens", "million_parameters"),
    [
        ("world_model_2m", 60, 1.9),
        ("world_model_44m", 64, 43.8),
        ("world_model_1b", 64, 1029.7),
        ("world_model_5b", 64, 5060.5),
    ],
)
def test_shipped_world_models_have_the_size_their_comments_state(
    name: str, tokens: int, million_parameters: float
) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    with torch.device("meta"):
        network = WorldTransformer(**yaml.safe_load(text)["init_args"])
    measured = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert measured == pytest.approx(million_parameters, abs=0.06)
    assert f"{million_parameters} million parameters" in text
    assert network.tokens == tokens
    assert f"{tokens} tokens a frame" in text
    assert network.windows[-1] == max(network.windows) > network.windows[0]  # the last layer is a global one
    millions = float(name.split("_")[-1][:-1]) * (1000 if name.endswith("b") else 1)
    assert measured == pytest.approx(millions, rel=0.07)  # as its name says
