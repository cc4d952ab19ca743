"""Every weight acts, shortcuts learn from two halves, the latent is used, and resuming is exact."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.flow_matching import SMALLEST_STEP
from owl.losses.lpips import LPIPS
from owl.models.diffusion_decoder import DiTDecoder
from owl.nn.frozen import trained
from owl.recipes.diffusion_decoder import DiffusionDecoder, Weights
from tests.helpers.autoencoders import drawn, save_autoencoder, tiny_decoder
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, write_config

TERMS = [field.name for field in fields(Weights)]
NONE = dict.fromkeys(TERMS, 0.0)
TINY = {"patch": [8, 8], "width": 32, "depth": 1, "heads": 2, "mlp_ratio": 2.0}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion_decoder")
    make_dataset(folder / "footage", episodes=4, frames=6, size=(32, 48))
    save_autoencoder(folder / "autoencoder")
    network = {"class_path": "owl.models.diffusion_decoder.DiTDecoder", "init_args": TINY | {"shortcut": True}}
    options = {"network": network, "residual": True, "bootstrap": 0.5, "noise": 0.1, "warmup_steps": 1}
    class_path = "owl.recipes.diffusion_decoder.DiffusionDecoder"
    experiment = tiny_decoder(folder / "footage", "autoencoder", class_path, **options, weights={"lpips": 0.0})
    write_config(folder / "tiny.yaml", experiment)
    return folder


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS()


def fit(lab: Path, name: str, *options: str) -> dict[str, Any]:
    assert owl_here("fit", "--config", "tiny.yaml", "--name", name, *options, cwd=lab) == 0
    return torch.load(lab / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)


def recipe(
    lab: Path, lpips: LPIPS, changes: dict[str, Any] | None = None, lively: bool = True, **options: Any
) -> DiffusionDecoder:
    """A recipe without a trainer, which keeps what it logs in ``logged``; ``lively``: its layers all do something."""

    def network(*geometry: Any) -> DiTDecoder:
        return DiTDecoder(*geometry, **TINY | (changes or {}))

    torch.manual_seed(0)
    made = DiffusionDecoder(str(lab / "autoencoder"), network, lpips=lpips, **options)
    with torch.no_grad():
        for name, parameter in trained(made.network).items() if lively else ():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + name.endswith("norm.weight"))
    made.logged = {}
    made.log = lambda name, value, **options: made.logged.update({name: value})
    made.log_dict = lambda values, **options: made.logged.update(values)
    return made


def batch(size: int = 4, frames: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "rgb": torch.randint(0, 256, (size, frames, 3, 32, 48), dtype=torch.uint8, generator=generator),
        "latent": torch.randn(size, frames, 4, 4, 6, generator=generator),
        "window": torch.arange(size),
    }


def gradient(made: DiffusionDecoder, data: dict[str, Tensor] | None = None) -> Tensor:
    torch.manual_seed(0)
    made.zero_grad()
    made.training_step(data or batch(), 0).backward()
    return torch.cat([parameter.grad.flatten() for parameter in trained(made.network).values()])


@pytest.mark.parametrize(
    "term", [name for name in TERMS if name not in ("consistency", "adversarial")]
)  # see test_post_training.py and test_diffusion_autoencoder.py
def test_every_weight_changes_the_gradient_in_proportion(lab: Path, lpips: LPIPS, term: str) -> None:
    base = NONE | {"flow": 1.0}
    without = gradient(recipe(lab, lpips, weights=Weights(**base)))
    once, twice = (
        gradient(recipe(lab, lpips, weights=Weights(**base | {term: base[term] + weight}))) for weight in (0.5, 1.0)
    )
    change = once - without
    assert change.norm() > 1e-4 * without.norm()
    torch.testing.assert_close(twice - without, 2 * change, rtol=1e-3, atol=1e-4)


def test_impossible_arguments_are_reported(lab: Path, lpips: LPIPS) -> None:
    for option in ("bootstrap", "latent_dropout"):
        with refused("recipe.arguments", option):
            recipe(lab, lpips, **{option: 1.5})
    with refused("recipe.weights"):
        recipe(lab, lpips, weights=Weights(**NONE))
    models.save(recipe(lab, lpips).network, lab / "no-autoencoder")
    with refused("network.kind", "DiTDecoder"):
        DiffusionDecoder(str(lab / "no-autoencoder"))


def test_a_batch_without_pictures_latents_or_windows_is_reported(lab: Path, lpips: LPIPS) -> None:
    made = recipe(lab, lpips)
    for name in ("rgb", "latent", "window"):
        with refused("recipe.dataset"):
            made.training_step({key: x for key, x in batch().items() if key != name}, 0)


def test_a_frame_learns_the_flow_or_a_shortcut(lab: Path, lpips: LPIPS) -> None:
    made, data = recipe(lab, lpips, {"shortcut": True}, bootstrap=0.25, latent_dropout=0.3), batch(400, 2)
    draws = drawn(made, data)
    counts = [len(draws.flow), len(draws.bootstrapped)]
    assert sum(counts) == 800
    assert counts[1] / 800 == pytest.approx(0.25, abs=0.05)
    assert draws.known.float().mean().item() == pytest.approx(0.7, abs=0.05)
    assert (draws.step_size[draws.flow] == SMALLEST_STEP).all()
    logits = torch.logit(draws.noise_level[draws.flow])
    assert (logits.mean().item(), logits.std().item()) == pytest.approx((-0.4, 1.0), abs=0.1)
    d, t = draws.step_size[draws.bootstrapped], draws.noise_level[draws.bootstrapped]
    assert d.unique().tolist() == [2.0**-level for level in range(6, -1, -1)]
    assert torch.equal((t / d).round() * d, t)
    assert (t >= d).all()
    torch.testing.assert_close(draws.noise.std(), torch.tensor(1.0), atol=0.01, rtol=0)
    alone = drawn(made, {name: x[7:8] for name, x in data.items()})
    assert torch.equal(alone.noise, draws.noise[14:16])
    assert torch.equal(alone.noise_level, draws.noise_level[14:16])
    assert not len(drawn(recipe(lab, lpips, bootstrap=1.0), data).bootstrapped)  # only shortcut models bootstrap


def test_a_shortcut_learns_the_mean_of_two_halves_without_their_gradient(lab: Path, lpips: LPIPS) -> None:
    made = recipe(lab, lpips, {"shortcut": True}, bootstrap=1.0, residual=True)
    seen: list[tuple[Tensor, Tensor, bool]] = []
    made.network.register_forward_hook(
        lambda network, given, velocity: seen.append((given[1], given[4], velocity.requires_grad))
    )
    made.training_step(batch(), 0)  # no frame learns the flow: the reconstruction terms have nothing to compare
    (t1, d1, grad1), (t2, d2, grad2), (t, d, grad) = seen
    assert (grad1, grad2, grad) == (False, False, True)
    assert torch.equal(torch.stack([d1, d2]), torch.stack([d / 2, d / 2]))
    assert torch.equal(torch.stack([t1, t2]), torch.stack([t, t - d / 2]))
    assert made.logged["train/lpips"] == 0
    torch.testing.assert_close(made.logged["train/flow"], made.logged["train/shortcut"])


@pytest.mark.parametrize("draw", [0.001, 0.999])
def test_every_process_evaluates_the_network_as_often_as_the_others(lab: Path, lpips: LPIPS, draw: float) -> None:
    """Or FSDP2, which gathers the weights from all of them, would wait forever."""
    made = recipe(lab, lpips, {"shortcut": True}, bootstrap=draw)
    calls: list[int] = []
    made.network.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    made.training_step(batch(), 0)
    assert len(calls) == 3
    assert calls[:2] == ([1, 1] if draw < 0.5 else [4, 4])
    assert made.logged["train/loss"].isfinite()


@pytest.mark.parametrize("bootstrap", [0.0, 1.0])
def test_a_batch_of_one_is_enough(lab: Path, lpips: LPIPS, bootstrap: float) -> None:
    """Also if its only frame learns a shortcut, and none the flow."""
    found = gradient(recipe(lab, lpips, {"shortcut": True}, bootstrap=bootstrap), batch(1))
    assert found.isfinite().all()
    assert found.any()


def test_reconstruction_terms_compare_what_the_flow_predicts(lab: Path, lpips: LPIPS) -> None:
    """With a network that says that x0 is zero, the image is the target's mean and the base."""
    made = recipe(lab, lpips, residual=True, weights=Weights(**NONE | {"l2": 1.0}))
    for parameter in made.network.target_out.linear.parameters():
        torch.nn.init.zeros_(parameter)
    made.network.target_mean.fill_(0.2)
    data = batch()
    loss = made.training_step(data, 0)
    shown = made.original.decode(data["latent"].flatten(0, 1)) + 0.2
    torch.testing.assert_close(loss, (shown - (data["rgb"].flatten(0, 1) / 127.5 - 1)).square().mean())


