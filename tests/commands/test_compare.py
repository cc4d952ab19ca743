"""``compare`` as it is typed: its numbers against the recipes' metrics, a page that needs nothing else, refusals."""

import base64
import html
import io
import json
import re
import shlex
from contextlib import chdir
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from owl import models
from owl.comparison.clips import HeldOutClips
from owl.comparison.decoders import load_decoders
from owl.data.windows import WindowDataset
from owl.latents import encoder_of
from owl.losses.lpips import LPIPS
from owl.models.image_decoder import ImageDecoder
from owl.pixels import to_float
from owl.recipes.decoders import DecoderMetrics, load_autoencoder
from tests.helpers.autoencoders import save_autoencoder
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import REPOSITORY, owl_here
from tests.test_docs import blocks, lines

FOOTAGE = "data/doom-mix-96x160"  # named as in the how-to page
AUTOENCODER, DECODER = "runs/quickstart", "runs/gan_decoder_quickstart"
NAMES = ["quickstart", "gan_decoder_quickstart"]
SMALL = ("--clips", "5", "--length", "4")  # the test split has three clips that do not overlap


def save_decoder(folder: Path, autoencoder: Path) -> None:
    """Export an autoencoder's decoder with slightly different weights."""
    decoder = ImageDecoder.of(load_autoencoder(str(autoencoder)))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=random))
    models.save(decoder, folder)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Footage with flow, an autoencoder, another decoder of its latents, and their comparison in ``page``."""
    folder = tmp_path_factory.mktemp("compare")
    make_dataset(folder / FOOTAGE, episodes=3, frames=12, size=(32, 48), modalities=("rgb", "flow"))
    save_decoder(folder / DECODER, save_autoencoder(folder / AUTOENCODER))
    arguments = ("--data", FOOTAGE, *SMALL, "--show", "2", "--out", "page")
    assert owl_here("compare", AUTOENCODER, DECODER, *arguments, cwd=folder) == 0
    return folder


def test_the_numbers_are_those_of_the_recipes_metrics(lab: Path) -> None:
    found = json.loads((lab / "page/metrics.json").read_text())["decoders"]
    autoencoder, decoder = load_autoencoder(str(lab / AUTOENCODER)), models.load(lab / DECODER)
    footage = WindowDataset(lab / FOOTAGE, "test", ["rgb", "flow"], length=4)
    assert list(found) == NAMES
    for network, values in zip((autoencoder, decoder), found.values(), strict=True):
        metrics = DecoderMetrics(LPIPS())
        for first in (0, 4, 8):
            sample = footage[first]
            image = to_float(sample["rgb"])
            with torch.no_grad():
                metrics.update(network.decode(autoencoder.encode(image).mean), image, sample["flow"][None])
        expected = {name.removeprefix("test/"): float(m.compute()) for name, m in metrics.named("test").items()}
        assert {"psnr", "ssim", "lpips_st_alex", "fd_efficientnet_lite0", "flicker"} == expected.keys()
        assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-3)
        assert values["parameters"] == sum(p.numel() for p in network.decoder.parameters())
        assert values["frames_per_second"] > 0
    assert found["quickstart"]["speed"] == 1


def test_the_table_shows_them_and_marks_the_best(lab: Path) -> None:
    values = json.loads((lab / "page/metrics.json").read_text())["decoders"]
    page = (lab / "page/index.html").read_text().replace("<wbr>", "")
    rows = re.findall(r"<tr><th scope=\"row\">(.+?)</th>(.+?)</tr>", page, re.DOTALL)
    assert [name for name, _ in rows] == NAMES
    cells = {name: dict(re.findall(r'<td data-label="(.+?)">(.+?)</td>', row, re.DOTALL)) for name, row in rows}
    for label, column, better, shown in (
        ("PSNR", "psnr", max, "{:.2f}"),
        ("LPIPS", "lpips_st_alex", min, "{:.4f}"),
        ("Fréchet", "fd_efficientnet_lite0", min, "{:.2f}"),
    ):
        numbers = {name: row[column] for name, row in values.items()}
        for name, number in numbers.items():
            assert f">{shown.format(number)}<" in cells[name][label]
            assert ("best" in cells[name][label]) == (number == better(numbers.values())), (label, name)
        assert "best" not in cells[name]["parameters"]  # all have as many


def contents(page: str, kind: str) -> list[bytes]:
    """The files of a kind that a page contains."""
    return [base64.b64decode(text) for text in re.findall(rf'src="data:{kind};base64,(.+?)"', page)]


def test_the_page_contains_its_films_and_details_and_needs_nothing_else(lab: Path) -> None:
    page = (lab / "page/index.html").read_text()
    assert not re.findall(r"https?:|@import|url\(", page)
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="(.+?)"', page))
    films, pictures = contents(page, "video/mp4"), contents(page, "image/png")
    assert (len(films), len(pictures)) == (2, 2 * 2 * 3)  # of each version a frame and its detail
    footage = WindowDataset(lab / FOOTAGE, "test", ["rgb"], length=4)
    with av.open(io.BytesIO(films[0])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 35
    true = footage[0]["rgb"].movedim(1, -1).numpy()
    factor = frames[0].shape[0] // (3 * 32)  # the true frames are above the decoded ones
    frames = [frame[: 32 * factor] for frame in frames]
    assert np.abs(np.stack(frames)[:, factor // 2 :: factor, factor // 2 :: factor] - true.astype(float)).mean() < 4
    top, left, height, width = map(float, re.findall(r'data-box="(.+?)"', page)[0].split())
    whole, detail, decoded, *_ = (np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures)
    rows, columns = (slice(round(a * n), round((a + b) * n)) for a, b, n in ((top, height, 32), (left, width, 48)))
    assert any(np.array_equal(whole, frame) for frame in true)
    assert np.array_equal(detail, whole[rows, columns])
    assert decoded.shape == whole.shape
    assert not np.array_equal(decoded, whole)
    assert "2 of 3 clips" in page
    figure = lab / "page/comparison.png"
    assert figure.stat().st_size <= 200_000
    assert Image.open(figure).size[0] > 3 * 280
    assert sorted(path.name for path in (lab / "page").iterdir()) == ["comparison.png", "index.html", "metrics.json"]


def test_the_command_on_the_page_repeats_it(lab: Path) -> None:
    page = (lab / "page/index.html").read_text()
    command = html.unescape(re.findall(r"<pre>(.+?)</pre>", page)[0])
    assert shlex.split(command)[3:] == [
        *("compare", AUTOENCODER, DECODER, "--data", FOOTAGE, "--out", "page", "--encoder", AUTOENCODER),
        *("--split", "test", *SMALL, "--show", "2"),
    ]


def test_the_how_to_page_and_single_frames(lab: Path) -> None:
    single = ("--clips", "2", "--length", "1")
    for block in blocks(REPOSITORY / "docs/how-to/compare.md"):
        for command in lines(block.content) if block.language == "bash" else ():
            assert owl_here(*shlex.split(command)[3:], *single, cwd=lab) == 0, command
    page = (lab / "runs/comparison/index.html").read_text()
    assert "<video" not in page
    assert "<script" not in page
    values = json.loads((lab / "runs/gan-only/metrics.json").read_text())["decoders"]
    assert list(values) == ["gan_decoder_quickstart"]
    assert "flicker" not in values["gan_decoder_quickstart"]


def test_latents_of_the_dataset_are_the_encoder_s(lab: Path) -> None:
    assert owl_here("data", "encode", AUTOENCODER, FOOTAGE, "data/latents", "--keep", "rgb,flow", cwd=lab) == 0
    mark = encoder_of(models.load(lab / AUTOENCODER))
    encoded = list(HeldOutClips(str(lab / FOOTAGE), "test", 3, 4, mark, str(lab / AUTOENCODER)))
    stored = list(HeldOutClips(str(lab / "data/latents"), "test", 3, 4, mark))
    assert [clip.source for clip in stored] == [f"episode-002, frames {n} to {n + 3}" for n in (0, 4, 8)]
    for one, other in zip(encoded, stored, strict=True):
        assert one.flow is not None
        assert other.flow is not None
        assert torch.equal(one.true, other.true)
        assert torch.equal(one.flow, other.flow)
        torch.testing.assert_close(one.latent, other.latent, atol=2e-3, rtol=2e-3)  # stored in 16 bits
    other = encoder_of(models.load(save_autoencoder(lab / "runs/other", seed=1)))
    with refused("latents.encoder", "data/latents", mark, other):
        HeldOutClips(str(lab / "data/latents"), "test", 3, 4, other)


def test_runs_are_found_and_named(lab: Path) -> None:
    assert models.find_checkpoint("runs/mine") == "runs/mine/checkpoints/last.ckpt"
    for path in ("runs/mine/checkpoints/best.ckpt", str(lab / DECODER)):
        assert models.find_checkpoint(path) == path
    save_decoder(lab / "elsewhere/quickstart", lab / AUTOENCODER)
    with chdir(lab):
        assert list(load_decoders([AUTOENCODER, DECODER])) == NAMES
        alike = [AUTOENCODER, "elsewhere/quickstart"]
        assert list(load_decoders(alike)) == alike


def test_what_does_not_fit_is_reported_in_one_sentence(lab: Path) -> None:
    other = encoder_of(models.load(save_autoencoder(lab / "runs/other", seed=1)))
    mark = encoder_of(models.load(lab / AUTOENCODER))
    large = ImageDecoder(3, (64, 96), (4, 6), 4, widths=[8], blocks=[1], patch=16)
    large.latent_encoder.copy_(torch.tensor(list(bytes.fromhex(mark))))
    models.save(large, lab / "runs/large")
    make_dataset(lab / "data/controls", episodes=1, frames=4, modalities=("controls",))
    for arguments, code, tokens in (
        (("runs/other", DECODER), "latents.encoder", ["runs/other", DECODER, mark, other]),
        ((DECODER,), "compare.encoder", [FOOTAGE, "rgb, flow", mark]),
        ((DECODER, "--encoder", "runs/other"), "latents.encoder", ["runs/other", mark, other]),
        ((DECODER, DECODER), "compare.repeated", [DECODER]),
        ((AUTOENCODER, "--data", "data/controls"), "dataset.modalities", ["data/controls", "controls"]),
        ((AUTOENCODER, "runs/large"), "compare.size", ["large", "3x64x96", "3x32x48"]),
        ((AUTOENCODER, "--clips", "0"), "arguments.too-small", ["clips is 0"]),
        ((AUTOENCODER, "--length", "13"), "windows.too-short", [FOOTAGE, "13 frames"]),
        (("runs/none",), "checkpoint.missing", ["runs/none/checkpoints/last.ckpt"]),
    ):
        with refused(code, *tokens):
            owl_here("compare", "--data", FOOTAGE, *SMALL, "--out", "refused", *arguments, cwd=lab)
        assert not (lab / "refused").exists()
