"""``data encode`` of depth, sound and several modalities together, by networks of one's own."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from owl import models
from owl.commands.data_inspect import main as inspect
from owl.commands.data_verify import main as verify
from owl.data.codecs import encode_depth
from owl.data.overview import DatasetReader
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardIndex, ShardWriter, shard_name
from owl.data.windows import WindowDataset
from tests.helpers.encoders import DepthEncoder, SceneEncoder, SoundEncoder
from tests.helpers.errors import refused
from tests.helpers.shards import DESCRIPTIONS, make_dataset, overwrite
from tests.helpers.tiny import owl, owl_here

FRAMES = 7


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with footage of every modality."""
    folder = tmp_path_factory.mktemp("encode")
    make_dataset(folder / "footage", episodes=4, frames=FRAMES, size=(32, 48))
    return folder


def export(lab: Path, name: str, network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    models.save(network, lab / name)
    return network


def windows(lab: Path, folder: str, *modalities: str) -> list[dict[str, torch.Tensor]]:
    """All episodes of the training split."""
    dataset = WindowDataset(lab / folder, "train", modalities, length=FRAMES)
    return [dataset[number] for number in range(len(dataset))]


def statistics(latents: torch.Tensor) -> tuple[list[float], list[float]]:
    """Of float[..., c]."""
    flat = latents.double().flatten(0, -2)
    return flat.mean(0).tolist(), flat.std(0, correction=0).tolist()


def test_depth_is_encoded_by_several_processes_of_the_real_command(lab: Path) -> None:
    network = export(lab, "depth", DepthEncoder())
    result = owl("data", "encode", "depth", "footage", "deep", "--workers", "2", "--trust", "tests", cwd=lab)
    assert "deep holds 28 frames, depth_latent, controls, latents of 2x4x6" in result.stdout
    assert "28/28" in result.stderr
    found = windows(lab, "deep", "depth_latent", "controls")
    with torch.inference_mode():
        expected = [network.encode(window["depth"]).mean for window in windows(lab, "footage", "depth")]  # type: ignore
    torch.testing.assert_close([window["depth_latent"] for window in found], expected, atol=1e-5, rtol=2**-10)
    latent = DatasetInfo.load(lab / "deep").modalities["depth_latent"]
    assert latent["extension"] == "depth_latent.npy"
    assert latent["encoder"]["class_path"] == "tests.helpers.encoders.DepthEncoder"
    torch.testing.assert_close(
        (latent["mean"], latent["std"]),
        statistics(torch.stack([window["depth_latent"] for window in found]).movedim(2, -1)),
        rtol=1e-9,
        atol=0,
    )
    assert owl_here("data", "encode", "depth", "footage", "alone", cwd=lab) == 0
    for file in (lab / "alone").glob("shard-*.tar"):
        assert file.read_bytes() == (lab / "deep" / file.name).read_bytes()


@pytest.mark.parametrize(("hop", "shape", "rate"), [(420, [3, 3], None), (500, [3], 88.2)])
def test_sound_is_encoded_an_episode_at_a_time_at_any_rate(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], hop: int, shape: list[int], rate: float | None
) -> None:
    network = export(lab, f"sound-{hop}", SoundEncoder(hop))
    command = ["data", "encode", f"sound-{hop}", "footage", str(tmp_path / "heard"), "--batch_size", "2"]
    assert owl_here(*command, "--keep", "rgb,controls", cwd=lab) == 0
    assert (
        ("2 or 3 tokens" in (printed := capsys.readouterr().err)) == ("at 29.4 or 44.1 frames" in printed) == bool(rate)
    )
    assert printed.count("2 or 3 tokens") == bool(rate)  # not for every episode
    latent = DatasetInfo.load(tmp_path / "heard").modalities["audio_latent"]
    assert (latent["shape"], latent.get("rate")) == (shape, rate)
    found = windows(tmp_path, "heard", "audio_latent", "rgb")
    for window, heard in zip(windows(lab, "footage", "audio"), found, strict=True):
        with torch.inference_mode():
            expected = network.encode(window["audio"][None]).mean[0].T  # type: ignore[operator]
        tokens = heard["audio_latent"].flatten(0, -2)
        assert len(tokens) == FRAMES * 1260 // hop
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=2**-10)  # without a seam
    every = torch.cat([window["audio_latent"].flatten(0, -2) for window in found])
    torch.testing.assert_close((latent["mean"], latent["std"]), statistics(every), rtol=1e-9, atol=0)
    assert verify(str(tmp_path / "heard")) == 0
    inspect(str(tmp_path / "heard"), out=str(tmp_path / "sheet.png"))


