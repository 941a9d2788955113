"""Schedules: at which calls a site is refreshed."""

from __future__ import annotations

from itertools import pairwise

import pytest

from sdgraph.errors import ScheduleError
from sdgraph.schedules import DenseCenter, DenseEarly, DenseLate, Explicit, Gate, Range, SamplingRun, Uniform, Warm


def test_published_schedules() -> None:
    assert DenseCenter(5, center=15).calls(SamplingRun(50)) == (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)
    assert Uniform(5).calls(SamplingRun(20)) == (0, 5, 10, 15)
    assert Gate(10, Uniform(5)).calls(SamplingRun(25)) == (0, 5, 10)


def test_schedules_are_what_they_say() -> None:
    early, late = DenseEarly(5).calls(SamplingRun(50)), DenseLate(5).calls(SamplingRun(50))
    assert len(early) == len(late) == 10
    steps = [[b - a for a, b in pairwise(each)] for each in (early, late)]
    assert steps[0][0] < steps[0][-1]
    assert steps[1][0] > steps[1][-1]
    timesteps = tuple(float(t) for t in range(980, -20, -20))
    inside = [i for i, t in enumerate(timesteps) if 100 < t < 800]
    found = Range(100, 800, Uniform(2)).calls(SamplingRun(50, timesteps))
    assert [i for i in inside if i in found] == [i for i in inside if i % 2 == 0]
    assert set(range(50)) - set(inside) <= set(found)
    assert Warm(Uniform(10), first=3, last=2).calls(SamplingRun(25)) == (0, 1, 2, 10, 20, 23, 24)
    assert Explicit((7, 0, 3)).calls(SamplingRun(9)) == (0, 3, 7)


def test_schedules_that_make_no_sense() -> None:
    with pytest.raises(ScheduleError, match=r"does not refresh at the first call"):
        Explicit((3, 6))
    with pytest.raises(ScheduleError, match=r"call 9 is not one of 9"):
        Explicit((0, 9), of=9)
    with pytest.raises(ScheduleError, match=r"interval is 0"):
        Uniform(0)
    with pytest.raises(ScheduleError, match=r"needs to know the calls"):
        DenseEarly(5).refreshes(3, 500.0, SamplingRun())
    with pytest.raises(ScheduleError, match=r"made for 50 calls, this generation has 20"):
        Explicit((0, 9), of=50).refreshes(3, 500.0, SamplingRun(20))
