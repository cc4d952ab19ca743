"""Every modality has its loss and its metrics, what was not measured counts nowhere, and scales are the dataset's."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from torch import Tensor

from owl import models
from owl.data import codecs
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardWriter
from owl.data.windows import SkippedEpisodeWarning, WindowDataset
from owl.losses.lpips import LPIPS
from owl.models.multimodal_autoencoder import MultimodalAutoencoder
from owl.pixels import UNKNOWN
from owl.recipes.multimodal_vae import MultimodalVAE, Weights, draw_versions, l1_where_known
from tests.helpers.autoencoders import save_autoencoder
from tests.helpers.errors import check_error, refused
from tests.helpers.shards import DESCRIPTIONS, encode, make_dataset, render
from tests.helpers.tiny import owl_here, tiny_experiment, write_config

TERMS = [field.name for field in fields(Weights)]
NONE = dict.fromkeys(TERMS, 0.0)
SHAPE = {"size": (32, 48), "latent_size": (4, 6), "latent_channels": 4, "widths": [16, 16, 16], "blocks": [1, 1, 1]}
ALL = ("rgb", "depth", "flow")


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS()


def recipe(lpips: LPIPS, weights: dict[str, float], modalities: tuple[str, ...] = ALL, **options: Any) -> MultimodalVAE:
    torch.manual_seed(1)
    network = MultimodalAutoencoder(modalities, **SHAPE)
    network.read_scales(DESCRIPTIONS, "data/x")
    made = MultimodalVAE(network, Weights(**weights), lpips, **options)
    made.log = made.log_dict = lambda *arguments, **keywords: None  # no trainer is attached
    return made


def batch(size: int = 2, frames: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "rgb": torch.randint(0, 256, (size, frames, 3, 32, 48), dtype=torch.uint8, generator=generator),
        "depth": torch.randint(1, 256, (size, frames, 1, 32, 48), generator=generator) / 255,
        "flow": torch.randn(size, frames, 2, 16, 24, generator=generator),
    }


def gradient(made: MultimodalVAE, given: dict[str, Tensor] | None = None) -> Tensor:
    """All gradients of one training step as a vector."""
    torch.manual_seed(3)
    made.zero_grad()
    made.training_step(batch() if given is None else given, 0).backward()
    parameters = made.network.parameters()
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("term", TERMS)
def test_every_weight_changes_the_gradient_in_proportion(lpips: LPIPS, term: str) -> None:
    base = NONE | {"l1": 1.0}
    without = gradient(recipe(lpips, base))
    once, twice = (gradient(recipe(lpips, base | {term: base[term] + weight})) for weight in (0.5, 1.0))
    change = once - without
    assert change.norm() > 1e-4 * without.norm()
    torch.testing.assert_close(twice - without, 2 * change, rtol=1e-3, atol=1e-5)


def test_image_terms_compare_the_rgb_alone(lpips: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(LPIPS, "forward", lambda self, x, y: seen.append((x, y)) or x.mean(dim=(1, 2, 3)))
    made, given = recipe(lpips, NONE | {"lpips": 1.0}, sample=False), batch()
    gradient(made, given)
    ((x, y),) = seen
    assert x.shape == (4, 3, 32, 48)
    torch.testing.assert_close(y, given["rgb"].flatten(0, 1) / 127.5 - 1)
    head = made.network.decoder.head.bias.grad.view(7, -1).norm(dim=1)
    assert (head[:3] > 0).all()
    assert not head[3:].any()


def test_some_frames_are_encoded_from_rgb_alone_and_compared_with_everything(lpips: LPIPS) -> None:
    shown: list[Tensor] = []
    for probability in (0.0, 0.5, 1.0):
        made, given = recipe(lpips, NONE | {"depth": 1.0, "flow": 1.0}, modality_dropout=probability), batch(32)
        made.network.encoder.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
        terms = made.terms(made.picture(given))
        assert terms["depth"] > 0.1
        assert terms["flow"] > 0.01
    alone = [(picture[:, 3:] == UNKNOWN).all(dim=(1, 2, 3)).float().mean().item() for picture in shown]
    assert alone[0] == 0
    assert 0.3 < alone[1] < 0.7
    assert alone[2] == 1
    for picture in shown:
        torch.testing.assert_close(picture[:, :3], shown[0][:, :3])


def test_the_mean_error_is_that_of_measured_pixels() -> None:
    picture = torch.tensor([0.5, UNKNOWN, -0.5, UNKNOWN]).view(1, 1, 2, 2)
    found = torch.tensor([0.0, 9.0, -0.25, -9.0]).view(1, 1, 2, 2).requires_grad_()
    error = l1_where_known(found, picture)
    assert error.item() == pytest.approx(0.375)
    error.backward()
    assert found.grad.flatten().tolist() == [-0.5, 0.0, 0.5, 0.0]
    assert l1_where_known(found, torch.full_like(picture, UNKNOWN)) == 0


def damaged(name: str, value: float, frames: slice) -> dict[str, Tensor]:
    given = batch()
    given[name][:, frames] = value
    return given


@pytest.mark.parametrize(("name", "value"), [("depth", 0.0), ("flow", torch.nan)])
@pytest.mark.parametrize("frames", [slice(0, 1), slice(None)])
def test_depth_of_zeros_and_flow_of_nan_count_nowhere(lpips: LPIPS, name: str, value: float, frames: slice) -> None:
    made = recipe(lpips, {})
    given = damaged(name, value, frames)
    found = gradient(made, given)
    assert found.isfinite().all()
    terms = made.terms(made.picture(given))
    assert (terms[name] == 0) == (frames == slice(None))
    made.measure(given, "val")
    for measures in (made.others, made.others_from_rgb):
        for other, measure in measures.items():
            known = not (other == name and frames == slice(None))
            assert all(metric.compute().isfinite().item() == known for metric in measure.named().values())


def test_what_is_predicted_from_rgb_alone_has_its_own_metrics(lpips: LPIPS) -> None:
    made, given = recipe(lpips, {}), batch()
    made.measure(given, "val")
    picture = made.picture(given)
    true = given["flow"].flatten(0, 1)
    found = {}
    for end, shown in (("", picture), ("_from_rgb", made.network.rgb_only(picture))):
        with torch.no_grad():
            values = made.network.values(made.network(shown, sample=False)[0])
        error = (values["rgb"].clamp(-1, 1) - picture[:, :3]).square().mean((1, 2, 3)) / 4
        found[f"psnr{end}"] = (-10 * error.log10()).mean()
        flow = torch.nn.functional.avg_pool2d(values["flow"], 2)
        found[f"flow_epe{end}"] = (flow - true).norm(dim=1).mean()
        distance = (given["depth"].flatten(0, 1) * 255 + 1.2) * 7.143
        found[f"depth_abs_rel{end}"] = ((values["depth"] - distance).abs() / distance).mean()
    metrics = {"psnr": made.metrics.psnr, "psnr_from_rgb": made.psnr_from_rgb}
    for end, measures in (("", made.others), ("_from_rgb", made.others_from_rgb)):
        for measure in measures.values():
            metrics |= {f"{name}{end}": metric for name, metric in measure.named().items()}
    for name, expected in found.items():
        torch.testing.assert_close(metrics[name].compute(), expected, rtol=1e-4, atol=1e-5)
    assert len({round(value.item(), 4) for value in found.values()}) == 6


def test_a_picture_shows_each_modality_and_marks_what_is_unknown(lpips: LPIPS) -> None:
    made = recipe(lpips, {})
    (name, picture), *others = made.media(damaged("depth", 0.0, slice(0, 1))).items()
    assert (name, others) == ("reconstruction", [])
    assert picture.dtype == "uint8"
    assert picture.shape[0] > 9 * 96
    network = made.network
    four = recipe(lpips, {}, ("rgb", "depth")).media(batch())["reconstruction"]
    assert four.shape[0] < picture.shape[0]
    original = network.picture(torch.zeros(1, 3, 32, 48), torch.ones(1, 1, 32, 48), None)
    unknown, known = (draw_versions(network, {"original": one}) for one in (original, original.clamp(min=-1)))
    assert (unknown != known).any()


# --- through the command line


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, and a run on it that starts from an autoencoder of pictures."""
    folder = tmp_path_factory.mktemp("multimodal")
    experiment = tiny_experiment(make_dataset(folder / "data", frames=6, size=(32, 48)), max_steps=2)
    experiment["data"]["init_args"] |= {"modalities": list(ALL), "validation_windows": 3, "batch_size": 2}
    network = {"class_path": "owl.models.multimodal_autoencoder.MultimodalAutoencoder", "init_args": SHAPE}
    plain = json.loads(json.dumps(network))  # lists for tuples
    options = {"network": plain, "weights": {"lpips": 0.0}, "warmup_steps": 2}
    experiment["model"] = {"class_path": "owl.recipes.multimodal_vae.MultimodalVAE", "init_args": options}
    write_config(folder / "tiny.yaml", experiment)
    save_autoencoder(folder / "autoencoder")
    start = ("--model.start", "autoencoder", "--model.network.init_args.patch", "2")
    assert owl_here("fit", "--config", "tiny.yaml", *start, cwd=folder) == 0
    return folder


