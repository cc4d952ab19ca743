"""The watch over the critic: what it averages, when it warns, and when it stops."""

import warnings

import pytest
import torch

from owl.recipes.critic_lag import DECAY, CriticLag
from tests.helpers.errors import refused


def watch(*errors: tuple[float, float]) -> CriticLag:
    lag = CriticLag()
    for critic, teacher in errors:
        lag.update(torch.tensor(critic), torch.tensor(teacher))
    return lag


def test_it_divides_running_means_which_are_stored() -> None:
    lag = watch((2.0, 1.0), (1.0, 3.0))
    means = [DECAY * (1 - DECAY) * first + (1 - DECAY) * second for first, second in ((2, 1), (1, 3))]
    assert lag.ratio.item() == pytest.approx(means[0] / means[1])
    again = CriticLag()
    again.load_state_dict(lag.state_dict())
    assert again.ratio == lag.ratio
    assert watch((0.7, 0.7)).ratio == 1  # no bias from the beginning


def test_a_critic_that_lags_is_reported_once_and_one_that_follows_is_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CriticLag().check()
        watch((0.8, 1.0)).check()
        watch((1.0, 1.0)).check()
    lag = watch((1.5, 1.0))
    with pytest.warns(UserWarning, match=r"1\.50 times the teacher's.*critic_steps"):
        lag.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lag.check()
    for _ in range(30):
        lag.update(torch.tensor(0.5), torch.tensor(1.0))
    lag.check()
    for _ in range(30):
        lag.update(torch.tensor(1.5), torch.tensor(1.0))
    with pytest.warns(UserWarning, match="times the teacher's"):
        lag.check()


@pytest.mark.parametrize("error", [40.0, float("inf"), float("nan")])
def test_one_that_diverges_stops_the_run(error: float) -> None:
    with refused("critic.diverged", "times the teacher's", "critic_optimizer"):
        watch((error, 1.0)).check()
