"""``data annotate``: controls as the network reads them, the rest untouched, the same bytes however stopped."""

import fcntl
import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.optical_flow import raft_small

from owl import models
from owl.__main__ import run
from owl.commands import data_annotate
from owl.commands.data_annotate import Labeller, annotate
from owl.data import codecs, jobs
from owl.data.modalities.depth import Depth
from owl.data.overview import DatasetReader
from owl.data.shards import INDEX_NAME, INFO_NAME, DatasetInfo, shard_name
from owl.data.windows import WindowDataset
from tests.helpers.depth import save_depth_network
from tests.helpers.errors import refused
from tests.helpers.scenes import save_scenes
from tests.helpers.shards import AXES, BUTTONS, make_dataset
from tests.helpers.tiny import REPOSITORY, in_child, owl_here, tiny_experiment, tiny_inverse_dynamics, write_config
from tests.helpers.videos import make_video
from tests.test_docs import blocks, commands, lines

SIZE = (32, 48)
FRAMES = 7


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network that reads controls, footage without any, and its labelled copy."""
    folder = tmp_path_factory.mktemp("annotate")
    data = make_dataset(folder / "played", frames=8, size=SIZE, modalities=("rgb", "controls"))
    write_config(folder / "tiny.yaml", tiny_inverse_dynamics(data, max_steps=3))
    options = ("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.03")  # readings other than zero
    assert owl_here("fit", "--config", "tiny.yaml", *options, cwd=folder) == 0
    make_dataset(folder / "footage", 5, FRAMES, SIZE, ("rgb", "depth", "flow", "audio"))
    annotate(str(folder / "footage"), folder / "labelled", [labeller(folder)])
    return folder


def checkpoint(lab: Path, name: str = "tiny") -> str:
    return str(lab / "runs" / name / "checkpoints" / "last.ckpt")


def labeller(lab: Path) -> Labeller:
    return Labeller.load(checkpoint(lab))


def contents(root: Path) -> dict[str, bytes]:
    """Every byte, but for the version of the code: a commit between two calls is no failure."""
    files = {file.name: file.read_bytes() for file in sorted(root.iterdir())}
    lines = files[INFO_NAME].splitlines()
    return {**files, INFO_NAME: b"\n".join(line for line in lines if b'"code_version"' not in line)}


def test_members_are_copied_and_labels_are_what_the_network_reads(lab: Path) -> None:
    before, after = DatasetReader(str(lab / "footage")), DatasetReader(str(lab / "labelled"))
    network = models.load(checkpoint(lab))
    assert after.index.episodes.tolist() == before.index.episodes.tolist()
    assert after.index.episode_shard.tolist() == before.index.episode_shard.tolist()
    moved = 0.0
    for episode in range(5):
        frames = []
        for frame in range(FRAMES):
            for modality in before.columns:
                assert after.content(modality, episode, frame) == before.content(modality, episode, frame)
            frames.append(codecs.decode_rgb(before.content("rgb", episode, frame), network.size))
        video = torch.from_numpy(np.stack(frames)).movedim(-1, 1)[None].float() / 127.5 - 1
        expected = torch.cat(network.label(video), -1)[0].numpy()
        stored = np.stack([after.frame("controls", episode, frame) for frame in range(FRAMES)])
        assert stored.dtype == np.float32
        np.testing.assert_allclose(stored, expected, atol=1e-5)
        assert not stored[0].any()
        moved += np.abs(stored).sum()
    assert moved > 0


def test_long_episodes_are_labelled_in_parts_without_seams(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (11, 16, 24, 3), np.uint8)
    whole = labeller(lab).label(frames)
    for part in (1, 2, 4):
        monkeypatch.setattr(data_annotate, "FRAMES", part)
        np.testing.assert_allclose(labeller(lab).label(frames), whole, atol=1e-5)


def test_the_description_says_who_labelled(lab: Path) -> None:
    before, after = (DatasetInfo.load(lab / name) for name in ("footage", "labelled"))
    controls = after.modalities["controls"]
    assert (controls["buttons"], controls["axes"]) == (BUTTONS, AXES)
    assert controls["labelled_by"] == {
        "checkpoint": checkpoint(lab),
        "fingerprint": models.fingerprint(models.load(checkpoint(lab))),
    }
    assert list(after.modalities) == [*before.modalities, "controls"]
    assert (after.splits, after.fps, after.size) == (before.splits, before.fps, before.size)
    assert after.source["kind"] == "annotated"


def test_a_killed_annotation_continues_to_the_same_bytes(lab: Path, tmp_path: Path) -> None:
    def killed() -> int:
        label, count = Labeller.label, iter(range(9))

        def deadly(self: Labeller, frames: np.ndarray) -> np.ndarray:
            if next(count) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return label(self, frames)

        Labeller.label = deadly  # type: ignore[method-assign]
        annotate(str(lab / "footage"), tmp_path, [labeller(lab)])
        return 0

    assert in_child(killed) == -signal.SIGKILL
    assert not (tmp_path / INDEX_NAME).exists()
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("shard-*.tar")}
    assert sorted(kept) == [shard_name(0), shard_name(1)]
    annotate(str(lab / "footage"), tmp_path, [labeller(lab)])
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
    assert contents(tmp_path) == contents(lab / "labelled")


def test_another_process_labels_with_the_network_of_the_checkpoint(lab: Path, tmp_path: Path) -> None:
    annotate(str(lab / "footage"), tmp_path, [labeller(lab)], workers=1)
    before, after = (
        WindowDataset(root, "train", ("controls",), length=FRAMES) for root in (lab / "labelled", tmp_path)
    )
    for one, other in zip(before, after, strict=True):  # by fewer threads, so the last bit may differ
        torch.testing.assert_close(other["buttons"], one["buttons"], atol=1e-5, rtol=0)
        torch.testing.assert_close(other["axes"], one["axes"], atol=1e-5, rtol=1e-5)
    assert DatasetInfo.load(tmp_path) == DatasetInfo.load(lab / "labelled")


def test_a_finished_copy_is_left_as_it_is(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in (lab / "labelled").iterdir()}
    arguments = [str(lab / "footage"), str(lab / "labelled"), "--controls", checkpoint(lab)]
    assert run(["data", "annotate", *arguments]) == 0
    assert "is complete already and was left as it is" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in (lab / "labelled").iterdir()} == before


def test_an_episode_ends_before_a_damaged_member(lab: Path, tmp_path: Path) -> None:
    source = make_dataset(tmp_path / "footage", 5, FRAMES, SIZE, ("rgb", "audio"))
    reader = DatasetReader(str(source))
    row = int(reader.index.episode_row[1]) + 4
    with open(source / shard_name(1), "r+b") as file:
        file.seek(int(reader.index.offsets[row, reader.columns["audio"]]) + 200)
        file.write(b"\xff\x00\xff")
    with pytest.warns(
        UserWarning,
        match=r"episode-001, frame 4 .*audio.npy",
    ):
        annotate(str(source), tmp_path / "labelled", [labeller(lab)])
    assert DatasetReader(str(tmp_path / "labelled")).index.episode_frames.tolist() == [7, 4, 7, 7, 7]


def test_what_cannot_be_labelled_is_refused(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    footage, target = str(lab / "footage"), tmp_path / "target"

    def refuse(source: str, directory: Path, controls: str, code: str, *tokens: str) -> None:
        with refused(code, *tokens):
            data_annotate.main(source, str(directory), controls=controls)

    played, sound = str(lab / "played"), str(make_dataset(tmp_path / "sound", modalities=("audio",)))
    refuse(played, target, checkpoint(lab), "dataset.modalities", played, "rgb, controls")
    refuse(sound, target, checkpoint(lab), "dataset.modalities", sound, "audio")
    content = torch.load(checkpoint(lab), weights_only=True)
    content["owl"]["config"]["data"]["init_args"]["stride"] = 2
    torch.save(content, tmp_path / "strided.ckpt")
    strided = str(tmp_path / "strided.ckpt")
    refuse(footage, target, strided, "network.stride", strided, "stride 2", "stride of 1")
    write_config(tmp_path / "vae.yaml", tiny_experiment(lab / "footage", max_steps=1))
    assert owl_here("fit", "--config", "vae.yaml", cwd=tmp_path) == 0
    vae = checkpoint(tmp_path, "vae")
    refuse(footage, target, vae, "network.kind", vae, "ImageAutoencoder", "InverseDynamics")
    assert not target.exists()
    refuse(footage, lab / "played", checkpoint(lab), "dataset.occupied", played, "synthetic")
    other = make_dataset(tmp_path / "other", 5, FRAMES, SIZE, ("rgb", "depth", "flow", "audio"), seed=1)
    refuse(str(other), lab / "labelled", checkpoint(lab), "dataset.other-settings", "source", footage, str(other))
    content["owl"]["config"]["data"]["init_args"]["stride"] = 1
    content["state_dict"]["network.fuse.bias"] += 1
    torch.save(content, tmp_path / "else.ckpt")
    other = str(tmp_path / "else.ckpt")
    refuse(footage, lab / "labelled", other, "dataset.other-settings", "checkpoint", checkpoint(lab), other)
    monkeypatch.setattr(jobs, "LOCK_PATIENCE", 0.1)
    shutil.copytree(lab / "labelled", tmp_path / "killed")
    (tmp_path / "killed" / INDEX_NAME).unlink()
    with open(tmp_path / "killed" / INFO_NAME) as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        refuse(footage, tmp_path / "killed", checkpoint(lab), "dataset.locked", str(tmp_path / "killed"))


def test_every_command_of_the_page_on_controls_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From films without controls to windows with controls."""
    monkeypatch.chdir(tmp_path)
    for folder in ("experiments", "configs"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    make_video(tmp_path / "footage" / "clip.mp4", 60, size=(96, 160))
    shorter = [
        *("--trainer.max_steps", "1", "--trainer.max_time", "null", "--trainer.enable_progress_bar", "false"),
        *("--data.init_args.batch_size", "2", "--data.init_args.num_workers", "0"),
        *("--data.init_args.validation_windows", "2", "--data.init_args.record.frames", "90"),
    ]
    for command in commands(REPOSITORY / "docs" / "how-to" / "controls.md"):
        words = shlex.split(command)[3:]
        assert owl_here(*words, *(shorter if words[0] == "fit" else []), cwd=tmp_path) == 0, command
    windows = WindowDataset(tmp_path / "data" / "labelled", modalities=("rgb", "controls"), length=4)
    assert windows[0]["buttons"].shape == (4, 5)
    assert windows[0]["axes"].shape == (4, 1)
    assert json.loads((tmp_path / "data" / "labelled" / INFO_NAME).read_text())["modalities"]["controls"]["labelled_by"]


# --- optical flow, depth and cameras


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with footage without flow, a depth network and scenes."""
    folder = tmp_path_factory.mktemp("films")
    make_dataset(folder / "films", 4, FRAMES, (64, 96), ("rgb", "audio"))
    save_depth_network(folder / "network")
    save_scenes(folder / "scenes", folder / "films")
    return folder


def test_several_annotators_add_their_members_in_one_pass(films: Path, tmp_path: Path) -> None:
    """The same bytes when killed in between."""
    source, network = str(films / "films"), str(films / "network")
    arguments = {"flow": "dis", "depth": network}
    data_annotate.main(source, str(tmp_path / "whole"), **arguments)

    def killed() -> int:
        encode, count = Depth.encode, iter(range(99))

        def deadly(levels: np.ndarray) -> bytes:
            if next(count) == 2 * FRAMES + 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(levels)

        Depth.encode = staticmethod(deadly)  # type: ignore[method-assign]
        data_annotate.main(source, str(tmp_path / "killed"), **arguments)
        return 0

    assert in_child(killed) == -signal.SIGKILL
    assert len(list((tmp_path / "killed").glob("shard-*.tar"))) == 2
    data_annotate.main(source, str(tmp_path / "killed"), **arguments)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    before, after = DatasetReader(source), DatasetReader(str(tmp_path / "whole"))
    assert list(after.info.modalities) == ["rgb", "audio", "flow", "depth"]
    assert after.info.modalities["flow"]["made_by"]["identity"] == "opencv-dis"
    for modality in before.columns:
        assert after.content(modality, 2, 3) == before.content(modality, 2, 3)
    parts = WindowDataset(tmp_path / "whole", "train", ("rgb", "depth", "flow"), length=FRAMES)[0]
    assert parts["flow"][1:].abs().max() > 0.5
    assert parts["depth"].std() > 0.01


def test_scenes_add_depth_and_cameras(films: Path, tmp_path: Path) -> None:
    data_annotate.main(str(films / "films"), str(tmp_path), scene=str(films / "scenes"))
    windows = WindowDataset(tmp_path, "test", ("depth", "camera"), length=3, size=(32, 48))
    assert windows[0]["camera"].shape == (3, 4, 4)
    assert windows[0]["camera_intrinsics"][0].tolist() == pytest.approx([12 * 2.4, 11 * 32 / 12, 24, 16])
    assert windows[0]["depth"].max() > 0.2


def test_impossible_combinations_are_refused(films: Path, tmp_path: Path) -> None:
    source, target = str(films / "films"), str(tmp_path / "target")

    def refuse(code: str, *tokens: str, source: str = source, **options: str) -> None:
        with refused(code, *tokens):
            data_annotate.main(source, target, **options)

    refuse("arguments.missing-key", "--flow")
    refuse("arguments.wrong-value", "--depth", "--scene", depth="a", scene="b")
    refuse("flow.weights", "--flow_weights", flow="raft")
    refuse("flow.weights", "raft.pth", flow="dis", flow_weights="raft.pth")
    missing = str(tmp_path / "missing.pth")
    refuse("flow.weights", missing, flow="raft", flow_weights=missing)
    played = str(make_dataset(tmp_path / "played", modalities=("rgb", "depth")))
    refuse("dataset.modalities", played, "rgb, depth", source=played, scene=str(films / "scenes"))
    small = str(make_dataset(tmp_path / "small", size=(8, 8), modalities=("rgb",)))
    refuse("flow.size", "8x8", source=small, flow="dis")
    assert not Path(target).exists()
    data_annotate.main(source, target, flow="dis")
    refuse("dataset.other-settings", "depth", flow="dis", depth=str(films / "network"))


def test_every_command_of_the_page_on_depth_and_flow_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From footage of the game to latents of seven channels, and from films to depth, flow and cameras."""
    monkeypatch.chdir(tmp_path)
    for folder in ("experiments", "configs"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    make_video(tmp_path / "footage" / "clip.mp4", 9, size=(96, 160))
    save_depth_network(tmp_path / "models" / "depth")
    torch.save(raft_small(weights=None).state_dict(), tmp_path / "models" / "raft_small.pth")
    make_dataset(tmp_path / "data" / "doom-mix-96x160", 3, 4, (96, 160), ("rgb",))
    make_dataset(tmp_path / "data" / "doom-mix-96x160-depth-flow", 3, 4, (96, 160), ("rgb", "depth", "flow"))
    shorter = [
        *("--trainer.max_steps", "1", "--trainer.max_time", "null", "--trainer.enable_progress_bar", "false"),
        *("--data.init_args.batch_size", "2", "--data.init_args.num_workers", "0", "--data.init_args.record", "null"),
        *("--data.init_args.validation_windows", "2"),
    ]
    for block in blocks(REPOSITORY / "docs" / "how-to" / "depth-and-flow.md"):
        if block.language == "python":
            exec(block.content, {})
        for command in lines(block.content) if block.language == "bash" else []:
            words = shlex.split(command)[3:]
            if "--scene" in words:
                save_scenes("scenes", "data/films")
            assert owl_here(*words, *(shorter if words[0] == "fit" else []), cwd=tmp_path) == 0, command
    parts = WindowDataset(tmp_path / "data" / "films-scene", modalities=("depth", "flow", "camera"), length=2)[0]
    assert parts["camera"].shape == (2, 4, 4)
