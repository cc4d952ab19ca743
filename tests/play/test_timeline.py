"""Moments are bounded in number, the first and the last are kept, and every one leads back to the first."""

import itertools

from owl.play import timeline
from owl.play.timeline import Played, Timeline, in_order


def test_old_moments_are_thinned_out() -> None:
    moments = Timeline()
    moments.clear(timeline.BUDGET // 20)
    assert moments.most == 20
    for frame in range(500):
        moments.add(frame, 0, b"", None, None)
        assert len(moments.moments) <= 20
        for number, moment in moments.moments.items():
            assert moment.number == number
            assert moment.parent in moments.moments or number == 0
    kept = list(moments.moments)
    assert kept[0] == 0
    assert kept[-1] == 499
    gaps = [after - before for before, after in itertools.pairwise(kept)]
    assert max(gaps[-5:]) <= 10 < max(gaps[:10])  # dense where it was recent


def test_the_budget_leaves_a_few_however_large_they_are() -> None:
    moments = Timeline()
    for size, most in ((10 * timeline.BUDGET, timeline.LEAST), (0, timeline.MOST)):
        moments.clear(size)
        assert moments.most == most


def test_a_branch_follows_the_moment_that_was_returned_to() -> None:
    moments = Timeline()
    moments.clear(0)
    first, second = (moments.add(frame, 0, b"", None, None) for frame in (0, 1))
    moments.current = first
    other = moments.add(1, 1, b"", None, None)
    assert (first.parent, second.parent, other.parent) == (None, 0, 0)
    moments.clear(0)
    assert moments.add(0, 0, b"", None, None).number == 3  # pages keep pictures by number


def test_branches_share_what_was_done_before_them() -> None:
    start = Played(Played(None, "a"), "b")
    assert in_order(None) == []
    assert in_order(Played(start, "c")) == ["a", "b", "c"]
    assert in_order(Played(start, "d")) == ["a", "b", "d"]
