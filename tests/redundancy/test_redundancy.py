"""Choices are the best there are, keep their limits, and files of an analysis are read whole or refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from sdgraph.errors import SavedError, SpecError
from sdgraph.redundancy.redundancy import JointRemoval, Redundancy, Removal

PATHS = (
    "down_blocks.0.resnets.0",
    "down_blocks.0.resnets.1",
    "down_blocks.0.resnets.2",
    "down_blocks.0.resnets.3",
    "mid_block",
    "mid_block.resnets.0",
)


def removal(path: str, error: float, saved: float, **others: float) -> Removal:
    level = "block" if path == "mid_block" else "layer"
    shares = {"parameters": saved, "macs": saved, "time": saved, **others}
    return Removal(path, level, errors=(error, error), similarity=0.5, **shares)


def analysis(errors: Any, saved: Any, pairs: tuple[JointRemoval, ...] = ()) -> Redundancy:
    removals = tuple(removal(path, e, s) for path, e, s in zip(PATHS, errors, saved, strict=True))
    return Redundancy("0" * 32, "eager", 2, (900.0, 100.0), (0.9, 0.1), removals, pairs)


def cheapest(found: Redundancy, budget: float, neighbours: tuple[int, int] | None) -> float | None:
    """The least error of all subsets that keep the limits, by trying all of them; None if there is no such subset."""
    best = None
    numbers = range(len(found.removals))
    for chosen in itertools.chain.from_iterable(itertools.combinations(numbers, n) for n in range(len(PATHS) + 1)):
        paths = [PATHS[n] for n in chosen]
        if {"mid_block", "mid_block.resnets.0"} <= set(paths):
            continue
        if neighbours and any(sum(PATHS[n] in paths for n in (a, a + 1, a + 2)) > neighbours[0] for a in (0, 1)):
            continue
        if sum(found.removals[n].time for n in chosen) < 1 - budget - 1e-9:
            continue
        error = sum(found.error(found.removals[n]) for n in chosen)
        for pair in found.pairs:
            if set(pair.paths) <= set(paths):
                error += found.error(pair) - sum(found.error(one) for one in found.removals if one.path in pair.paths)
        best = error if best is None else min(best, error)
    return best


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_a_choice_is_the_best_of_all_subsets(data: st.DataObject) -> None:
    tenths = st.integers(0, 10).map(lambda n: n / 10)
    errors = data.draw(st.lists(tenths, min_size=6, max_size=6))
    saved = data.draw(st.lists(st.integers(-1, 4).map(lambda n: n / 10), min_size=6, max_size=6))
    pairs = (
        JointRemoval((PATHS[0], PATHS[1]), (data.draw(tenths),) * 2),
        JointRemoval((PATHS[1], PATHS[2]), (data.draw(tenths),) * 2),
    )
    found = analysis(errors, saved, pairs)
    budget, neighbours = (
        data.draw(st.sampled_from([0.35, 0.55, 0.75, 0.95])),
        data.draw(st.sampled_from([None, (2, 3)])),
    )
    expected = cheapest(found, budget, neighbours)
    if expected is None:
        with pytest.raises(SpecError, match="no choice meets time="):
            found.cheapest(time=budget, neighbours=neighbours)
        return
    choice = found.cheapest(time=budget, neighbours=neighbours)
    assert choice.error == pytest.approx(expected)
    assert choice.left["time"] <= budget + 1e-9


def test_several_budgets_hold_at_once_and_noise_weights_errors() -> None:
    found = analysis([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.1] * 6)
    few = Redundancy(
        found.model, "eager", 2, (900.0, 100.0), (0.9, 0.1),
        (removal(PATHS[0], 0.1, 0.2, parameters=0.0), removal(PATHS[4], 0.5, 0.0, parameters=0.2)),
    )  # fmt: skip
    assert few.cheapest(time=0.8).paths == (PATHS[0],)
    assert few.cheapest(time=0.8, parameters=0.8).paths == (PATHS[0], PATHS[4])
    early = Removal("mid_block", "block", 0.1, 0.1, 0.1, errors=(1.0, 0.0), similarity=0.0)
    assert few.error(early) == pytest.approx(0.9)


def test_a_budget_that_nothing_meets_names_the_least_possible() -> None:
    found = analysis([0.1] * 6, [0.1, 0.1, 0.1, 0.1, 0.2, 0.1])
    with pytest.raises(SpecError, match="no choice meets time") as caught:
        found.cheapest(time=0.3)
    assert "the least possible is time=0.5" in caught.value.hint  # of four layers three may go
    with pytest.raises(SpecError, match="there is no budget"):
        found.cheapest()
    for wrong in (0.0, 1.2, -1, "0.7", float("nan")):
        with pytest.raises(SpecError):
            found.cheapest(time=wrong)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="neighbours is \\(3, 2\\)"):
        found.cheapest(time=0.9, neighbours=(3, 2))


def test_an_analysis_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = analysis([0.1] * 6, [0.2] * 6, (JointRemoval((PATHS[0], PATHS[1]), (0.1, 0.3)),))
    found.save(tmp_path / "analysis.json")
    assert Redundancy.load(tmp_path / "analysis.json") == found
    assert "mid_block.resnets.0" in str(found)
    assert str(found.cheapest(time=0.8)).startswith("PruneBlocks((")


CHANGES: dict[str, Any] = {
    "no format": lambda plain: plain.pop("format"),
    "another format": lambda plain: plain.update(format=2),
    "no removals": lambda plain: plain.update(removals=[]),
    "a field is gone": lambda plain: plain["removals"][0].pop("time"),
    "an unknown field": lambda plain: plain.update(more=1),
    "a text for a number": lambda plain: plain["removals"][0].update(time="fast"),
    "no finite number": lambda plain: plain["removals"][0].update(errors=[float("nan"), 1.0]),
    "too few errors": lambda plain: plain["removals"][0].update(errors=[1.0]),
    "a pair of unknown regions": lambda plain: plain["pairs"][0].update(paths=["a", "b"]),
    "a list for an object": lambda plain: plain.update(removals=[[1]]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    found = analysis([0.1] * 6, [0.2] * 6, (JointRemoval((PATHS[0], PATHS[1]), (0.1, 0.3)),))
    file = tmp_path / "analysis.json"
    found.save(file)
    plain = json.loads(file.read_text())
    CHANGES[name](plain)
    file.write_text(json.dumps(plain))
    with pytest.raises(SavedError):
        Redundancy.load(file)
    file.write_text(json.dumps(plain)[:-40])
    with pytest.raises(SavedError):
        Redundancy.load(file)
