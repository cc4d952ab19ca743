"""Numbers of rollouts against closed forms: a perfect model, the baseline by hand, controls that are not lost."""

from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from owl import models
from owl.data.shards import DatasetInfo
from owl.data.windows import WindowDataset
from owl.losses.lpips import LPIPS
from owl.metrics.frechet import EfficientNetLite0Features, frechet_distance
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.rollout.engine import Engine, Frame
from owl.rollout.episodes import Episodes, as_bytes, load_decoder
from owl.rollout.evaluation import (
    Clips,
    DriftMeter,
    action_following,
    audio_latent_mse,
    flicker,
    horizon_curves,
    latency,
    long_rollout,
    roll_out,
)
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from owl.viz.rollouts import strip
from tests.helpers.errors import refused
from tests.helpers.latents import lively, make_latents, streams
from tests.helpers.tiny import owl_here
from tests.helpers.world import AUTOENCODER, FOOTAGE, INVERSE_DYNAMICS, LATENTS, STRIDE, WORLD_MODEL, make_world

CONTEXT, HORIZON = 3, 5


@pytest.fixture(scope="module", autouse=True)
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = make_world(tmp_path_factory.mktemp("evaluation"))
    assert owl_here("data", "encode", AUTOENCODER, FOOTAGE, "data/both", "--keep", "rgb,controls", cwd=folder) == 0
    with chdir(folder):
        yield folder


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(WORLD_MODEL, {"video": AUTOENCODER}, noise_levels=(1.0, 0.5))


def episodes(engine: Engine, data: str = LATENTS, split: str = "test", length: int = CONTEXT + HORIZON) -> Episodes:
    return Episodes(data, DatasetInfo.load(data), split, engine.network, engine.decoders["video"], STRIDE, length)


class Perfect(Engine):
    """Knows the future, and decodes it as any engine does."""

    future: Streams

    def reset(self, *arguments: Any, **others: Any) -> None:
        super().reset(*arguments, **others)
        self._next = 0

    def step(self, buttons: Tensor, axes: Tensor, given: Streams | None = None) -> Frame:
        frame = super().step(buttons, axes, given)
        latents = {name: x[:, self._next] for name, x in self.future.items()}
        self._next += 1
        with torch.no_grad():
            return Frame(latents, {"video": self.decoders["video"].decode(latents["video"])}, frame.seconds)  # type: ignore[operator]


@pytest.fixture
def perfect(engine: Engine) -> Clips:
    made = Perfect(engine.network, engine.decoders, noise_levels=(1.0,))
    known = episodes(engine, split="train")
    windows = known.windows(3)
    made.future = known.latents(windows, slice(CONTEXT, None))
    return roll_out(made, known, windows, CONTEXT)


def test_a_perfect_model_is_perfect_by_every_measure(perfect: Clips) -> None:
    curves = horizon_curves(perfect, LPIPS())
    assert curves["psnr"] == [100.0] * HORIZON
    assert curves["lpips"] == pytest.approx([0.0] * HORIZON, abs=1e-6)
    assert max(curves["repeat_psnr"]) < 100
    assert flicker(perfect)["flicker"] == 0


def test_the_baseline_by_hand(engine: Engine) -> None:
    known = episodes(engine)
    clips = roll_out(engine, known, known.windows(2), CONTEXT)
    curves = horizon_curves(clips, LPIPS())
    decoder = load_decoder(AUTOENCODER)
    latents = known.windows(2)["latent"]
    for h in range(HORIZON):
        with torch.no_grad():
            pictures = [decoder.decode(latents[:, t]).clamp(-1, 1) for t in (CONTEXT - 1, CONTEXT + h)]  # type: ignore[operator]
        last, true = (((p + 1) * 127.5).round() / 255 for p in pictures)
        errors = (last - true).square().mean((1, 2, 3))
        assert curves["repeat_psnr"][h] == pytest.approx(float((-10 * errors.log10()).mean()), abs=1e-4)
        distance = LPIPS()(last * 2 - 1, true * 2 - 1).mean()
        assert curves["repeat_lpips"][h] == pytest.approx(float(distance), abs=1e-6)
    assert flicker(clips)["flicker"] != 0


