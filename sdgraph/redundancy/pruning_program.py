"""The choice of removals for budgets as an integer program, whose sizes are those of the pruned UNet."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..extra import imported

SAME = 1e-9  # difference of two shares that are equal but for rounding
Chosen = frozenset[int]


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


@dataclass(frozen=True)
class Parts:
    """The parts of a UNet that are counted: its weights, and its operations that multiply.

    Args:
        sizes: the share of the macs, and of the parameters, that each part has, by name of the part.
        lost: a function that returns the parts that nothing needs without some regions, whose paths it is given, or
            None if these cannot be removed together. Removing more regions never brings a part back.
    """

    sizes: Mapping[str, Mapping[str, float]]
    lost: Callable[[tuple[str, ...]], Collection[str] | None]


class PruningProgram:
    """A variable for each removal, one for each pair that was measured together, and one for each kind of part.

    The seconds that removals save are added up. Macs and parameters are those of the parts that are lost, and a part
    may be lost with any of several removals, or with several together only. The program begins with the belief that all
    parts are lost, and learns from its choices: a part that is there without some removals, but not without one more,
    needs one of the others. Every such rule is true, so that the program never saves too little, and its first choice
    that saves what it believes is the best one.

    Args:
        removals: the removals, each with a `path`, a `level` and the shares that it saves.
        errors: the error of each removal, and of each pair of removals.
        costs: the cost of each removal, where it is not its error.
        neighbours: N and M, see `Redundancy.cheapest`.
        gone: the numbers of removals that were made before.
        parts: the parts of the UNet that is pruned; None adds up macs and parameters as well.
    """

    def __init__(
        self,
        removals: Sequence[Any],
        errors: tuple[Sequence[float], Mapping[tuple[int, int], float]],
        costs: Sequence[float] | None,
        neighbours: tuple[int, int] | None,
        gone: Collection[int] = (),
        parts: Parts | None = None,
    ) -> None:
        self._removals, self._gone, self._parts = removals, frozenset(gone), parts
        self._free = frozenset(range(len(removals))) - self._gone
        self._singles, joint = errors
        self._costs = list(self._singles if costs is None else costs)
        self._rules: list[tuple[dict[int, float], float]] = []  # coefficients of variables, and the bound of their sum
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
        self._before = {"time": 1 - sum(removals[n].time or 0.0 for n in outermost), "macs": 1.0, "parameters": 1.0}
        self._needs: dict[
            str, frozenset[Chosen]
        ] = {}  # by part: of each of these sets one removal is needed to lose it
        self._known: dict[Chosen, frozenset[str] | None] = {}
        if parts is not None:
            self._before |= {name: math.fsum(sizes.values()) for name, sizes in parts.sizes.items()}
            self._needs = {part: frozenset() for sizes in parts.sizes.values() for part in sizes}

    def best(self, budgets: Mapping[str, float]) -> Chosen | None:
        """Return the removals with the least error that meet all budgets, None if there are none."""
        while (chosen := self._solve(budgets)) is not None:
            if self._holds(chosen, budgets):
                left = self.left(chosen)
                if all(left[name] <= share + SAME for name, share in budgets.items()):
                    break
                others = self._free - chosen  # a solver's bounds are a little soft
                self._rules.append((dict.fromkeys(chosen, 1.0) | dict.fromkeys(others, -1.0), len(chosen) - 1))
        return chosen

    def least(self, budgets: Mapping[str, float]) -> dict[str, float]:
        """Return the least budgets that can be met, in the proportions of those that cannot, rounded up."""
        while not self._holds(chosen := self._solve(budgets, relaxed=True) or frozenset(), budgets):
            pass
        left = self.left(chosen)
        factor = max(left[name] / share for name, share in budgets.items())
        return {name: min(1.0, math.ceil(1000 * (factor * share - SAME)) / 1000) for name, share in budgets.items()}

    def left(self, chosen: Collection[int]) -> dict[str, float]:
        """Return the shares that are left without some removals, which can be made together."""
        left = {
            name: before - math.fsum(getattr(self._removals[n], name) or 0.0 for n in sorted(chosen))
            for name, before in self._before.items()
        }
        if self._parts is not None:
            lost = self._lost(frozenset(chosen)) or ()
            for name, sizes in self._parts.sizes.items():
                left[name] = math.fsum(size for part, size in sizes.items() if part not in lost)
        return left

    def error(self, chosen: Iterable[int]) -> float:
        """Return the predicted error without some removals, and without those that were made before."""
        every = frozenset(chosen) | self._gone
        both = [more for pair, more in self._pairs if pair <= every]
        return math.fsum([*(self._singles[n] for n in every), *both])

    def _solve(self, budgets: Mapping[str, float], relaxed: bool = False) -> Chosen | None:
        """Return the best removals by the program as it is; relaxed, those that come closest to all budgets."""
        rules, costs = list(self._rules), list(self._costs)
        kinds: dict[frozenset[Chosen], int] = {}  # parts that are lost with the same removals share a variable
        rows: dict[str, dict[int, float]] = {}
        for name in budgets:
            row = rows[name] = dict[int, float]()
            if self._parts is None or name not in self._parts.sizes:
                row |= {n: -float(getattr(self._removals[n], name)) for n in self._free}
                continue
            for part, size in self._parts.sizes[name].items():
                variable = kinds.setdefault(self._needs[part], len(costs) + len(kinds))
                row[variable] = row.get(variable, 0.0) - size
        for needs, variable in kinds.items():
            rules += [({variable: 1.0} | dict.fromkeys(one_of, -1.0), 0) for one_of in needs]
        whole = np.array([1.0] * len(costs) + [0.0] * (len(kinds) + 1))
        last = len(whole) - 1  # the factor of all budgets
        rules += [(row | {last: -budgets[name]}, -self._before[name]) for name, row in rows.items()]
        objective = np.zeros(last + 1)
        if relaxed:
            objective[last] = 1.0
        else:
            objective[: len(costs)] = costs
            objective /= np.abs(objective).max() or 1.0
        matrix = np.zeros((len(rules), last + 1))
        for number, (coefficients, _) in enumerate(rules):
            matrix[number, list(coefficients)] = list(coefficients.values())
        low, high = np.zeros(last + 1), np.ones(last + 1)
        low[list(self._gone)] = 1.0
        low[last], high[last] = (0.0, np.inf) if relaxed else (1.0, 1.0)
        optimize = imported("scipy.optimize", "pruning")
        found = optimize.milp(
            objective,
            integrality=whole,
            bounds=optimize.Bounds(low, high),
            constraints=optimize.LinearConstraint(matrix, -np.inf, np.array([bound for _, bound in rules])),
        )
        if found.x is None:
            return None
        return frozenset(n for n in self._free if found.x[n] > 0.5)

    def _holds(self, chosen: Chosen, budgets: Collection[str]) -> bool:
        """Return whether a choice loses all parts that the program believes; otherwise the program has learned."""
        if self._parts is None:
            return True
        lost = self._lost(chosen)
        if lost is None:
            for one in sorted(chosen):
                if self._lost(chosen - {one}) is None:
                    chosen -= {one}  # it is not at fault
            self._rules.append((dict.fromkeys(chosen, 1.0), len(chosen) - 1))
            return False
        counted = [part for name, sizes in self._parts.sizes.items() if name in budgets for part in sizes]
        believed = [p for p in counted if p not in lost and all(one_of & chosen for one_of in self._needs[p])]
        for part in believed:
            if all(one_of & chosen for one_of in self._needs[part]):  # and it has not been learned with another part
                made = self._without_losing(part, chosen)
                present = self._needs.keys() - (self._lost(made) or frozenset())
                for other in present.intersection(believed):
                    self._needs[other] |= {self._free - made}
        return not believed

    def _without_losing(self, part: str, chosen: Chosen) -> Chosen:
        """Return removals, as many as possible, that can be made together with some without losing a part."""

        def extended(made: Chosen, more: list[int]) -> Chosen:
            lost = self._lost(made.union(more))
            if lost is not None and part not in lost:
                return made.union(more)
            if len(more) == 1:
                return made
            half = len(more) // 2
            return extended(extended(made, more[:half]), more[half:])

        others = [n for n in sorted(self._free - chosen) if part not in self._lost_alone[n]]
        return extended(chosen, others) if others else chosen

    @cached_property
    def _lost_alone(self) -> dict[int, Collection[str]]:
        """The parts that are lost with each removal; none if it cannot be made alone."""
        return {n: self._lost(frozenset((n,))) or () for n in self._free}

    def _lost(self, chosen: Chosen) -> frozenset[str] | None:
        """Return the parts that are lost with some removals; None if these cannot be made together."""
        assert self._parts is not None
        if chosen not in self._known:
            outermost = [n for n in sorted(chosen) if not any(self._inside(n, other) for other in chosen)]
            lost = self._parts.lost(tuple(self._removals[n].path for n in outermost))
            self._known[chosen] = None if lost is None else frozenset(lost)
        return self._known[chosen]

    def _together(self, combination: Collection[int], cost: float) -> None:
        """Add a variable that is 1 if all removals of a combination are made."""
        self._costs.append(cost)
        number = len(self._costs) - 1
        self._rules += [({number: 1.0, n: -1.0}, 0) for n in combination]
        self._rules.append((dict.fromkeys(combination, 1.0) | {number: -1.0}, len(combination) - 1))

    def _inside(self, one: int, other: int) -> bool:
        return bool(self._removals[one].path.startswith(f"{self._removals[other].path}."))

    def _limit(self, most: int, of: int) -> None:
        """Allow at most so many removals among so many of the same level and kind that follow each other in a block."""
        runs: dict[tuple[str, str, str], list[int]] = {}
        for number, one in enumerate(self._removals):
            kind = re.sub(r"\d+", "", one.path.removeprefix(block_of(one.path)))
            runs.setdefault((block_of(one.path), one.level, kind), []).append(number)
        for run in runs.values():
            for begin in range(max(1, len(run) - of + 1)):
                window = run[begin : begin + of]
                if len(window) > most:
                    self._rules.append((dict.fromkeys(window, 1.0), max(most, len(self._gone & set(window)))))
