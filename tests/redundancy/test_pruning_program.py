"""The integer program counts what savings really are, and finds the best choice where they overlap."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import hypothesis
import pytest
from hypothesis import strategies as st

from sdgraph.redundancy.pruning_program import SIZES, PruningProgram
from sdgraph.redundancy.redundancy import Removal

PATHS = tuple(f"down_blocks.{number}.resnets.0" for number in range(5))
PARTS = 8  # of which each removal saves some, and several removals may save the same
Saved = list[set[int]]


def removal(path: str, saved: float) -> Removal:
    return Removal(path, "layer", saved, saved, saved, (0.0,), 0.0)


def counting(saved: Saved, apart: frozenset[str]) -> Callable[[tuple[str, ...]], Mapping[str, float] | None]:
    """Return the function that counts what is left, where two removals may not be made together."""

    def measure(paths: tuple[str, ...]) -> Mapping[str, float] | None:
        if apart and apart <= set(paths):
            return None
        gone = set().union(*(saved[PATHS.index(path)] for path in paths)) if paths else set()
        return dict.fromkeys(SIZES, 1 - len(gone) / PARTS)

    return measure


def best(saved: Saved, errors: list[float], share: float, apart: frozenset[str]) -> float | None:
    """Return the least error of all choices that meet the budget, by trying all of them."""
    measure, found = counting(saved, apart), None
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(len(PATHS)), n) for n in range(6)):
        left = measure(tuple(PATHS[n] for n in chosen))
        if left is not None and left["macs"] <= share + 1e-9:
            error = sum(errors[n] for n in chosen)
            found = error if found is None else min(error, found)
    return found


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_the_choice_is_the_best_where_savings_overlap(data: st.DataObject) -> None:
    saved = [data.draw(st.sets(st.integers(0, PARTS - 1), max_size=4)) for _ in PATHS]
    errors = data.draw(st.lists(st.integers(1, 9).map(float), min_size=5, max_size=5))
    apart = frozenset(
        data.draw(st.sets(st.sampled_from(PATHS), min_size=2, max_size=2)) if data.draw(st.booleans()) else ()
    )
    share = data.draw(st.sampled_from([0.25, 0.5, 0.75]))
    removals = [removal(path, len(parts) / PARTS) for path, parts in zip(PATHS, saved, strict=True)]
    measure = counting(saved, apart)
    program = PruningProgram(removals, (errors, {}), None, None, measure=measure)
    chosen = program.best({"macs": share})
    expected = best(saved, errors, share, apart)
    if chosen is None:
        assert expected is None
        least = program.least({"macs": share})["macs"]
        assert best(saved, errors, least, apart) is not None
        assert best(saved, errors, least - 0.01, apart) is None
    else:
        left = measure(tuple(PATHS[n] for n in sorted(chosen)))
        assert left is not None
        assert left["macs"] <= share + 1e-9
        assert program.left(chosen)["macs"] == pytest.approx(left["macs"])
        assert program.error(chosen) == expected


def test_what_several_removals_save_together_is_found_where_the_sum_falls_short() -> None:
    def measure(paths: tuple[str, ...]) -> Mapping[str, float]:
        return dict.fromkeys(SIZES, 0.2 if len(paths) == 5 else 1 - 0.1 * len(paths))

    removals = [removal(path, 0.1) for path in PATHS]
    program = PruningProgram(removals, ([1.0] * 5, {}), None, None, measure=measure)
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
