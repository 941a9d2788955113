"""The choice of removals for budgets as an integer program, whose sizes are those of the pruned UNet."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SpecError
from ..extra import imported

SIZES = ("macs", "parameters")  # what can be counted; time is predicted
SAME = 1e-9  # difference of two shares that are equal but for rounding
Chosen = frozenset[int]
Measure = Callable[[tuple[str, ...]], Mapping[str, float] | None]


def block_of(path: str) -> str:
    """Return the path of the block that a path lies in, "" outside of blocks."""
    match = re.match(r"(down_blocks|up_blocks)\.\d+|mid_block", path)
    return match[0] if match else ""


@dataclass(frozen=True)
class PruningChoice:
    """Removals that were chosen for a budget.

    Args:
        paths: the module paths of the regions.
        error: the predicted error of the output, as in `Redundancy`.
        left: the shares of time, macs and parameters that are left; those of macs and parameters are exact if the UNet
            was given, and the others are predicted.
        gone: the regions of the analysis that the UNet had lost before.
    """

    paths: tuple[str, ...]
    error: float
    left: Mapping[str, float]
    gone: tuple[str, ...] = ()

    def __str__(self) -> str:
        left = ", ".join(f"{share:.3f} of the {name}" for name, share in self.left.items())
        return f"PruneBlocks({self.paths!r})  # left: {left}; predicted error {self.error:.2e}"


class PruningProgram:
    """A variable for each removal, one for each pair that was measured together, and one for each correction.

    Savings are added up over the removals. Where they do not add up, as if nothing reads a value any more once two
    regions are gone, the smallest combination that differs becomes a further variable, and the program is solved again.

    Args:
        removals: the removals, each with a `path`, a `level` and the shares that it saves.
        errors: the error of each removal, and of each pair of removals.
        costs: the cost of each removal, where it is not its error.
        neighbours: N and M, see `Redundancy.cheapest`.
        gone: the numbers of removals that were made before.
        measure: a function that counts what is left of the macs and parameters without some regions, or returns None if
            they cannot be removed together; None if there is no UNet to count in.
    """

    def __init__(
        self,
        removals: Sequence[Any],
        errors: tuple[Sequence[float], Mapping[tuple[int, int], float]],
        costs: Sequence[float] | None,
        neighbours: tuple[int, int] | None,
        gone: Collection[int] = (),
        measure: Measure | None = None,
    ) -> None:
        self._removals, self._gone, self._measure = removals, frozenset(gone), measure
        self._singles, joint = errors
        self._costs = list(self._singles if costs is None else costs)
        self._rules: list[tuple[dict[int, float], float]] = []  # coefficients of variables, and the bound of their sum
        self._corrections: list[tuple[int, Chosen, dict[str, float]]] = []
        self._pairs: list[tuple[Chosen, float]] = []
        for (a, b), error in joint.items():
            self._pairs.append((frozenset((a, b)), error - self._singles[a] - self._singles[b]))
            self._together((a, b), self._pairs[-1][1] if costs is None else 0.0)
        for a, first in enumerate(removals):
            for b, second in enumerate(removals):
                if second.path.startswith(f"{first.path}.") and not self._gone & {a, b}:
                    self._rules.append(({a: 1, b: 1}, 1))
        if neighbours is not None:
            self._limit(*neighbours)
        outermost = [n for n in self._gone if not any(self._inside(n, other) for other in self._gone)]
        self._before = {"time": 1 - sum(removals[n].time or 0.0 for n in outermost)}
        self._before |= (measure(()) if measure is not None else None) or dict.fromkeys(SIZES, 1.0)

    def best(self, budgets: Mapping[str, float]) -> Chosen | None:
        """Return the removals with the least error that meet all budgets, None if there are none."""
        searched = False
        while (chosen := self._solve(budgets)) is not None or not searched:
            if chosen is None:
                self._nearest(budgets)  # which may save more together than the program knows
                searched = True
            elif self._holds(chosen):
                left = self.left(chosen)
                if all(left[name] <= share + SAME for name, share in budgets.items()):
                    break
                others = set(range(len(self._removals))) - self._gone - chosen  # a solver's bounds are a little soft
                self._rules.append((dict.fromkeys(chosen, 1.0) | dict.fromkeys(others, -1.0), len(chosen) - 1))
        return chosen

    def least(self, budgets: Mapping[str, float]) -> dict[str, float]:
        """Return the least budgets that can be met, in the proportions of those that cannot, rounded up."""
        left = self.left(self._nearest(budgets))
        factor = max(left[name] / share for name, share in budgets.items())
        return {name: min(1.0, math.ceil(1000 * (factor * share - SAME)) / 1000) for name, share in budgets.items()}

    def _nearest(self, budgets: Mapping[str, float]) -> Chosen:
        """Return the removals that come closest to all budgets."""
        while not self._holds(chosen := self._solve(budgets, relaxed=True) or frozenset()):
            pass
        return chosen

    def left(self, chosen: Iterable[int]) -> dict[str, float]:
        """Return the shares that are left without some removals."""
        chosen = frozenset(chosen)
        found = {}
        for name, before in self._before.items():
            saved = [getattr(self._removals[n], name) or 0.0 for n in sorted(chosen)]
            more = [by.get(name, 0.0) for _, combination, by in self._corrections if combination <= chosen]
            found[name] = before - math.fsum(saved) + math.fsum(more)
        return found

    def error(self, chosen: Iterable[int]) -> float:
        """Return the predicted error without some removals, and without those that were made before."""
        every = frozenset(chosen) | self._gone
        both = [more for pair, more in self._pairs if pair <= every]
        return math.fsum([*(self._singles[n] for n in every), *both])

    def _solve(self, budgets: Mapping[str, float], relaxed: bool = False) -> Chosen | None:
        """Return the best removals by the program as it is; relaxed, those that come closest to all budgets."""
        rules, last = list(self._rules), len(self._costs)  # the last variable is the factor of all budgets
        for name, share in budgets.items():
            row = {n: -float(getattr(one, name)) for n, one in enumerate(self._removals) if n not in self._gone}
            row |= {variable: by.get(name, 0.0) for variable, _, by in self._corrections}
            rules.append((row | {last: -share}, -self._before[name]))
        costs = np.zeros(last + 1)
        if relaxed:
            costs[last] = 1.0
        else:
            costs[:last] = self._costs
            costs /= np.abs(costs).max() or 1.0
        matrix = np.zeros((len(rules), last + 1))
        for number, (coefficients, _) in enumerate(rules):
            matrix[number, list(coefficients)] = list(coefficients.values())
        low, high, whole = np.zeros(last + 1), np.ones(last + 1), np.ones(last + 1)
        low[list(self._gone)] = 1.0
        low[last], high[last], whole[last] = (0.0, np.inf, 0.0) if relaxed else (1.0, 1.0, 0.0)
        optimize = imported("scipy.optimize", "pruning")
        found = optimize.milp(
            costs,
            integrality=whole,
            bounds=optimize.Bounds(low, high),
            constraints=optimize.LinearConstraint(matrix, -np.inf, np.array([bound for _, bound in rules])),
        )
        if found.x is None:
            return None
        return frozenset(n for n in range(len(self._removals)) if found.x[n] > 0.5 and n not in self._gone)

    def _holds(self, chosen: Chosen) -> bool:
        """Return whether a choice leaves what the program predicts; otherwise the program has learned better."""
        if self._measure is None:
            return True
        if self._counted(chosen) is None:
            apart = self._smallest(chosen, lambda some: self._counted(some) is None)
            self._rules.append((dict.fromkeys(apart, 1.0), len(apart) - 1))
            return False
        if self._difference(chosen):
            combination = self._smallest(chosen, lambda some: bool(self._difference(some)))
            difference = self._difference(combination)
            self._corrections.append((self._together(combination, 0.0), combination, difference))
            return False
        return True

    def _smallest(self, chosen: Chosen, at_fault: Callable[[Chosen], bool]) -> Chosen:
        """Return removals of which none can be left out, so that they still are at fault."""
        for one in sorted(chosen):
            if len(chosen) > 1 and at_fault(chosen - {one}):
                chosen -= {one}
        return chosen

    def _counted(self, chosen: Chosen) -> Mapping[str, float] | None:
        assert self._measure is not None
        return self._measure(tuple(self._removals[n].path for n in sorted(chosen)))

    def _difference(self, chosen: Chosen) -> dict[str, float]:
        """Return by how much more is left than the program predicts, by name; empty if it predicts well."""
        counted, left = self._counted(chosen), self.left(chosen)
        found = {name: share - left[name] for name, share in (counted or {}).items()}
        return found if any(abs(more) > SAME for more in found.values()) else {}

    def _together(self, combination: Collection[int], cost: float) -> int:
        """Add a variable that is 1 if all removals of a combination are made, and return its number."""
        self._costs.append(cost)
        number = len(self._costs) - 1
        self._rules += [({number: 1.0, n: -1.0}, 0) for n in combination]
        self._rules.append((dict.fromkeys(combination, 1.0) | {number: -1.0}, len(combination) - 1))
        return number

    def _inside(self, one: int, other: int) -> bool:
        return bool(self._removals[one].path.startswith(f"{self._removals[other].path}."))

    def _limit(self, most: int, of: int) -> None:
        """Allow at most so many removals among so many of the same level and kind that follow each other in a block.

        Raises:
            SpecError: the limit is none.
        """
        if not 1 <= most <= of:
            raise SpecError(f"at most {most} of {of} neighbours", where="neighbours", hint="two numbers such as (2, 3)")
        runs: dict[tuple[str, str, str], list[int]] = {}
        for number, one in enumerate(self._removals):
            kind = re.sub(r"\d+", "", one.path.removeprefix(block_of(one.path)))
            runs.setdefault((block_of(one.path), one.level, kind), []).append(number)
        for run in runs.values():
            for begin in range(max(1, len(run) - of + 1)):
                window = run[begin : begin + of]
                if len(window) > most:
                    self._rules.append((dict.fromkeys(window, 1.0), max(most, len(self._gone & set(window)))))
