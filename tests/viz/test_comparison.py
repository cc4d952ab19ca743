"""The place that is magnified, the best of a column, and a figure that fits."""

import io

import torch
from PIL import Image

from owl.viz.comparison import TRUTH, Column, Detail, ShownClip, figure, find_detail


def test_the_detail_is_where_versions_differ_most() -> None:
    true = torch.full((4, 3, 32, 48), 100, dtype=torch.uint8)
    decoded, other = true.clone(), true.clone()
    decoded[:, :, 20, 4] = 110
    other[2, :, 9:17, 30:42] = 180
    assert find_detail([true, decoded, other]) == Detail(frame=2, top=9, left=30, height=8, width=12)
    assert find_detail([true, decoded]).of(decoded).max() == 110
    other[0, :, 20:32, 30:48] = 250  # larger and in more pixels, but on a flat ground
    true[2, :, 9:17:2, 30:42] = 200
    assert find_detail([true, other]).frame == 2
    assert find_detail([true[:, :, :3, :3]]) == Detail(0, 0, 0, 1, 1)


def test_the_best_is_judged_by_what_is_displayed() -> None:
    values = {"a": {"x": 1.04}, "b": {"x": 1.01}, "c": {"x": 0.5}, "d": {}}
    assert Column("x", "X", 1, "higher").best(values) == {"a", "b"}
    assert Column("x", "X", 2, "higher").best(values) == {"a"}
    assert Column("x", "X", 1, "lower").best(values) == {"c"}
    assert Column("x", "X", 0, "lower").best({"a": {"x": 1.04}, "b": {"x": 1.01}}) == set()
    assert Column("x", "X", 1, "lower", scale=1e3).text(0.5) == "500.0"


def test_the_figure_drops_clips_until_it_fits() -> None:
    random = torch.Generator().manual_seed(0)

    def clip(width: int) -> ShownClip:
        pictures = {
            name: torch.randint(0, 256, (1, 3, width // 2, width), generator=random, dtype=torch.uint8)
            for name in (TRUTH, "a decoder whose name is far too long for its column of the figure")
        }
        return ShownClip("somewhere", pictures, {}, find_detail([*pictures.values()]))

    clips = [clip(64), clip(64), clip(64)]
    whole = figure(clips, {})
    part = figure(clips, {}, len(whole) // 2)
    assert len(part) <= len(whole) // 2
    pictures = [Image.open(io.BytesIO(content)) for content in (whole, part)]
    assert pictures[0].height > pictures[1].height > 300
    assert pictures[0].mode == "P"
    assert Image.open(io.BytesIO(figure([clip(800)], {}))).width == 2 * 326 + 6  # large pictures are reduced
