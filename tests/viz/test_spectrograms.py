import numpy as np
import torch

from owl.viz.spectrograms import spectrograms


def test_versions_are_drawn_below_each_other_on_one_scale() -> None:
    loud, quiet = torch.zeros(128, 40), torch.full((128, 40), -80.0)
    picture = spectrograms({"original": loud, "reconstruction": quiet}, 2.0, 44_100)
    assert picture.dtype == np.uint8
    assert picture.shape == (440, 1000, 3)
    (above, below), alone = np.split(picture, 2), spectrograms({"a": loud}, 2.0, 8000)
    assert above[110, 400].sum() > below[110, 400].sum() + 300  # bright above, dark below
    assert alone.shape == (220, 1000, 3)