def checkpoint(lab: Path) -> str:
    return str(lab / "runs" / "tiny" / "checkpoints" / "last.ckpt")


def test_both_ways_of_encoding_are_measured_and_drawn(lab: Path) -> None:
    run = lab / "runs" / "tiny"
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    for name in ("psnr", "depth_abs_rel", "depth_delta", "flow_epe", "flow_epe_of_zero"):
        assert f"val/{name}" in metrics
        assert f"val/{name}_from_rgb" in metrics
    assert metrics["val/flow_epe_of_zero"] == metrics["val/flow_epe_of_zero_from_rgb"] > 0
    assert {"train/l1", "train/depth", "train/flow", "train/kl"} <= metrics.keys()
    (picture,) = run.glob("media/step-0000002/*.png")
    assert cv2.imread(str(picture)).std() > 10
    assert picture.name in (run / "report.md").read_text("utf-8")


def test_the_scales_of_the_dataset_are_in_the_checkpoint_and_others_are_refused(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab)  # which `start` is relative to
    network = models.load(checkpoint(lab))
    assert network.config["depth_scale"] == [7.143, 1.2, False]
    assert network.config["flow_scale"] == 0.1
    assert MultimodalVAE.load_from_checkpoint(checkpoint(lab)).network.config == network.config
    other = make_dataset(tmp_path / "other", frames=6, size=(32, 48))
    info = DatasetInfo.load(other)
    info.modalities["flow"] = info.modalities["flow"] | {"scale": 0.2}
    info.save(other)
    for command in ("fit", "validate"):
        with refused("network.scale", "flow_scale", "0.1", "0.2"):
            name = ("--name", "tiny") if command == "fit" else ()
            options = ("--data.path", other, "--ckpt_path", checkpoint(lab), "--trainer.max_steps", "3")
            owl_here(command, "--config", "tiny.yaml", *name, *options, cwd=lab)
    with refused("network.scale", "flow_scale", str(other)):
        owl_here("data", "encode", checkpoint(lab), other, tmp_path / "latents", cwd=lab)


