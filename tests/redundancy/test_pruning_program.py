"""The integer program counts what savings really are, and finds the best choice where they overlap."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import hypothesis
import pytest
from hypothesis import strategies as st

from sdgraph.redundancy.pruning_program import Parts, PruningProgram
from sdgraph.redundancy.redundancy import Removal

PATHS = tuple(f"down_blocks.{number}.resnets.0" for number in range(5))
PARTS = 8  # of which each removal saves some, and several removals may save the same


def removal(path: str, saved: float) -> Removal:
    return Removal(path, "layer", saved, saved, saved, (0.0,), 0.0)


def parts_of(ways: Sequence[Sequence[set[int]]], apart: set[int] = frozenset()) -> Parts:  # type: ignore[assignment]
    """Return parts of equal size.

    Args:
        ways: the ways to lose each part: sets of removals that lose it together.
        apart: the removals that cannot be made together.
    """

    def lost(paths: tuple[str, ...]) -> set[str] | None:
        chosen = {PATHS.index(path) for path in paths}
        if apart and apart <= chosen:
            return None
        return {str(part) for part, each in enumerate(ways) if any(way <= chosen for way in each)}

    return Parts({"macs": {str(part): 1 / len(ways) for part in range(len(ways))}}, lost)


def left_of(parts: Parts, chosen: Iterable[int]) -> float | None:
    lost = parts.lost(tuple(PATHS[n] for n in sorted(chosen)))
    return None if lost is None else 1 - len(lost) / len(parts.sizes["macs"])


def best(parts: Parts, errors: list[float], share: float) -> float | None:
    """Return the least error of all choices that meet the budget, by trying all of them."""
    found = None
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(len(PATHS)), n) for n in range(6)):
        left = left_of(parts, chosen)
        if left is not None and left <= share + 1e-9:
            error = sum(errors[n] for n in chosen)
            found = error if found is None else min(error, found)
    return found


def check(parts: Parts, errors: list[float], share: float) -> None:
    """Check the choice, and the least budget where there is none, against trying all."""
    removals = [removal(path, 0.0) for path in PATHS]
    program = PruningProgram(removals, (errors, {}), None, None, parts=parts)
    chosen, expected = program.best({"macs": share}), best(parts, errors, share)
    assert (chosen is None) == (expected is None)
    if chosen is None:
        least = program.least({"macs": share})["macs"]
        assert best(parts, errors, least) is not None
        assert best(parts, errors, least - 0.01) is None
    else:
        left = left_of(parts, chosen)
        assert left is not None
        assert left <= share + 1e-9
        assert program.left(chosen)["macs"] == pytest.approx(left)
        assert program.error(chosen) == expected


@pytest.mark.law("The choice for a budget is the cheapest, whatever removals save together")
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=3), max_size=4), min_size=PARTS, max_size=PARTS),
    st.lists(st.integers(1, 9).map(float), min_size=5, max_size=5),
    st.sampled_from([0.25, 0.5, 0.75]),
    st.just(set()) | st.sets(st.integers(0, 4), min_size=2, max_size=2),
)
def test_the_choice_is_the_best_where_savings_overlap_and_where_parts_die_together_only(
    ways: list[list[set[int]]], errors: list[float], share: float, apart: set[int]
) -> None:
    check(parts_of(ways, apart), errors, share)


def test_three_removals_that_overlap_in_pairs_are_found() -> None:
    saved = [{0, 1, 3}, {0, 1, 4}, {0, 2, 5}]
    ways = [[{2 + n} for n, parts in enumerate(saved) if part in parts] for part in range(PARTS)]
    check(parts_of(ways), [1.0] * 5, 0.25)


def test_what_several_removals_save_together_is_found_where_the_sum_falls_short() -> None:
    def lost(paths: tuple[str, ...]) -> set[str]:
        return {*paths, *(["shared"] if len(paths) == 5 else [])}

    removals = [removal(path, 0.1) for path in PATHS]
    sizes = dict.fromkeys(PATHS, 0.1) | {"shared": 0.3, "rest": 0.2}
    program = PruningProgram(
        removals, ([1.0] * 5, {}), None, None, parts=Parts({"macs": sizes, "parameters": sizes}, lost)
    )
    assert program.best({"macs": 0.3}) == frozenset(range(5))
    assert len(program.best({"macs": 0.7}) or ()) == 3
    assert program.best({"macs": 0.1}) is None
    assert program.least({"macs": 0.1, "parameters": 0.05}) == {"macs": 0.4, "parameters": 0.2}
    assert program.least({"macs": 0.1}) == {"macs": 0.2}


def test_removals_that_were_made_before_stay_and_count_as_neighbours() -> None:
    paths = [f"up_blocks.0.resnets.{number}" for number in range(3)]
    removals = [removal(path, 0.2) for path in paths]
    for gone, expected in (((), {0, 1}), ((0,), {1})):
        program = PruningProgram(removals, ([1.0, 2.0, 3.0], {}), None, (2, 3), gone)
        left = 1 - 0.2 * len(gone)
        assert program.best({"time": left - 0.2 * len(expected)}) == expected
        assert program.best({"time": left - 0.2 * len(expected) - 0.1}) is None
