"""Films: versions of a clip side by side."""

import numpy as np
import torch

from owl.viz.film import CAPTION, side_by_side
from owl.viz.pictures import GAP


def test_versions_of_a_clip_stand_side_by_side_below_their_captions() -> None:
    levels = torch.tensor([-1.0, 0.0, 2.0])  # the last is clipped
    truth = levels.view(3, 1, 1, 1).expand(3, 3, 8, 240)
    clip = side_by_side({"truth": truth, "decoded": -truth})
    assert clip.shape == (3, CAPTION + 16, 480 + GAP + 480, 3)
    assert clip.dtype == np.uint8
    for frame, (left, right) in zip(clip, [(0, 255), (128, 128), (255, 0)], strict=True):
        assert (frame[CAPTION:, :480] == left).all()
        assert (frame[CAPTION:, 480 + GAP :] == right).all()
        assert len(np.unique(frame[:CAPTION])) > 2