def test_its_latents_are_encoded_from_all_modalities(lab: Path, tmp_path: Path) -> None:
    assert owl_here("data", "encode", checkpoint(lab), lab / "data", tmp_path / "latents", cwd=lab) == 0
    network = models.load(checkpoint(lab))
    found = WindowDataset(tmp_path / "latents", "validation", ("latent",))[3]["latent"]
    parts = WindowDataset(lab / "data", "validation", ALL)[3]
    with torch.no_grad():
        latent = network.encode(parts["rgb"] / 127.5 - 1, parts["depth"], parts["flow"]).mean
    torch.testing.assert_close(found, latent, atol=2e-3, rtol=0)


def test_a_resumed_run_equals_an_uninterrupted_one(lab: Path) -> None:
    def fit(name: str, *options: str) -> dict[str, Any]:
        assert owl_here("fit", "--config", "tiny.yaml", "--name", name, "--model.final_lr=1", *options, cwd=lab) == 0
        return torch.load(lab / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)

    dropout = "--model.modality_dropout=0.5"
    whole = fit("whole", dropout)
    fit("stopped", dropout, "--trainer.max_steps=1")
    resumed = fit("stopped", dropout, "--ckpt_path", "last")
    for key in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)


def test_a_dataset_without_the_modality_is_refused(lab: Path, tmp_path: Path) -> None:
    """Whether the data module asks for it or not."""
    missing, held = "flow", ("rgb", "depth", "controls")
    data = str(make_dataset(tmp_path / "data", frames=6, size=(32, 48), modalities=held))
    asked: list[Callable[[], Any]] = [
        lambda: owl_here("fit", "--config", "tiny.yaml", "--name", "x", "--data.path", data, cwd=lab),
        lambda: owl_here(
            *("fit", "--config", "tiny.yaml", "--name", "x", "--data.path", data, "--data.modalities=[rgb]"), cwd=lab
        ),
    ]
    for number, fit in enumerate(asked):
        with pytest.raises(Exception, match=missing) as caught:
            fit()
        code = ("windows.modalities", "dataset.modalities")[number]
        check_error(caught.value, code, data, missing, ", ".join(held))
    with refused("recipe.dataset", "depth", "missing"):
        made = recipe(LPIPS(), {})
        made.training_step({"rgb": batch()["rgb"]}, 0)


def test_an_episode_that_lacks_a_modality_in_some_frames_is_skipped(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", frames=5, size=(32, 48), modalities=ALL)
    arrays = render(0, 5, (32, 48))
    with ShardWriter(root, 0) as writer:
        for frame in range(5):
            kept = [name for name in ALL if name != "depth" or frame < 3]
            writer.write(
                "episode-000", frame, {DESCRIPTIONS[n]["extension"]: encode(n, arrays[n][frame]) for n in kept}
            )
    write_index(root)
    with pytest.warns(SkippedEpisodeWarning, match=r"episode-000 is skipped: .*rgb 5, depth 3, flow 5 of 5"):
        windows = WindowDataset(root, "train", ALL)
    assert {windows.describe(number)["episode"] for number in range(len(windows))} == {"episode-001"}
    assert len(WindowDataset(root, "train", ("rgb", "flow"))) == 10


def test_flow_of_nan_is_not_stored() -> None:
    flow = torch.zeros(4, 6, 2).numpy()
    flow[1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        codecs.encode_flow(flow)