def test_noise_augmentation_and_dropout_reach_the_network(lab: Path, lpips: LPIPS) -> None:
    plain, noisy = recipe(lab, lpips), recipe(lab, lpips, noise=0.5)
    dropped = recipe(lab, lpips, latent_dropout=1.0)
    seen: list[Tensor] = []
    for made in (plain, noisy):
        made.network.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
        made.training_step(batch(), 0)
    assert torch.equal(seen[0], batch()["latent"].flatten(0, 1))
    assert 0 < (seen[1] - seen[0]).std() < 0.5
    gradient(plain)
    assert not plain.network.null.grad.any()
    gradient(dropped)
    assert dropped.network.null.grad.any()
    assert not dropped.network.latent_in.weight.grad.any()


def test_the_latent_is_used(lab: Path, lpips: LPIPS) -> None:
    """After a few steps, the latents of other frames raise the loss."""
    made = recipe(lab, lpips, lively=False, logit_mean=2.0, weights=Weights(**NONE | {"flow": 1.0}))
    optimizer = torch.optim.AdamW(trained(made.network).values(), lr=3e-3)
    data = batch(8)
    data["rgb"] = (data["latent"][:, :, :3].repeat_interleave(8, 3).repeat_interleave(8, 4) * 40 + 128).byte()
    for number in range(30):
        optimizer.zero_grad()
        made.training_step(data | {"window": data["window"] + 8 * number}, 0).backward()
        optimizer.step()
    with torch.no_grad():
        loss = made.training_step(data, 0)
        shuffled = made.training_step(data | {"latent": data["latent"].roll(1, 0)}, 0)
    assert shuffled > 1.5 * loss


