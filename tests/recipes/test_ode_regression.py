"""Causal ODE regression: trajectories are what the engine generates, are cached exactly, and their end is learnt."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.data.shards import INDEX_NAME, DatasetInfo, ShardIndex
from owl.data.windows import WindowDataset
from owl.flow_matching import noise_levels
from owl.latents import in_windows, load_latent_stats
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.recipes.ode_regression import ODERegression
from owl.rollout.clips import clip_inputs, flat, unflat
from owl.rollout.engine import Engine
from owl.rollout.generate import Schedule
from owl.rollout.trajectories import follow
from tests.helpers.errors import refused
from tests.helpers.latents import LATENT, TINY, dot_experiment, draw, lively, make_latents, streams
from tests.helpers.shards import overwrite
from tests.helpers.tiny import owl_here, write_config

LENGTH, STRIDE, POINTS, STEPS = 4, 2, 2, 4
SPAN = LENGTH * STRIDE
MODALITIES = ("latent", "audio_latent", "controls")
OPTIONS = ("--points", str(POINTS), "--shift", "2", "--steps", str(STEPS), "--guidance", "2", "--batch_size", "2")
SOUND = streams("audio")
SOUND["streams"]["audio"] = {"shape": [2 * STRIDE, 3]}


def save(network: WorldTransformer, data: Path, folder: Path, forcing: str = "teacher") -> None:
    """Export a world model as if it had been trained on clips of a dataset."""
    load_latent_stats(network, in_windows(DatasetInfo.load(data).modalities, STRIDE), str(data))
    models.save(network, folder)
    (folder / "provenance.yaml").write_text(f"{{forcing: {forcing}, stride: {STRIDE}, length: {LENGTH}}}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regression")
    make_latents(folder / "data", (2 * SPAN + 1, SPAN, SPAN, SPAN - 1), MODALITIES)
    save(lively(**SOUND), folder / "data", folder / "teacher")
    save(lively(**SOUND), folder / "data", folder / "bidirectional", "full")
    models.save(lively(**SOUND), folder / "bare")
    assert owl_here("data", "trajectories", "teacher", "data", "out", *OPTIONS, cwd=folder) == 0
    experiment = dot_experiment(Path("out"), max_steps=1, limit_val_batches=0)
    recipe = {"class_path": "owl.recipes.ode_regression.ODERegression", "init_args": {"student": "teacher"}}
    experiment["data"]["init_args"] |= {"length": LENGTH, "stride": STRIDE, "modalities": [*MODALITIES, "trajectory"]}
    write_config(folder / "tiny.yaml", experiment | {"model": recipe})
    return folder


@torch.no_grad()
def test_a_trajectory_ends_where_the_engine_generates_the_frame() -> None:
    network = lively(**SOUND, sink=1)
    levels, guidance = tuple(noise_levels(STEPS, 2.0)), 2.0
    latents, _, controls = draw(network, 6, batch=2)
    drawn = []
    for seed in range(6):
        random = torch.Generator().manual_seed(seed)
        drawn.append({name: torch.randn(2, 1, *s.shape, generator=random) for name, s in network.generated.items()})
    noise = {name: torch.cat([frame[name] for frame in drawn], 1) for name in latents}
    engine = Engine(network, noise_levels=levels, guidance=guidance)
    for frame, states in enumerate(follow(network, latents, controls, Schedule(levels, guidance=guidance), noise)):
        assert len(states) == STEPS + 1
        context = {name: x[:, :frame] for name, x in network.restore(latents).items()} if frame else None
        engine.reset(context, controls.at(slice(frame)) if frame else None, batch=2, seed=frame)
        found = engine.step(controls.buttons[:, frame], controls.axes[:, frame]).latents
        expected = {name: x[:, 0] for name, x in network.restore(states[-1]).items()}
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def clips(folder: Path, split: str = "train") -> tuple[WindowDataset, dict[str, Tensor]]:
    dataset = WindowDataset(folder, split, (*MODALITIES, "trajectory"), length=LENGTH, stride=STRIDE)
    return dataset, dataset.batch(range(len(dataset)))


def test_every_window_of_the_dataset_holds_the_trajectories_after_its_own_frames(lab: Path) -> None:
    dataset, batch = clips(lab / "out")
    assert len(dataset) == 3 * STRIDE  # two clips of the first episode and one of the second
    assert [dataset.describe(n)["episode"] for n in range(0, 6, 2)] == [
        *("episode-000-000000", f"episode-000-{SPAN:06d}", "episode-001-000000"),
    ]
    assert len(clips(lab / "out", "validation")[0]) == STRIDE
    assert DatasetInfo.load(lab / "out").splits["test"] == []  # too short
    original = WindowDataset(lab / "data", "train", ("latent",), length=LENGTH, stride=STRIDE)
    assert torch.equal(batch["latent"][1], original[1]["latent"])
    network = models.load(lab / "teacher")
    assert isinstance(network, WorldTransformer)
    latents, controls, _ = clip_inputs(network, batch)
    points = batch["trajectory"]
    assert points.shape[:3] == (6, LENGTH, POINTS + 1)
    noise = unflat(points[:, :, 0], network)
    assert 0.8 < points[:, :, 0].std() < 1.2
    assert all(not torch.equal(points[0, 0, 0], other) for other in points[1:, 0, 0])
    schedule = Schedule(tuple(noise_levels(STEPS, 2.0)), guidance=2.0)
    for frame, states in enumerate(follow(network, latents, controls, schedule, noise)):
        expected = torch.cat([flat(x) for x in states[:: STEPS // POINTS]], 1)
        torch.testing.assert_close(points[:, frame], expected, atol=1e-2, rtol=1e-2)  # from noise in float16


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def test_an_interrupted_pass_is_continued_with_the_same_bytes_and_settings_only(lab: Path) -> None:
    before = digests(lab / "out")
    assert len(before) == 2
    (lab / "out/shard-000000.tar").unlink()
    (lab / "out" / INDEX_NAME).unlink()
    for option, value, found in (
        ("--guidance", "3", "guidance 2.0"),
        ("--hop", "4", f"hop {SPAN}"),
        ("--seed", "1", "seed 0"),
    ):
        with refused("dataset.other-settings", found):
            owl_here("data", "trajectories", "teacher", "data", "out", *OPTIONS, option, value, cwd=lab)
    assert owl_here("data", "trajectories", "teacher", "data", "out", *OPTIONS, cwd=lab) == 0
    assert digests(lab / "out") == before


def test_a_damaged_clip_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_latents(tmp_path / "data", (2 * SPAN, SPAN, SPAN, SPAN), MODALITIES)
    save(lively(**SOUND), data, tmp_path / "teacher")
    overwrite(data, ShardIndex.load(data), 0, 1, "latent.npy", b"broken")
    assert owl_here("data", "trajectories", "teacher", "data", "out", *OPTIONS, cwd=tmp_path) == 0
    printed, warned = capsys.readouterr()
    assert "out holds 4 clips of 4 frames with stride 2, trajectories at noise levels 1, 0.6667 and 0" in printed
    assert "clip episode-000-000000 is left out" in warned


class Scaling(WorldTransformer):
    """Has the flow x_t = (k + (1 - k) t) eps of a world whose frames are k times their noise.

    Its velocity is constant along the flow, so that any solver is exact, and linear in x_t.
    """

    k = 0.3

    def forward(self, latents: Streams, noise_level: Tensor, controls: Controls, *_: Any, **__: Any) -> Streams:  # type: ignore[override]
        level = noise_level[:, :, None, None, None]
        return {name: (1 - self.k) / (self.k + (1 - self.k) * level) * x for name, x in latents.items()}


def linear(k: float) -> Scaling:
    network = Scaling(**TINY)
    network.k = k
    return network


def test_the_flow_map_is_the_optimum_of_the_regression(tmp_path: Path) -> None:
    models.save(lively(), tmp_path)
    made, teacher = ODERegression(str(tmp_path)), linear(0.3)
    latents, _, controls = draw(teacher, LENGTH, batch=2)
    noise, levels = {"video": torch.randn(2, LENGTH, *LATENT)}, noise_levels(STEPS, 5.0)
    states = list(follow(teacher, latents, controls, Schedule(tuple(levels)), noise))
    points = torch.stack([torch.cat([flat(x) for x in frame], 1) for frame in states], 1)
    for point, level in enumerate([*levels, 0.0]):
        torch.testing.assert_close(points[:, :, point], (0.3 + 0.7 * level) * flat(noise), atol=1e-5, rtol=1e-5)
    batch = {"latent": latents["video"], "buttons": controls.buttons, "axes": controls.axes}
    batch |= {"window": torch.arange(2), "trajectory": points}
    made.noise_levels, made.length = levels, LENGTH
    found = []
    for k in (0.2, 0.3, 0.4):
        made.network = linear(k)
        found.append(torch.stack([made.losses(batch, step)["video"] for step in range(4)]).mean().item())
    assert found[1] == pytest.approx(0, abs=1e-10)
    assert min(found[0], found[2]) > 1e-4


def test_the_student_alone_learns_where_trajectories_end(lab: Path) -> None:
    made = ODERegression(str(lab / "teacher"))
    described = DatasetInfo.load(lab / "out").modalities["trajectory"]
    made.noise_levels, made.length = described["noise_levels"], described["length"]
    batch = clips(lab / "out")[1]
    optimizer = torch.optim.AdamW(made.network.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = torch.stack([*made.losses(batch, 0).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert {name for name, _ in made.named_children()} == {"network", "means"}


@pytest.mark.parametrize(
    ("arguments", "code", "tokens"),
    [
        (["teacher", "--steps", "5"], "arguments.wrong-value", ["steps is 5", "multiple of 2"]),
        (["bidirectional"], "recipe.teacher", ["bidirectional", "full", "causal"]),
        (["bare"], "recipe.teacher", ["bare", "length and stride"]),
    ],
)
def test_teachers_that_cannot_be_followed_are_refused(
    lab: Path, arguments: Sequence[str], code: str, tokens: list[str]
) -> None:
    with refused(code, *tokens):
        owl_here("data", "trajectories", arguments[0], "data", "no", *OPTIONS, *arguments[1:], cwd=lab)
    assert not (lab / "no").exists()


def test_clips_longer_than_every_episode_are_refused(tmp_path: Path) -> None:
    data = make_latents(tmp_path / "data", (SPAN - 1,) * 4, MODALITIES)
    save(lively(**SOUND), data, tmp_path / "teacher")
    with refused("dataset.empty-split", str(data), f"{SPAN} frames", "stride 2"):
        owl_here("data", "trajectories", "teacher", data, "no", *OPTIONS, cwd=tmp_path)


@pytest.mark.parametrize(
    ("options", "code", "tokens"),
    [
        (["--data.length", "3"], "windows.trajectory", ["4 frames with stride 2", "length is 3"]),
        (["--data.length", "8", "--data.stride", "1"], "windows.trajectory", ["length is 8 and stride 1"]),
        (
            ["--data.path", "data", "--data.modalities", "[latent,audio_latent,controls]"],
            "dataset.modalities",
            ["data"],
        ),
        (
            ["--data.modalities", "[latent,audio_latent,controls]"],
            "recipe.dataset",
            ["no trajectory", "data.init_args.modalities"],
        ),
        (["--model.student", "shifted"], "recipe.teacher", ["statistics of the teacher teacher", "student shifted"]),
    ],
)
def test_what_a_student_cannot_learn_from_is_refused(
    lab: Path, options: list[str], code: str, tokens: list[str]
) -> None:
    if "shifted" in options:
        network = models.load(lab / "teacher")
        network.video_mean += 1
        models.save(network, lab / "shifted")
    with refused(code, *tokens):
        owl_here("fit", "--config", "tiny.yaml", "--name", "refused", *options, cwd=lab)
