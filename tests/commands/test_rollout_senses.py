"""World models with sound and motion, from footage to films, through the real command line."""

import json
import shlex
from contextlib import chdir
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from owl import models
from owl.data.shards import DatasetInfo
from owl.latents import in_windows, load_latent_stats
from owl.models.audio_autoencoder import AudioAutoencoder
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.multimodal_autoencoder import MultimodalAutoencoder
from owl.models.world_model import WorldTransformer
from owl.rollout.episodes import Episodes
from tests.commands.test_rollout import SMALL
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import REPOSITORY, owl_here
from tests.helpers.world import AUTOENCODER, STRIDE, save_run, tiny_world_model, train
from tests.test_docs import blocks, lines

FOOTAGE, LATENTS = "data/doom-96x160-senses", "data/doom-96x160-senses-latents"
SOUND = "runs/audio_vae_quickstart/checkpoints/last.ckpt"
HEARD, MOVING = (f"runs/world_model_{kind}_quickstart/checkpoints/last.ckpt" for kind in ("av", "jam"))
STREAMS = {
    "av": ("audio_latent", {"audio": {"shape": [2 * STRIDE, 3], "sinks": 1}}),
    "jam": ("motion_latent", {"motion": {"shape": [4, 4, 6], "patch": 2, "dropout": 0.2}}),
    "depth": ("depth_latent", {"depth": {"shape": [4, 4, 6], "patch": 2, "role": "given"}}),
}
"""Modality and declaration of what each world model generates, or is given, besides the picture."""
GRID: dict[str, Any] = {"size": (32, 48), "latent_size": (4, 6), "latent_channels": 4}
GRID |= {"widths": [8, 16, 16], "blocks": [1, 1, 1]}


def save_sound(folder: Path, name: str, seed: int = 0) -> None:
    """An autoencoder with two tokens of three channels in a frame of 1,260 samples."""
    torch.manual_seed(seed)
    save_run(folder, name, AudioAutoencoder(strides=[15, 42], widths=[4, 4, 4], latent_channels=3, causal=True))


def save_world(folder: Path, kind: str) -> None:
    """A world model with one more stream."""
    torch.manual_seed(0)
    network = WorldTransformer(**tiny_senses(kind)["model"]["init_args"]["network"]["init_args"])
    modalities = in_windows(DatasetInfo.load(folder / LATENTS).modalities, STRIDE)
    load_latent_stats(network, modalities, LATENTS)
    save_run(folder, f"world_model_{kind}_quickstart", network, {"path": LATENTS, "stride": STRIDE})