def test_kept_pictures_are_the_truth(engine: Engine) -> None:
    kept, decoded = episodes(engine, "data/both"), episodes(engine)
    assert (kept.truth, decoded.truth) == ("rgb", "latent")
    windows = kept.windows(1)
    assert torch.equal(kept.pictures(windows), windows["rgb"])
    assert torch.equal(decoded.pictures(windows), kept.decode(windows["latent"]))
    assert kept.fps == 35 / STRIDE
    clips = roll_out(engine, kept, windows, CONTEXT)
    assert clips.reconstructed is not None
    curves = horizon_curves(clips, LPIPS())
    for h in range(HORIZON):
        errors = (clips.reconstructed[0, h].float() - windows["rgb"][0, CONTEXT + h]) / 255
        by_hand = float(-10 * errors.square().mean().log10())
        assert curves["reconstruction_psnr"][h] == pytest.approx(by_hand, abs=1e-4)


class Watched(Engine):
    """Keeps every conditioning that it is given."""

    def reset(self, context: Streams | None = None, controls: Controls | None = None, **others: Any) -> None:
        assert controls is not None
        assert controls.given
        self.given = [*controls.given["conditioning"].unbind(1)]
        super().reset(context, controls, **others)

    def step(self, buttons: Tensor, axes: Tensor, given: Streams | None = None) -> Frame:
        assert given is not None
        self.given.append(given["conditioning"])
        return super().step(buttons, axes, given)


