"""Proposals: their text, spacings and moves."""

from __future__ import annotations

from typing import Any

import pytest

from sdgraph.plan_search.candidates import Proposal, ProposedCall
from sdgraph.schedules import DenseEarly, SamplingRun, Uniform


def refreshes(proposal: Proposal) -> tuple[int, ...]:
    return tuple(n for n, call in enumerate(proposal.calls) if not call.reused)


def test_the_text_of_a_plan_is_read_back() -> None:
    calls: list[tuple[Any, ...]]
    calls = [(), (frozenset({0}), 0.5), (frozenset({0, 2}),), (frozenset({11}), -0.25), ()]
    proposal = Proposal(tuple(ProposedCall(*call) for call in calls))
    assert str(proposal) == "* 0:0.5 0+2:0 11:-0.25 *"
    assert Proposal.read(str(proposal)) == proposal


@pytest.mark.parametrize("calls", [6, 7, 20, 25, 49, 50])
@pytest.mark.parametrize("interval", [1, 2, 3, 4, 7])
def test_even_spacings_are_those_of_uniform(calls: int, interval: int) -> None:
    number = len(Uniform(interval).calls(SamplingRun(calls)))
    least = min(n for n in range(1, calls + 1) if len(Uniform(n).calls(SamplingRun(calls))) == number)
    assert refreshes(Proposal.spaced(calls, number, frozenset({0}), 0.5)) == Uniform(least).calls(SamplingRun(calls))


@pytest.mark.parametrize("shape", ["even", "early", "ends"])
def test_spacings_begin_with_the_first_call(shape: str) -> None:
    proposal = Proposal.spaced(50, 10, frozenset({1}), 0.5, shape)
    assert refreshes(proposal)[0] == 0
    assert 8 <= len(refreshes(proposal)) <= 10
    assert {call for call in proposal.calls if call.reused} == {ProposedCall(frozenset({1}), 0.5)}


def test_shapes_are_dense_where_they_say() -> None:
    early, ends = (refreshes(Proposal.spaced(50, 10, frozenset({0}), 0.0, shape)) for shape in ("early", "ends"))
    at = DenseEarly(5).calls(SamplingRun(50))
    assert all(0 <= ours - theirs <= 1 for ours, theirs in zip(early, at, strict=True))  # it rounds down
    gaps = [b - a for a, b in zip(ends, (*ends[1:], 50), strict=True)]
    assert max(gaps[:2] + gaps[-2:]) < max(gaps[4:6])


def test_neighbours_are_one_move_away_and_keep_the_first_call() -> None:
    proposal = Proposal.read("* 0:0.5 * 1:0.5")
    choices = [ProposedCall(), ProposedCall(frozenset({0})), ProposedCall(frozenset({1}))]
    found = {str(move) for move in proposal.neighbours(choices)}
    assert found == {
        "* * 0:0.5 1:0.5", "* 0:0.5 1:0.5 *",  # calls change places
        "* * * 1:0.5", "* 1:0.5 * 1:0.5", "* 0:0.5 0:0.5 1:0.5", "* 0:0.5 1:0.5 1:0.5",  # another set of candidates
        "* 0:0.5 * *", "* 0:0.5 * 0:0.5",
        "* 0:0.25 * 1:0.5", "* 0:0.75 * 1:0.5", "* 0:0.5 * 1:0.25", "* 0:0.5 * 1:0.75",  # another damping
    }  # fmt: skip
