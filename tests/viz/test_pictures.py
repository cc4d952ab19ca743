import cv2
import numpy as np
import pytest
import torch

from owl.viz.pictures import (
    BACKGROUND,
    CAPTION_HEIGHT,
    GAP,
    TILE_WIDTHS,
    comparison_grid,
    principal_components,
    reconstruction_grid,
)


def frames(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("size", "tile"), [((96, 160), (96, 160)), ((32, 48), (128, 192)), ((360, 640), (180, 320)), ((9, 8), (180, 160))]
)
def test_layout(size, tile):
    image = frames(3, *size)
    picture = reconstruction_grid(image, image, torch.randn(3, 4, 3, 4))
    assert picture.dtype == "uint8"
    assert picture.shape == (4 * (tile[0] + CAPTION_HEIGHT) + GAP, max(3 * (tile[1] + GAP) + GAP, picture.shape[1]), 3)
    assert tile[1] in range(TILE_WIDTHS[0], TILE_WIDTHS[1] + 1)


def test_rows_show_what_they_say():
    original = frames(2, 96, 160)
    reconstruction = original.clone()
    reconstruction[1, :, 40:60, 60:80] *= -1
    picture = reconstruction_grid(original, reconstruction, torch.randn(2, 4, 12, 20))

    def tile(row: int, column: int):
        top, left = row * (96 + CAPTION_HEIGHT) + CAPTION_HEIGHT, GAP + column * (160 + GAP)
        return torch.from_numpy(picture[top : top + 96, left : left + 160].copy()).movedim(-1, 0)

    for column in range(2):
        for row, images in ((0, original), (1, reconstruction)):
            assert torch.equal(tile(row, column), ((images[column] + 1) * 127.5).round().byte())
    black = tile(2, 0)[:, 0, 0]
    assert (tile(2, 0) == black.view(3, 1, 1)).all()
    changed = (tile(2, 1) != black.view(3, 1, 1)).any(dim=0)
    assert changed[40:60, 60:80].float().mean() > 0.95
    changed[40:60, 60:80] = False
    assert not changed.any()
    blocks = tile(3, 0).unflatten(1, (12, 8)).unflatten(3, (20, 8))  # every latent pixel is a block of 8x8
    assert (blocks == blocks[:, :, :1, :, :1]).all()


@pytest.mark.parametrize(("error", "highest"), [(15, 16), (17, 32), (200, 255)])
def test_error_scale(error, highest):
    black = torch.full((1, 3, 96, 160), -1.0)
    picture = reconstruction_grid(black, black + error / 127.5, torch.randn(1, 4, 12, 20))
    top = 2 * (96 + CAPTION_HEIGHT) + CAPTION_HEIGHT
    inferno = cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_INFERNO).reshape(256, 3)[:, ::-1]
    assert (picture[top, GAP] == inferno[round(255 * error / highest)]).all()


def test_the_picture_is_wide_enough_for_its_captions():
    picture = reconstruction_grid(frames(1, 32, 32), frames(1, 32, 32), torch.randn(1, 100, 100, 100))
    margin = picture[:, -GAP + 1 :]
    assert (margin == BACKGROUND).all()


def test_principal_components_find_the_varied_directions():
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(4, 3, 6, 8, generator=generator) * torch.tensor([3.0, 2.0, 1.0]).view(1, 3, 1, 1)
    mixing = torch.linalg.qr(torch.randn(5, 3, generator=generator)).Q
    latent = torch.einsum("ck,bkhw->bchw", mixing, sources)
    components, explained = principal_components(latent, 3)
    assert components.shape == (4, 3, 6, 8)
    assert components.min() == 0
    assert components.max() == 1
    assert explained == pytest.approx(1.0, abs=1e-5)
    for k in range(3):
        pair = torch.stack([components[:, k].flatten(), sources[:, k].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.95
    assert principal_components(latent, 1)[1] == pytest.approx(9 / 14, abs=0.1)


def test_principal_components_have_stable_signs():
    latent = (
        torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
        * torch.tensor([4.0, 3.0, 2.0, 1.0])[:, None, None]
    )
    components, _ = principal_components(latent, 3)
    torch.testing.assert_close(principal_components(latent.flip(0), 3)[0].flip(0), components, rtol=1e-3, atol=1e-3)
    # The first channel varies most, and more of it is more of the first colour.
    assert torch.corrcoef(torch.stack([components[:, 0].flatten(), latent[:, 0].flatten()]))[0, 1] > 0.9


def test_latents_without_variance_or_with_few_channels_are_grey_there():
    flat, explained = principal_components(torch.ones(1, 4, 2, 2), 3)
    assert (flat == 0.5).all()
    assert explained == 1.0
    single, _ = principal_components(torch.randn(2, 1, 4, 4), 3)
    assert (single[:, 1:] == 0.5).all()
    assert single[:, 0].std() > 0


def test_versions_of_frames_are_compared_below_each_other():
    original = frames(2, 96, 160)
    rows = {"original": original, "halved": original / 2, "beyond": original * 3}
    picture = comparison_grid(rows)
    step = 192 + CAPTION_HEIGHT
    assert picture.shape == (3 * step + GAP, 2 * 320 + 3 * GAP, 3)
    for number, images in enumerate(rows.values()):
        for column in range(2):
            top, left = number * step + CAPTION_HEIGHT, GAP + column * (320 + GAP)
            tile = torch.from_numpy(picture[top : top + 192, left : left + 320].copy()).movedim(-1, 0)
            expected = ((images[column].clamp(-1, 1) + 1) * 127.5).round().byte()
            assert torch.equal(tile, expected.repeat_interleave(2, 1).repeat_interleave(2, 2))
    captions = [picture[number * step : number * step + CAPTION_HEIGHT, 200:] != BACKGROUND for number in range(3)]
    assert [bool(caption.any()) for caption in captions] == [False, True, True]  # PSNR against the first