class Blank(nn.Module):
    """An autoencoder whose pictures are grey."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, 1)

    def decode(self, latent: Tensor) -> Tensor:
        return latent.new_zeros(len(latent), 3, 8, 12)


def test_rollouts_continue_the_true_pictures_if_there_are_any(engine: Engine) -> None:
    kept, decoded = (episodes(engine, data) for data in ("data/both", LATENTS))
    windows = kept.windows(2)
    kept.start(engine, windows, CONTEXT)
    assert torch.equal(as_bytes(engine.snapshot().decoded["video"]), windows["rgb"][:, CONTEXT - 1])
    decoded.start(engine, windows, CONTEXT)
    expected = decoded.decode(windows["latent"][:, CONTEXT - 1 : CONTEXT])[:, 0]
    assert torch.equal(as_bytes(engine.snapshot().decoded["video"]), expected)


def test_rollouts_hand_the_dataset_s_conditioning_on(tmp_path: Path) -> None:
    decoder, network = Blank(), lively(**streams("conditioning"))
    mark = models.fingerprint(decoder.encoder)
    for name in network.inputs:
        getattr(network, f"{name}_encoder").copy_(torch.tensor(list(bytes.fromhex(mark)), dtype=torch.uint8))
    root = make_latents(tmp_path / "scenes", modalities=("latent", "conditioning_latent", "controls"), fingerprint=mark)
    known = Episodes(root, DatasetInfo.load(root), "train", network, decoder, 1, CONTEXT + HORIZON)
    windows = known.windows(2)
    engine = Watched(network, {"video": decoder}, noise_levels=(1.0,))
    roll_out(engine, known, windows, CONTEXT)
    assert torch.equal(torch.stack(engine.given, 1), windows["conditioning_latent"])
    rows = [given["conditioning_latent"] for _, given in long_rollout(engine, known, 4, 2, CONTEXT)]
    assert torch.equal(torch.stack(engine.given[CONTEXT:]), torch.stack(rows))
    without = make_latents(tmp_path / "without", fingerprint=mark)
    with refused("dataset.modalities", str(without), "no conditioning_latent", "latent, controls"):
        Episodes(without, DatasetInfo.load(without), "train", network, decoder, 1, CONTEXT + HORIZON)


def test_windows_are_spread_over_the_split(engine: Engine) -> None:
    known = episodes(engine, split="train")
    chosen = known.windows(3)["window"].tolist()
    assert chosen[0] == 0
    assert chosen[-1] == len(known.dataset) - 1
    assert len(known.windows(1000)["window"]) == len(known.dataset)


def test_the_stream_repeats_no_frame_and_ends_with_the_episode(engine: Engine) -> None:
    """One episode of 40 frames in windows of 15, of which the last ends with the episode: at frames 0, 14 and 25."""
    known = episodes(engine)
    whole = WindowDataset(LATENTS, "test", ["controls", "latent"], length=40)[0]
    first, last = [*range(STRIDE, 30, STRIDE)], [31, 33, 35, 37, 39]  # an odd one, since 39 is
    stored = [*first[CONTEXT - 1 :], *last, *first, *last]  # from its end it starts again
    for frame, given in zip(stored, known.stream(1, CONTEXT), strict=False):
        assert torch.equal(given["latent"][0], whole["latent"][frame]), frame
        assert torch.equal(given["axes"][0], whole["axes"][frame - STRIDE + 1 : frame + 1].sum(0))
        assert torch.equal(given["buttons"][0], whole["buttons"][frame - STRIDE + 1 : frame + 1].amax(0))


def test_long_rollouts_outlast_the_split_and_repeat_by_seed(engine: Engine) -> None:
    def roll(seed: int, data: str = LATENTS) -> list[Tensor]:
        rollout = long_rollout(engine, episodes(engine, data), 45, 2, CONTEXT, seed)
        return [generated for generated, _ in rollout]

    first = roll(0)
    assert len(first) == 45
    assert first[0].shape == (2, 3, 32, 48)
    assert all(torch.equal(a, b) for a, b in zip(first, roll(0), strict=True))
    assert not torch.equal(first[-1], roll(1)[-1])


def test_true_frames_do_not_drift_and_noise_does(engine: Engine) -> None:
    known = episodes(engine, split="train")
    meter, noisy = DriftMeter(known, 24), DriftMeter(known, 24)
    random = torch.Generator().manual_seed(0)
    kept = []
    for t, (_, given) in enumerate(long_rollout(engine, known, 24, 2, CONTEXT)):
        true = known.pictures({name: x[:, None] for name, x in given.items()})[:, 0]
        kept.append(true)
        meter.update(true, given)
        noise = torch.randint(0, 256, true.shape, generator=random, dtype=torch.uint8)
        noisy.update(noise if t >= 12 else true, given)
    drift, worse = meter.compute(), noisy.compute()
    assert drift is not None
    assert worse is not None
    assert (drift.segment, len(drift.distances)) == (12, 2)
    assert drift.distances[0] == pytest.approx(drift.true, rel=1e-6)
    features = EfficientNetLite0Features()
    every = torch.cat([features(known.pictures(known.dataset.batch([n]))[0] / 255) for n in range(len(known.dataset))])
    by_hand = frechet_distance(every, features(torch.cat(kept[12:]) / 255))  # all frames are less than 1000
    assert drift.distances[1] == pytest.approx(float(by_hand), rel=1e-3)
    assert worse.ratio > 2 * drift.ratio


def test_a_single_frame_has_no_distribution(engine: Engine) -> None:
    known = episodes(engine)
    meter = DriftMeter(known, 1)
    for generated, given in long_rollout(engine, known, 1, 1, CONTEXT):
        meter.update(generated, given)
    assert meter.compute() is None


def test_true_frames_follow_the_controls_and_other_frames_are_measured_apart(engine: Engine, perfect: Clips) -> None:
    reader = InverseDynamicsReader.load(INVERSE_DYNAMICS, engine.network, STRIDE)
    with torch.no_grad():
        reader.network.reader[-1].weight.mul_(100)  # after two steps it would read nothing from anything
    values = action_following(perfect, reader)
    assert values["axis_accuracy"] == values["axis_accuracy_true"]
    assert values["axis_accuracy_ratio"] == 1
    assert values["button_accuracy_ratio"] == values["action_accuracy_ratio"] == 1
    assert values["action_accuracy"] == (values["axis_accuracy"] + values["button_accuracy"]) / 2
    others = replace(perfect, generated=perfect.generated.flip(1, -1))
    changed = action_following(others, reader)
    assert changed["axis_accuracy_true"] == values["axis_accuracy_true"]
    for clips, found in ((perfect, values), (others, changed)):
        continued = torch.cat([clips.true[:, 1:CONTEXT], clips.generated], 1).float() / 127.5 - 1
        right = [
            direction(reader.network.label(continued[clip : clip + 1])[1][0, 2:])
            == direction(clips.axes[clip, CONTEXT:])
            for clip in range(3)
        ]
        assert found["axis_accuracy"] == pytest.approx(float(torch.stack(right).float().mean()))
    assert changed["axis_accuracy"] != values["axis_accuracy"]
    assert changed["axis_accuracy_ratio"] == changed["axis_accuracy"] / values["axis_accuracy"]


def direction(axes: Tensor) -> Tensor:
    return axes.sign() * (axes.abs() >= 1)


def test_latency_is_reported_by_part(engine: Engine) -> None:
    values = latency(engine, episodes(engine), frames=5, context=CONTEXT, warmup=1)
    for part in ("commit", "denoise", "decode", "total"):
        assert 0 < values[f"latency_{part}_p50"] <= values[f"latency_{part}_p95"]
    assert values["latency_total_p50"] > values["latency_decode_p50"]
    assert 0 < values["frames_per_second"] < 1 / values["latency_decode_p50"]


def test_audio_is_compared_standardised() -> None:
    network = WorldTransformer(**streams("audio", video=(4, 4, 6)), width=32, heads=2, depth=1)
    network.audio_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    network.audio_std.copy_(torch.tensor([0.5, 1.0, 2.0]))
    true = torch.randn(2, 4, 2, 3)
    generated = true + torch.tensor([1.0, 2.0, 2.0]) * torch.arange(4)[:, None, None]
    empty = torch.zeros(0)
    clips = Clips(empty, empty, empty, empty, {"audio": true}, {"audio": generated})
    # (1 / 0.5)^2, (2 / 1)^2, (2 / 2)^2 have the mean 3
    assert audio_latent_mse(clips, network) == pytest.approx([0.0, 3.0, 12.0, 27.0], rel=1e-5)


def test_the_strip_shows_the_right_frames(perfect: Clips) -> None:
    picture = strip(perfect, count=1)
    frame = perfect.true[0, CONTEXT].movedim(0, -1).numpy().repeat(5, 0).repeat(5, 1)  # one frame after the context
    height, width = frame.shape[:2]
    found = [
        (y, x)
        for y in range(0, picture.shape[0] - height + 1)
        for x in range(0, picture.shape[1] - width + 1)
        if (picture[y, x] == frame[0, 0]).all() and (picture[y : y + height, x : x + width] == frame).all()
    ]
    assert len(found) == 2  # true above, generated below
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(
    ("checkpoint", "stride", "code", "tokens"),
    [
        (WORLD_MODEL, STRIDE, "network.kind", ["WorldTransformer", "InverseDynamics"]),
        (INVERSE_DYNAMICS, 1, "network.stride", [f"stride {STRIDE}", "with 1"]),
    ],
)
def test_readers_that_do_not_fit_are_refused(
    engine: Engine, checkpoint: str, stride: int, code: str, tokens: list[str]
) -> None:
    with refused(code, checkpoint, *tokens):
        InverseDynamicsReader.load(checkpoint, engine.network, stride)


def test_a_reader_of_other_controls_is_refused() -> None:
    other = WorldTransformer(**streams(video=(4, 4, 6)), width=32, heads=2, depth=1, buttons=["JUMP"])
    with refused("dataset.controls", INVERSE_DYNAMICS, "buttons", "ATTACK, MOVE_LEFT, MOVE_RIGHT", "JUMP"):
        InverseDynamicsReader.load(INVERSE_DYNAMICS, other, STRIDE)


def test_datasets_that_do_not_fit_are_refused(engine: Engine) -> None:
    with refused("dataset.modalities", FOOTAGE, "no latent", "rgb, controls"):
        episodes(engine, FOOTAGE)
    other = models.load(WORLD_MODEL)
    assert isinstance(other, WorldTransformer)
    other.axes = ["mouse_y", "mouse_x"]
    with refused("dataset.controls", LATENTS, "axes mouse_x, mouse_y", "mouse_y, mouse_x"):
        Episodes(LATENTS, DatasetInfo.load(LATENTS), "test", other, engine.decoders["video"], STRIDE, 4)
    other.video_encoder.zero_()
    with refused("latents.encoder", LATENTS, "encoder 0000000000000000"):
        Episodes(LATENTS, DatasetInfo.load(LATENTS), "test", other, engine.decoders["video"], STRIDE, 4)


def test_a_decoder_that_decodes_nothing_is_refused() -> None:
    with refused("network.kind", INVERSE_DYNAMICS, "InverseDynamicsModel", "an autoencoder"):
        load_decoder(INVERSE_DYNAMICS)