def test_several_modalities_are_encoded_together_and_other_latents_kept(lab: Path, tmp_path: Path) -> None:
    scene, sound = export(lab, "scene", SceneEncoder()), export(lab, "sound", SoundEncoder())
    first, both = str(tmp_path / "scene"), str(tmp_path / "both")
    assert owl_here("data", "encode", "scene", "footage", first, "--keep", "audio,controls", cwd=lab) == 0
    assert owl_here("data", "encode", "sound", first, both, "--keep", "latent,controls", cwd=lab) == 0
    info = DatasetInfo.load(both)
    assert list(info.modalities) == ["audio_latent", "latent", "controls"]
    assert info.modalities["latent"] == DatasetInfo.load(first).modalities["latent"]
    pictures = windows(lab, "footage", "rgb", "depth", "flow")
    for window, found in zip(pictures, windows(tmp_path, "both", "latent", "audio_latent"), strict=True):
        rgb = window["rgb"].float() / 127.5 - 1
        with torch.inference_mode():
            expected = scene.encode(rgb, window["depth"], window["flow"]).mean  # type: ignore[operator]
        torch.testing.assert_close(found["latent"], expected, atol=1e-5, rtol=2**-9)
    assert models.fingerprint(sound.encoder) == info.modalities["audio_latent"]["encoder"]["fingerprint"]  # type: ignore