def tiny_senses(kind: str) -> dict[str, Any]:
    """The configuration of a world model with one more stream, for seconds of training."""
    modality, declared = STREAMS[kind]
    experiment = tiny_world_model(LATENTS, max_steps=2)
    experiment["model"]["init_args"]["network"]["init_args"]["streams"] |= declared
    experiment["data"]["init_args"]["modalities"] = ["latent", modality, "controls"]
    return experiment


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs and datasets named as in the how-to page."""
    folder = tmp_path_factory.mktemp("senses")
    make_dataset(folder / FOOTAGE, episodes=4, frames=40, size=(32, 48))
    torch.manual_seed(0)
    save_run(folder, "quickstart", ImageAutoencoder(3, **GRID))
    save_sound(folder, "audio_vae_quickstart")
    page = blocks(REPOSITORY / "docs/how-to/sound-and-motion.md")
    every = [command for block in page if block.language == "bash" for command in lines(block.content)]
    commands = [command for command in every if "earlier" not in command]  # they need a pose, and tests of their own
    (encode,) = (shlex.split(command)[3:] for command in commands if " data encode " in command)
    assert owl_here(*encode, cwd=folder) == 0
    for kind in STREAMS:
        save_world(folder, kind)
    for command in commands:
        if " rollout " in command:
            arguments = [word for word in shlex.split(command)[3:] if not word.startswith("runs/inverse_dynamics")]
            arguments = [word for word in arguments if word != "--inverse_dynamics"]
            assert owl_here(*arguments, *SMALL, cwd=folder) == 0, command
    return folder


def tracks(path: Path) -> tuple[int, np.ndarray]:
    """The number of pictures and the sound float[2, samples] of a film."""
    with av.open(str(path)) as container:
        pictures = sum(1 for _ in container.decode(container.streams.video[0]))
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return pictures, np.zeros((2, 0))
        return pictures, np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1)


def test_a_pass_writes_picture_motion_and_sound(lab: Path) -> None:
    modalities = DatasetInfo.load(lab / LATENTS).modalities
    latents = ["latent", "motion_latent", "depth_latent", "audio_latent"]
    assert list(modalities) == [*latents, "rgb", "flow", "audio", "controls"]
    assert modalities["motion_latent"]["encoder"] == modalities["latent"]["encoder"]  # one network, twice
    assert modalities["motion_latent"]["stride"] == STRIDE
    assert modalities["audio_latent"]["shape"] == [2, 3]


def test_films_have_sound_as_long_as_they_last(lab: Path) -> None:
    out = lab / "runs/world_model_av_quickstart/rollout"
    samples = 2 * 1260  # of a frame of the world model
    for name, frames in (("comparison", 2 * 6), ("rollout", 4)):
        pictures, sound = tracks(out / f"{name}.mp4")
        assert pictures == frames
        assert frames * samples <= sound.shape[1] <= frames * samples + 2048  # AAC pads its last frame
        assert np.abs(sound).max() > 0
    # on the left of the comparison the recorded tone, on the right what the autoencoder makes of it
    left, right = tracks(out / "comparison.mp4")[1]
    assert np.abs(left).max() > 0.3
    assert not np.array_equal(left, right)
    assert tracks(lab / "runs/world_model_jam_quickstart/rollout/rollout.mp4")[1].size == 0


def test_sound_and_motion_are_measured_and_reported(lab: Path) -> None:
    heard, moving, deep = (
        json.loads((lab / f"runs/world_model_{kind}_quickstart/rollout/metrics.json").read_text()) for kind in STREAMS
    )
    for name in ("mel", "other_mel", "audio_latent_mse", "warp_error", "true_warp_error"):
        assert {f"{name}_{h}" for h in (1, 2, 4)} <= heard.keys()
    assert not any(name.startswith("mel") for name in moving)
    assert {"motion_epe_4", "zero_motion_epe_4", "warp_error_4"} <= moving.keys()
    assert "warp_error_4" in deep
    report = (lab / "runs/world_model_av_quickstart/rollout/report.md").read_text()
    assert "## Sound" in report
    assert "the dataset's own sound" in report
    assert "mel distance (dB), world model" in report
    moved = (lab / "runs/world_model_jam_quickstart/rollout/report.md").read_text()
    assert "## Sound" not in moved
    assert "end-point error of generated motion (px)" in moved
    assert "--inner_guidance 3" in moved


def test_only_measured_windows_hold_flow_and_sound(lab: Path) -> None:
    with chdir(lab):
        network, decoders = models.load(HEARD), [models.load(path) for path in (AUTOENCODER, SOUND)]
        assert isinstance(network, WorldTransformer)
        info = DatasetInfo.load(LATENTS)
        known = Episodes(LATENTS, info, "test", network, decoders[0], STRIDE, 6, sound_decoder=decoders[1])
        windows, measured = known.windows(2), known.windows(2, measured=True)
        assert measured.keys() - windows.keys() == {"flow", "audio"}
        assert all(torch.equal(measured[name], values) for name, values in windows.items())
        assert measured["audio"].shape[:2] == (2, 6)
        assert not {"flow", "audio"} & next(known.stream(1, 2)).keys()


def test_depth_and_motion_are_in_the_latent_of_the_picture(lab: Path) -> None:
    """A latent of seven channels, decoded to its picture."""
    torch.manual_seed(0)
    models.save(MultimodalAutoencoder(**GRID, depth_scale=(7.143, 1.2, False), flow_scale=0.1), lab / "seven")
    assert owl_here("data", "encode", "seven", FOOTAGE, "data/seven", "--keep", "controls,rgb,flow", cwd=lab) == 0
    train(lab, "seven_world", tiny_world_model("data/seven", max_steps=2))
    rollout = ("rollout", "runs/seven_world/checkpoints/last.ckpt", "--data", "data/seven", *SMALL)
    assert owl_here(*rollout, cwd=lab) == 0
    metrics = json.loads((lab / "runs/seven_world/rollout/metrics.json").read_text())
    assert {"psnr_4", "reconstruction_psnr_4", "warp_error_4"} <= metrics.keys()
    assert tracks(lab / "runs/seven_world/rollout/comparison.mp4")[0] == 2 * 6


def test_the_page_plays_sound_from_python(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab)
    (block,) = (b for b in blocks(REPOSITORY / "docs/how-to/sound-and-motion.md") if b.language == "python")
    names: dict[str, Any] = {}
    exec(block.content, names)
    assert names["sound"].shape == (1, 2, 2520)


@pytest.mark.parametrize(
    ("checkpoint", "arguments", "code", "tokens"),
    [
        (HEARD, ("--audio_decoder", AUTOENCODER), "latents.encoder", ["audio decoder"]),
        (HEARD, ("--audio_decoder", "runs/other_sound"), "latents.encoder", ["audio decoder"]),
        (HEARD, ("--inner_guidance", "3"), "engine.guidance", ["video, audio"]),
        (MOVING, ("--audio_decoder", SOUND), "decoder.stream", ["decoder for audio", "video, motion"]),
        (MOVING, ("--motion_decoder", SOUND), "latents.encoder", ["motion decoder"]),
        (MOVING, ("--stride", "3"), "windows.stride", ["motion_latent", "over 2 stored frames", "stride is 3"]),
    ],
)
def test_what_does_not_fit_is_reported_in_one_sentence(
    lab: Path, checkpoint: str, arguments: tuple[str, ...], code: str, tokens: list[str]
) -> None:
    if "runs/other_sound" in arguments:
        save_sound(lab, "other_sound", seed=1)
    with refused(code, *tokens):
        owl_here("rollout", checkpoint, "--data", LATENTS, *SMALL, "--out", "refused", *arguments, cwd=lab)
    assert not (lab / "refused").exists()


def test_a_stream_without_latents_is_reported_before_training(lab: Path) -> None:
    experiment = tiny_senses("av")
    experiment["model"]["init_args"]["network"]["init_args"]["streams"]["scene"] = {"shape": [2, 4, 6], "patch": 2}
    with refused("dataset.modalities", LATENTS, "no scene_latent", "scene input", "latent, motion_latent"):
        train(lab, "without", experiment)