def test_the_target_is_standardised_by_the_first_batch(lab: Path, lpips: LPIPS) -> None:
    made, data = recipe(lab, lpips, residual=True), batch()
    made.on_train_batch_start(data, 0)
    residual = data["rgb"].flatten(0, 1) / 127.5 - 1 - made.original.decode(data["latent"].flatten(0, 1))
    target = made.network.to_target(data["rgb"].flatten(0, 1) / 127.5 - 1, made.network.estimate(data["latent"][:, 0]))
    torch.testing.assert_close(made.network.target_std, residual.std((0, 2, 3), correction=0))
    torch.testing.assert_close(target.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(target.square().mean((0, 2, 3)), torch.ones(3))
    before = made.network.target_std.clone()
    made.on_train_batch_start(batch(2), 1)  # a later batch changes nothing
    assert torch.equal(made.network.target_std, before)


def test_a_run_continues_exactly_and_its_checkpoint_decodes_alone(lab: Path) -> None:
    fixed = ("--model.init_args.final_lr", "1.0")
    straight = fit(lab, "straight", *fixed)
    fit(lab, "parts", *fixed, "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0")
    resumed = fit(lab, "parts", *fixed, "--ckpt_path", "last", "--trainer.limit_val_batches", "0")
    assert resumed["global_step"] == straight["global_step"] == 4
    for part in ("state_dict", "ema", "optimizer_states"):
        torch.testing.assert_close(resumed[part], straight[part], atol=0, rtol=0)
    assert not any(name.startswith("original") for name in straight["state_dict"])
    metrics = json.loads((lab / "runs" / "straight" / "metrics.json").read_text())
    names = {"psnr", "ssim", "fd_efficientnet_lite0", *(f"lpips_st_alex{n}" for n in ("", "_1_steps", "_4_steps"))}
    assert {f"val/{name}" for name in names} <= metrics.keys()
    assert list((lab / "runs" / "straight" / "media").rglob("decoders.png"))
    (lab / "autoencoder").rename(lab / "elsewhere")
    try:
        network = models.load(lab / "runs" / "straight" / "checkpoints" / "last.ckpt")
    finally:
        (lab / "elsewhere").rename(lab / "autoencoder")
    assert network.decode(torch.randn(1, 4, 4, 6)).shape == (1, 3, 32, 48)
    assert network.latent_encoder.any()
    assert 0.1 < network.target_std.mean() < 2


def test_an_encoder_other_than_that_of_the_autoencoder_is_refused(lab: Path) -> None:
    save_autoencoder(lab / "other", seed=1)
    with refused("latents.encoder"):
        fit(lab, "other", "--trainer.callbacks.path", "other")
