"""The recipe: what the loss weighs, what it masks, that it learns, and which latents it accepts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from owl import models
from owl.callbacks.nonfinite import NonFiniteGuard
from owl.data.datamodule import ShardDataModule
from owl.data.shards import DatasetInfo
from owl.flow_matching import add_noise
from owl.latents import check_encoder, encoder_of, load_latent_stats
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.nn import attention
from owl.nn.attention import NEVER, ChunkedAttention
from owl.recipes.world_model import NOISE_LEVELS, Forcing, WorldModel, document_time, masked_mean, step_generator
from tests.helpers.errors import refused
from tests.helpers.latents import FINGERPRINT, LATENT, TINY, dot_experiment, draw, lively, make_latents, streams
from tests.helpers.tiny import owl_here, quiet_trainer, write_config

FORCINGS: tuple[Forcing, ...] = ("teacher", "diffusion", "full")
EVERYTHING = streams("audio", "motion")
MOTION = json.dumps(streams("motion")["streams"]["motion"])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world_model")
    data = make_latents(folder / "data", (12, 12, 12, 12))
    write_config(folder / "tiny.yaml", dot_experiment(data, max_steps=3))
    return folder


def fit(lab: Path, name: str, *options: str) -> dict[str, float]:
    assert owl_here("fit", "--config", "tiny.yaml", "--name", name, *options, cwd=lab) == 0
    return json.loads((lab / "runs" / name / "metrics.json").read_text())


def batch(network: WorldTransformer, frames: int = 6, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    latents, _, controls = draw(network, frames, batch, seed)
    stored = {network.latent_modalities[name]: x for name, x in latents.items()}
    window = torch.arange(batch) + 10 * seed
    return stored | {"buttons": controls.buttons, "axes": controls.axes, "window": window}


def recipe(network: WorldTransformer | None = None, **arguments: Any) -> WorldModel:
    """A recipe without a trainer, which keeps what it logs in ``logged``."""
    made = WorldModel(network or lively(), **arguments)
    made.logged = {}
    made.log = lambda name, value, **options: made.logged.update({name: value})
    made.log_dict = lambda values, **options: made.logged.update(values)
    return made


def gradient(made: WorldModel, data: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made.network.train().zero_grad()
    made.training_step(data, 0).backward()
    return {name: p.grad.clone() for name, p in made.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("forcing", FORCINGS)
def test_every_weighted_stream_reaches_the_gradient(forcing: Forcing) -> None:
    data = batch(lively(**EVERYTHING))
    made = recipe(lively(**EVERYTHING), forcing=forcing)
    plain = gradient(made, data)
    logged = made.logged
    assert sorted(logged) == ["train/audio", "train/loss", "train/motion", "train/video"]
    total = sum(logged[f"train/{name}"] for name in ("video", "audio", "motion"))
    torch.testing.assert_close(logged["train/loss"], total)
    for name in ("audio", "motion"):
        declared = {n: s | ({"weight": 3.0} if n == name else {}) for n, s in EVERYTHING["streams"].items()}
        weighted = gradient(recipe(lively(streams=declared), forcing=forcing), data)
        bias = f"{name}_out.linear.bias"
        torch.testing.assert_close(weighted[bias], 3 * plain[bias])
        assert not torch.allclose(weighted["video_in.weight"], plain["video_in.weight"], rtol=1e-3)
        for other in {"video", "audio", "motion"} - {name}:
            assert torch.equal(weighted[f"{other}_out.linear.bias"], plain[f"{other}_out.linear.bias"])


@pytest.mark.parametrize("forcing", FORCINGS)
def test_everything_is_trained_the_null_control_by_dropout_alone(forcing: Forcing) -> None:
    names = {name for name, _ in lively(**EVERYTHING).named_parameters()}
    dropped = gradient(recipe(lively(**EVERYTHING), forcing=forcing, control_dropout=0.5), batch(lively(**EVERYTHING)))
    assert {name for name, x in dropped.items() if x.any()} == names
    kept = gradient(recipe(lively(**EVERYTHING), forcing=forcing, control_dropout=0.0), batch(lively(**EVERYTHING)))
    assert names - {name for name, x in kept.items() if x.any()} == {"controls.unknown"}
    only = gradient(recipe(lively(), forcing=forcing, control_dropout=1.0), batch(lively()))
    assert only["controls.unknown"].any()
    assert not any(x.any() for name, x in only.items() if name.startswith(("controls.first", "controls.second")))


def presented(made: WorldModel, data: dict[str, Tensor]) -> dict[str, Any]:
    """What the network is given in a training step."""
    seen: dict[str, Any] = {}
    names = ("latents", "level", "controls", "frames")

    def note(network: WorldTransformer, arguments: tuple, options: dict[str, Any]) -> None:
        seen.update(zip(names, arguments, strict=True), **options)

    handle = made.network.register_forward_pre_hook(note, with_kwargs=True)
    made.training_step(data, 0)
    handle.remove()
    return seen


def test_noise_belongs_to_seed_step_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(step: int, window: int, seed: int) -> float:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        return torch.rand((), generator=step_generator(step, window, torch.device("cpu"))).item()

    numbers = [(step, window, seed) for step in range(3) for window in range(3) for seed in range(3)]
    drawn = [noise(*three) for three in numbers]
    assert len(set(drawn)) == len(numbers)
    assert [noise(*three) for three in numbers] == drawn


def test_noise_is_drawn_on_the_device_and_the_windows_numbers_are_read_without_it() -> None:
    made = recipe(lively(**EVERYTHING)).to("meta")
    moved = made.transfer_batch_to_device(batch(lively(**EVERYTHING)), made.device, 0)
    assert {name for name, x in moved.items() if not x.is_meta} == {"window"}
    with pytest.raises(RuntimeError, match=r"(?i)meta"):  # on which there are no generators
        made.training_step(moved, 0)


@pytest.mark.parametrize("forcing", FORCINGS)
def test_attention_is_built_once_for_clips_and_again_for_every_packing(
    forcing: Forcing, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Tensor] = []

    def counted(seen: Tensor, tokens: int) -> attention.Attend:
        built.append(seen)
        return ChunkedAttention(seen, tokens)

    monkeypatch.setattr(attention, "training_attention", counted)
    attention._cached_clip_frames.cache_clear()
    made, data = recipe(forcing=forcing), batch(lively())
    windows = len(set(made.network.windows))
    with torch.inference_mode():
        made.validation_step(data, 0)
    first = gradient(made, data)  # with what was built in inference mode
    for _ in range(2):
        torch.testing.assert_close(gradient(made, data), first, atol=0, rtol=0)
    assert len(built) == windows
    assert not any(seen.is_inference() for seen in built)
    longer = batch(lively(), frames=7)
    gradient(made, longer)
    assert len(built) == 2 * windows
    for count in (3, 4):
        gradient(made, data | {"document": torch.tensor([[0] * 3 + [1] * 3, [0] * 6])})
        assert len(built) == count * windows
    assert not torch.equal(built[-1], built[0])
    gradient(made, data)
    assert len(built) == 4 * windows


def test_each_forcing_presents_a_clip_in_its_own_way() -> None:
    data = batch(lively(), frames=400)
    teacher = presented(recipe(forcing="teacher", context_noise=0.2, control_dropout=0.3), data)
    assert teacher["level"][:, :400].max() <= 0.2 < teacher["level"][:, 400:].max()
    assert teacher["level"][:, :400].mean().item() == pytest.approx(0.1, abs=0.01)
    assert teacher["controls"].known.float().mean().item() == pytest.approx(0.7, abs=0.05)
    assert not torch.equal(teacher["controls"].known[:, :400], teacher["controls"].known[:, 400:])
    assert torch.equal(teacher["frames"].copy, torch.tensor([0] * 400 + [1] * 400))
    assert torch.equal(teacher["controls"].axes, data["axes"].repeat(1, 2, 1))
    diffusion = presented(recipe(forcing="diffusion", logit_mean=1.0), data)
    assert diffusion["causal"]
    assert diffusion["level"].unique().numel() > 790
    assert torch.logit(diffusion["level"]).mean().item() == pytest.approx(1, abs=0.1)
    full = presented(recipe(forcing="full"), data)
    assert not full["causal"]
    assert (full["level"] == full["level"][:, :1]).all()
    assert full["level"].unique().numel() == 2
    clean = presented(recipe(forcing="teacher", context_noise=0.0), data)
    torch.testing.assert_close(clean["latents"]["video"][:, :400], data["latent"])


@pytest.mark.parametrize("forcing", FORCINGS)
def test_a_stream_with_dropout_is_hidden_in_some_of_the_frames_to_predict(forcing: Forcing) -> None:
    frames, declared = 400, streams("motion")["streams"]
    data = batch(lively(streams=declared), frames)
    shown = presented(recipe(lively(streams=declared), forcing=forcing), data)
    declared["motion"] |= {"dropout": 0.25}
    made = recipe(lively(streams=declared), forcing=forcing)
    found = presented(made, data)
    assert torch.equal(found["latents"]["video"], shown["latents"]["video"])  # the same noise
    hidden = ~found["latents"]["motion"].flatten(2).any(2)
    assert hidden[:, -frames:].float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert not hidden[:, :-frames].any()  # the context of a rollout has its motion
    expected = shown["latents"]["motion"].masked_fill(hidden[..., None, None, None], 0)
    assert torch.equal(found["latents"]["motion"], expected)
    plain = recipe(lively(streams=streams("motion")["streams"]), forcing=forcing)
    assert measured(made, data) == measured(plain, data)  # nothing is hidden in validation


@pytest.mark.parametrize("forcing", FORCINGS)
def test_the_loss_is_that_of_the_noisy_frames(forcing: Forcing) -> None:
    """Frame by frame from the definition: x_t of the frame at hand, after the context that its forcing shows it."""
    network = lively(**EVERYTHING)
    made, frames = recipe(network, forcing=forcing), 5
    latents, level, controls = draw(network, frames)
    context_level = draw(network, frames, seed=1)[1] * 0.2
    noise, context_noise = draw(network, frames, seed=2)[0], draw(network, frames, seed=3)[0]
    with torch.no_grad():
        found = made.losses(latents, controls, None, level, context_level, noise, context_noise)
        for t in range(frames):
            shown = frames if forcing == "full" else t + 1
            x = {name: add_noise(latents[name], noise[name], level)[:, :shown] for name in latents}
            levels = level[:, :shown].clone()
            if forcing == "teacher":
                for name in x:
                    x[name][:, :t] = add_noise(latents[name], context_noise[name], context_level)[:, :t]
                levels[:, :t] = context_level[:, :t]
            known = Controls(controls.buttons[:, :shown], controls.axes[:, :shown])
            velocity = network(x, levels, known, causal=forcing != "full")
            for name, v in velocity.items():
                expected = (v[0, t] - (noise[name] - latents[name])[0, t]).square().mean()
                torch.testing.assert_close(found[name][0, t], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("forcing", FORCINGS)
def test_packed_clips_weigh_by_their_frames_and_padding_by_nothing(forcing: Forcing) -> None:
    made = recipe(forcing=forcing)
    latents, controls, _ = made.inputs(batch(made.network, 8))
    document = torch.tensor([[0] * 3 + [1] * 3 + [-1] * 2, [0] * 8])
    level, context_level = torch.full((2, 8), 0.5), torch.full((2, 8), 0.1)
    noise, context_noise = ({"video": torch.randn(2, 8, *LATENT)} for _ in range(2))

    def losses(frames: slice, item: int | slice, document: Tensor | None) -> Tensor:
        def cut(x: Tensor) -> Tensor:
            return x[item : item + 1, frames] if isinstance(item, int) else x[item, frames]

        def streams(x: Streams) -> Streams:
            return {name: cut(tensor) for name, tensor in x.items()}

        shown = Controls(cut(controls.buttons), cut(controls.axes))
        levels = (cut(level), cut(context_level))
        return made.losses(streams(latents), shown, document, *levels, streams(noise), streams(context_noise))["video"]

    with torch.no_grad():
        together = losses(slice(0, 8), slice(0, 2), document)
        apart = [losses(slice(0, 3), 0, None), losses(slice(3, 6), 0, None), losses(slice(0, 8), 1, None)]
    expected = torch.cat([x.flatten() for x in apart])
    torch.testing.assert_close(together[document != NEVER], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked_mean(together, document), expected.mean(), atol=1e-5, rtol=1e-5)
    data = batch(made.network, 8) | {"document": document}
    before = gradient(made, data)
    data["latent"][0, 6:] = 1000
    data["axes"][0, 6:] = -1000
    torch.testing.assert_close(gradient(made, data), before, atol=0, rtol=0)


def test_times_start_again_with_every_document() -> None:
    document = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [5, 5, 5, 5, 5, 5, 5, 5], [-1] * 8])
    assert document_time(document).tolist() == [[0, 1, 2, 0, 0, 1, -1, -1], [*range(8)], [-1] * 8]
    assert masked_mean(torch.full((1, 8), torch.inf).where(document[:1] == -1, 2.0), None).isinf()
    assert masked_mean(torch.ones(1, 8), document[2:]) == 0  # nothing but padding


def measured(made: WorldModel, data: dict[str, Tensor], parts: Sequence[slice] = (slice(None),)) -> dict[str, Tensor]:
    """What validation logs, of batches that are parts of one."""
    made.logged.clear()
    with torch.no_grad():
        for part in parts:
            made.validation_step({name: x[part] for name, x in data.items()}, 0)
    made.on_validation_epoch_end()
    return dict(made.logged)


@pytest.mark.parametrize("forcing", FORCINGS)
def test_validation_measures_the_same_twice_and_draws_nothing_from_training(forcing: Forcing) -> None:
    network = lively(streams=EVERYTHING["streams"] | {"audio": {"shape": [2, 3], "weight": 2.0}})
    made, data = recipe(network, forcing=forcing), batch(network, batch=4)
    state = torch.get_rng_state()
    first = measured(made, data)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert measured(made, data) == first
    for name in network.streams:
        levels = torch.stack([first[f"val/{name}_t_{t:.1f}"] for t in NOISE_LEVELS])
        torch.testing.assert_close(first[f"val/{name}"], levels.mean())
    torch.testing.assert_close(first["val/loss"], first["val/video"] + 2 * first["val/audio"] + first["val/motion"])
    divided = measured(made, data, (slice(0, 1), slice(1, 4)))
    torch.testing.assert_close(divided, first, atol=1e-5, rtol=1e-5)  # however windows are divided into batches
    data["document"] = torch.tensor([[0] * 6, [0] * 3 + [-1] * 3, [0] * 2 + [1] * 4, [-1] * 6])
    padded = measured(made, data)
    torch.testing.assert_close(measured(made, data, (slice(0, 1), slice(1, 4))), padded, atol=1e-5, rtol=1e-5)
    del data["document"]
    assert measured(made, data | {"window": data["window"] + 1})["val/loss"] != first["val/loss"]


@pytest.mark.parametrize("forcing", FORCINGS)
def test_a_moving_dot_is_learnt_in_seconds(lab: Path, forcing: Forcing) -> None:
    torch.manual_seed(0)
    made = recipe(WorldTransformer(**TINY), forcing=forcing)
    info = DatasetInfo.load(lab / "data")
    load_latent_stats(made.network, info.modalities, "data")
    data = ShardDataModule(
        str(lab / "data"), ["latent", "controls"], length=8, batch_size=8, num_workers=0, validation_windows=4
    )
    data.setup()
    optimizer = torch.optim.AdamW(made.network.parameters(), lr=5e-3)
    (validation,) = data.val_dataloader()
    before = measured(made, validation)["val/loss"]
    made.network.train()
    for _ in range(70):
        for sample in data.train_dataloader():
            loss = made.training_step(sample, 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert measured(made, validation)["val/loss"] < 0.6 * before


def test_a_scene_that_is_given_is_trained_on(tmp_path: Path) -> None:
    modalities = ["latent", "conditioning_latent", "controls"]
    make_latents(tmp_path / "data", modalities=modalities)
    experiment = dot_experiment(tmp_path / "data", max_steps=3)
    experiment["data"]["init_args"] |= {"modalities": modalities}
    experiment["model"]["init_args"]["network"]["init_args"] |= streams("conditioning")
    write_config(tmp_path / "scene.yaml", experiment)
    assert owl_here("fit", "--config", "scene.yaml", cwd=tmp_path) == 0
    network = models.load(tmp_path / "runs/scene/checkpoints/last.ckpt")
    assert network.conditioning_in.weight.any()  # it started at zero
    assert encoder_of(network, "conditioning") == FINGERPRINT


def test_a_run_keeps_the_statistics_and_the_encoder_of_its_latents(lab: Path) -> None:
    metrics = fit(lab, "plain")
    assert {f"val/video_t_{t:.1f}" for t in NOISE_LEVELS} | {"val/video", "val/loss"} <= metrics.keys()
    network = models.load(lab / "runs/plain/checkpoints/last.ckpt")
    assert isinstance(network, WorldTransformer)
    description = DatasetInfo.load(lab / "data").modalities["latent"]
    torch.testing.assert_close(network.video_mean, torch.tensor(description["mean"]))
    torch.testing.assert_close(network.video_std, torch.tensor(description["std"]))
    assert encoder_of(network, "video") == FINGERPRINT
    assert owl_here("export", "runs/plain/checkpoints/last.ckpt", "exported", cwd=lab) == 0
    exported = models.load(lab / "exported")
    given = draw(network, 4)
    with torch.no_grad():
        torch.testing.assert_close(exported(*given), network(*given), atol=0, rtol=0)
    assert owl_here("test", "--config", "tiny.yaml", "--name", "plain", "--ckpt_path", "last", cwd=lab) == 0
    tested = json.loads((lab / "runs/plain/test.json").read_text())
    assert "test/video_t_0.5" in tested


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_latents_of_another_encoder_are_refused(lab: Path, command: str) -> None:
    if not (lab / "runs/trained").exists():
        fit(lab, "trained")
        make_latents(lab / "other", fingerprint="ff00112233445566")
    options = ["--config", "tiny.yaml", "--name", "trained", "--ckpt_path", "last", "--data.path", str(lab / "other")]
    options += ["--trainer.max_steps", "5"] if command == "fit" else []
    with refused("latents.encoder", str(lab / "other"), "encoder ff00112233445566", f"encoder {FINGERPRINT}"):
        owl_here(command, *options, cwd=lab)


def test_more_footage_of_the_same_encoder_keeps_the_statistics_of_the_first(lab: Path) -> None:
    fit(lab, "longer")
    before = models.load(lab / "runs/longer/checkpoints/last.ckpt")
    make_latents(lab / "more", (12, 9, 20, 12, 12))
    fit(lab, "longer", "--ckpt_path", "last", "--data.path", str(lab / "more"), "--trainer.max_steps", "5")
    after = models.load(lab / "runs/longer/checkpoints/last.ckpt")
    assert torch.equal(after.video_mean, before.video_mean)
    assert not torch.equal(after.video_in.weight, before.video_in.weight)


@pytest.mark.parametrize(
    ("options", "code", "tokens"),
    [
        (
            ["--model.network.buttons", '["ATTACK"]'],
            "dataset.controls",
            ["ATTACK, MOVE_LEFT, MOVE_RIGHT", "has ATTACK;"],
        ),
        (["--model.network.axes", "[]"], "dataset.controls", ["axes mouse_x, mouse_y", "none;"]),
        (["--model.network.streams.video.shape", "[2, 4, 4]"], "latents.shape", ["[2, 4, 6]", "[2, 4, 4]"]),
        (
            ["--model.network.streams.motion", MOTION],
            "dataset.modalities",
            ["data has no motion_latent", "motion input", "holds latent, controls"],
        ),
        (["--data.modalities", '["latent"]'], "recipe.dataset", ["no controls", "[latent, controls]"]),
        (["--data.modalities", '["controls"]'], "recipe.dataset", ["no latent", "[latent, controls]"]),
        (["--model.control_dropout", "1.5"], "recipe.arguments", ["control_dropout is 1.5", "0 to 1"]),
        (["--model.context_noise", "-0.1"], "recipe.arguments", ["context_noise is -0.1", "0 to 1"]),
    ],
)
def test_what_does_not_fit_is_reported(lab: Path, options: list[str], code: str, tokens: list[str]) -> None:
    with refused(code, *tokens):
        fit(lab, "unfit", *options)


def test_a_channel_that_says_nothing_is_reported(lab: Path) -> None:
    modalities = DatasetInfo.load(lab / "data").modalities
    modalities["latent"]["std"] = [1.0, 0.0]
    with refused("latents.statistics", "latent of data", "of 0 in channel 1"):
        load_latent_stats(lively(), modalities, "data")
    network = lively()
    modalities["latent"]["std"] = [1.0, 1.0]
    load_latent_stats(network, modalities, "data")
    check_encoder(network, modalities, "data")


def test_nan_in_latents_stops_a_run_with_its_windows_named(lab: Path) -> None:
    class Damaged(ShardDataModule):
        def on_before_batch_transfer(self, data: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
            data["latent"][1, 2, 0, 0, 0] = torch.nan
            return data

    data = Damaged(str(lab / "data"), ["latent", "controls"], length=5, batch_size=4, num_workers=0)
    trainer = quiet_trainer(
        lab,
        max_steps=2,
        callbacks=[NonFiniteGuard()],
    )
    with refused("loss.non-finite", "loss became nan", "step 1"):
        trainer.fit(WorldModel(WorldTransformer(**TINY)), data)
    (note,) = lab.glob("nonfinite-*.json")
    assert "episode-00" in note.read_text()


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    data = {name: x[rank::2] for name, x in batch(lively(), batch=7).items()}
    answers = {name: value.item() for name, value in measured(recipe(), data).items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    alone = measured(recipe(), batch(lively(), batch=7))
    mp.start_processes(process, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == pytest.approx({name: value.item() for name, value in alone.items()}, rel=1e-5)
