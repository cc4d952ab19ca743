"""Pictures of depth and flow: ordered colours, legends on the same scale, and grey where nothing was measured."""

import numpy as np

from owl.viz.modalities import (
    LEGEND_WIDTH,
    NOT_MEASURED,
    Row,
    colour_depth,
    colour_flow,
    depth_legend,
    draw_rows,
    flow_legend,
)

LUMINANCE = np.array([0.299, 0.587, 0.114])


def test_nearer_is_brighter_on_a_logarithmic_scale() -> None:
    distances = np.array([[[1, 10, 100, 1000, 5000, 0.5, np.nan]]])
    (colours,) = colour_depth(distances, 1, 1000)[0]
    bright = colours.astype(float) @ LUMINANCE
    assert (np.diff(bright[:4]) < -30).all()
    assert bright[4] == bright[3]
    assert bright[5] == bright[0]
    assert tuple(colours[6]) == NOT_MEASURED


def test_the_scale_of_depth_has_the_colours_of_the_pictures() -> None:
    legend = depth_legend(101, 2, 200)
    assert legend.shape == (101, LEGEND_WIDTH, 3)
    colours = {tuple(colour) for colour in legend.reshape(-1, 3)}
    for distance in (2, 20, 200):
        assert tuple(colour_depth(np.full((1, 1, 1), distance, float), 2, 200)[0, 0, 0]) in colours


def test_the_wheel_has_the_colours_of_the_flow() -> None:
    legend = flow_legend(96, 7.0).astype(int)
    colours = legend.reshape(-1, 3)
    for flow in ((7, 0), (-7, 0), (0, 7), (0, -7), (0, 0)):
        colour = colour_flow(np.array([[flow]], np.float32), 7.0)[0, 0]
        assert np.abs(colours - colour).max(1).min() <= 6
    unknown = colour_flow(np.array([[(np.nan, 1), (1, 1)]], np.float32), 7.0)[0]
    assert tuple(unknown[0]) == NOT_MEASURED
    assert tuple(unknown[1]) != NOT_MEASURED


def test_rows_stand_below_each_other_with_their_legends_at_the_left() -> None:
    tiles = np.full((3, 48, 80, 3), 200, np.uint8)
    picture = draw_rows([Row("a", tiles, ("1", "2", "3")), Row("b", tiles, legend=np.full((90, 50, 3), 99, np.uint8))])
    assert (picture == 200).all(-1).sum() >= 2 * 3 * 96 * 160
    assert (picture == 99).all(-1).sum() == 90 * 50
    left = np.flatnonzero((picture == 200).all(-1).any(0))[0]
    assert np.flatnonzero((picture == 99).all(-1).any(0)).max() < left
