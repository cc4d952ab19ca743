"""The benchmark of audio autoencoders, without the package it compares with: both are trained alike, as many steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import audio
from owl.models.audio_autoencoder import AudioAutoencoder
from tests.helpers.shards import make_dataset


class Twin(AudioAutoencoder):
    """OWL's network in place of the package's."""

    def __init__(self, folder: str, strides: list[int], widths: list[int], latent_channels: int) -> None:
        assert Path(folder).is_dir()
        super().__init__(strides=strides, widths=widths, latent_channels=latent_channels)


def seconds(works: list[Callable[[], object]]) -> list[float]:
    """Call each once; of six steps in a thousandth of a minute."""
    for work in works:
        work()
    return [0.01] * len(works)


def test_equal_networks_have_equal_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_dataset(tmp_path / "data", 3, 8, modalities=["audio"])
    package = tmp_path / "package"
    options = {
        "data.init_args.path": data,
        "data.init_args.length": 4,
        "data.init_args.hop": 2,
        "data.init_args.batch_size": 2,
        "data.init_args.num_workers": 0,
        "model.init_args.segments": "null",
        "model.init_args.warmup_steps": 1,
        "ema.decay": 0.1,
        "trainer.enable_progress_bar": "false",
    }
    command = ["audio", "--minutes", "0.001", "--stable-audio-tools", str(package)]
    monkeypatch.setattr("sys.argv", [*command, *(f"--{key}={value}" for key, value in options.items())])
    with pytest.raises(SystemExit, match="2"):
        audio.main()
    assert f"{package} does not contain stable_audio_tools" in capsys.readouterr().err

    (package / audio.PACKAGE).mkdir(parents=True)
    monkeypatch.setattr(audio, "Oobleck", Twin)
    monkeypatch.setattr(audio, "SIZE", {"strides": [4, 5], "widths": [4, 6, 8], "latent_channels": 3})
    monkeypatch.setattr(audio, "processor_seconds", seconds)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setenv("COLUMNS", "120")
    audio.main()
    lines = capsys.readouterr().out.rpartition("6 steps")[2].splitlines()
    compared = {cells[1].strip(): cells[-2].strip() for line in lines if len(cells := line.split("│")) == 6}
    assert compared.pop("SI-SDR")[1:] == "0.00 dB"
    assert [*compared.values()] == 5 * ["1.00x"]