def test_several_networks_encode_in_one_pass_what_they_encode_one_after_the_other(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, network in (("depth", DepthEncoder()), ("sound", SoundEncoder())):
        export(lab, name, network)
    together = str(tmp_path / "together")
    command = ["data", "encode", "sound", "depth", "footage", together, "--keep", "rgb,controls", "--batch_size", "3"]
    assert owl_here(*command, cwd=lab) == 0
    printed = capsys.readouterr().out
    assert "holds 28 frames, audio_latent, depth_latent, rgb, controls, latents of 3x3 and 2x4x6" in printed
    first, both = str(tmp_path / "first"), str(tmp_path / "both")
    assert owl_here("data", "encode", "depth", "footage", first, "--keep", "rgb,audio,controls", cwd=lab) == 0
    kept = "depth_latent,rgb,controls"
    assert owl_here("data", "encode", "sound", first, both, "--keep", kept, cwd=lab) == 0
    info, expected = DatasetInfo.load(together), DatasetInfo.load(both)
    assert info.modalities == expected.modalities
    for shard in Path(both).glob("shard-*.tar"):
        assert shard.read_bytes() == (Path(together) / shard.name).read_bytes()
    assert verify(together) == 0
    # the sound of another hop has other weights
    export(lab, "other", SoundEncoder(630))
    with refused("dataset.other-settings", "encoder of audio_latent sound", "other"):
        owl_here("data", "encode", "other", *command[3:], cwd=lab)
    with refused("arguments.wrong-value", "depth and depth", "depth_latent"):
        owl_here("data", "encode", "depth", "depth", "footage", "twice", cwd=lab)
    with refused("arguments.wrong-value", "depth_latent are 1 names", "2 encoders"):
        owl_here("data", "encode", "sound", "depth", "footage", "twice", "--name", "depth_latent", cwd=lab)


def test_an_episode_ends_where_the_first_of_several_networks_cannot_read_on(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, network in (("depth", DepthEncoder()), ("sound", SoundEncoder())):
        export(lab, name, network)
    source = make_dataset(tmp_path / "footage", 4, FRAMES, (32, 48))
    overwrite(source, ShardIndex.load(source), 1, 4, "audio.npy", b"no sound")
    overwrite(source, ShardIndex.load(source), 2, 5, "depth.png", b"no depth")
    assert owl_here("data", "encode", "sound", "depth", str(source), str(tmp_path / "out"), cwd=lab) == 0
    warned = capsys.readouterr().err
    assert "episode-001, frame 4 is damaged" in warned
    assert "episode-002, frame 5 is damaged" in warned
    assert ShardIndex.load(tmp_path / "out").episode_frames.tolist() == [7, 4, 5, 7]


def test_a_name_of_ones_own(lab: Path) -> None:
    export(lab, "depth", DepthEncoder())
    assert owl_here("data", "encode", "depth", "footage", "named", "--name", "conditioning_latent", cwd=lab) == 0
    assert list(DatasetInfo.load(lab / "named").modalities) == ["conditioning_latent", "controls"]
    with refused("dataset.other-settings", "conditioning_latent, controls, now it is depth_latent, controls"):
        owl_here("data", "encode", "depth", "footage", "named", cwd=lab)
    for name in ("audio_latent", "rgb", "depth"):
        with refused("arguments.wrong-value", "depth", name, "conditioning_latent"):
            owl_here("data", "encode", "depth", "footage", "elsewhere", "--name", name, cwd=lab)
    assert not (lab / "elsewhere").exists()


def test_kept_members_lie_in_the_order_of_the_description(lab: Path) -> None:
    export(lab, "depth", DepthEncoder())
    assert owl_here("data", "encode", "depth", "footage", "kept", "--keep", "controls,depth,rgb", cwd=lab) == 0
    described = [modality["extension"] for modality in DatasetInfo.load(lab / "kept").modalities.values()]
    assert described == ["depth_latent.npy", "rgb.jpg", "depth.png", "controls.npy"]
    with tarfile.open(lab / "kept" / shard_name(0)) as shard:
        assert [name.partition(".")[2] for name in shard.getnames()] == FRAMES * described


def test_an_episode_ends_before_the_first_frame_that_does_not_decode(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of whichever modality: its members are what was written, so checksums are right."""
    export(lab, "scene", SceneEncoder())
    source = make_dataset(tmp_path / "footage", 4, FRAMES, (32, 48))
    reader = DatasetReader(str(source))
    extensions = {name: DESCRIPTIONS[name]["extension"] for name in reader.columns}
    frames = [{extensions[m]: reader.content(m, 1, frame) for m in extensions} for frame in range(FRAMES)]
    frames[5]["rgb.jpg"] = b"no picture"
    frames[3]["depth.png"] = encode_depth(np.zeros((32, 32), np.uint8))
    with ShardWriter(source, 1) as writer:
        for frame, members in enumerate(frames):
            writer.write("episode-001", frame, members)
    write_index(source)
    assert owl_here("data", "encode", "scene", str(source), str(tmp_path / "out"), cwd=lab) == 0
    assert "episode-001, frame 3 is damaged (it has shape [32, 32]" in capsys.readouterr().err
    assert ShardIndex.load(tmp_path / "out").episode_frames.tolist() == [7, 3, 7, 7]


def test_what_the_network_does_not_take_is_refused_before_anything_is_written(lab: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    export(lab, "small", DepthEncoder((16, 24)))
    with refused("dataset.size", "depth of footage", "32x48", "16x24"):
        owl_here("data", "encode", "small", "footage", out, cwd=lab)
    mono = export(lab, "mono", SoundEncoder())
    changed = make_dataset(tmp_path / "changed", 3, 4, (32, 48), ("audio",))
    info = DatasetInfo.load(changed)
    info.modalities["audio"]["channels"] = 1
    info.save(changed)
    with refused("network.input", f"audio of {changed}", "1 channels", "takes 2"):
        owl_here("data", "encode", "mono", str(changed), out, cwd=lab)
    info.modalities["audio"] |= {"channels": 2, "sample_rate": 48_000}
    info.save(changed)
    with refused("network.input", f"audio of {changed}", "48000", f"takes {mono.sample_rate}"):
        owl_here("data", "encode", "mono", str(changed), out, cwd=lab)
    assert not Path(out).exists()
    export(lab, "wrong", SoundEncoder(wrong_by=1))
    with refused("latents.shape", "wrong", "[20, 3]", "[21, 3]"):
        owl_here("data", "encode", "wrong", "footage", out, cwd=lab)
    assert not list(Path(out).glob("shard-*"))
