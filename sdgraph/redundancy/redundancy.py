"""`Redundancy`: what each region of a UNet is worth, and the removals that cost least for a budget."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np

from ..atomic import written
from ..errors import SavedError, SpecError
from ..extra import imported
from ..options import Bounds, checked
from ..text import json_object
from ..views.format import format_table

Level = Literal["block", "layer", "unit"]
LEVELS: tuple[Level, ...] = ("block", "layer", "unit")
FORMAT = 1
Share = Annotated[float, Bounds(gt=0, le=1)]
Criterion = Literal["error", "gate"]
BUDGETS = ("time", "macs", "parameters")


def block_of(path: str) -> str:
    """Return the path of the block that a path lies in, "" outside of blocks."""
    match = re.match(r"(down_blocks|up_blocks)\.\d+|mid_block", path)
    return match[0] if match else ""


@dataclass(frozen=True)
class Removal:
    """The removal of one region.

    Args:
        path: the module path of the region.
        level: its level.
        parameters: the share of all parameters that it saves, with what is not needed any more after it.
        macs: the share of the multiply-accumulates of a call that it saves.
        time: the share of the seconds of a call that it saves on the target; noise can make it negative.
        errors: the squared error of the output relative to the squared output, by call that was measured.
        similarity: the cosine similarity of the region's output and of the value that replaces it.
        latents: the error of the final latents relative to the latents; None if it was not measured.
        gate: the learned gate, from 0 for a region that is not needed to 1; None if it was not learned.
    """

    path: str
    level: str
    parameters: float
    macs: float
    time: float
    errors: tuple[float, ...]
    similarity: float
    latents: float | None = None
    gate: float | None = None


@dataclass(frozen=True)
class JointRemoval:
    """The removal of two neighbouring regions together.

    Args:
        paths: their module paths.
        errors: the error of the output without both, as in `Removal`.
    """

    paths: tuple[str, str]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Redundancy:
    """The redundancy of the regions of a UNet. Prints as a table, the most redundant region first.

    Args:
        model: the hash of the UNet: of its operations and weights.
        target: what was timed.
        prompts: the number of prompts.
        timesteps: the timesteps of the calls on which errors were measured.
        noise: the share of noise in the samples of these calls, which weights their errors.
        removals: the regions that can be removed alone, in the order of the UNet.
        pairs: pairs of neighbours that were removed together.
        fixed: the regions that cannot be removed alone, and why not.
    """

    model: str
    target: str
    prompts: int
    timesteps: tuple[float, ...]
    noise: tuple[float, ...]
    removals: tuple[Removal, ...]
    pairs: tuple[JointRemoval, ...] = ()
    fixed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def error(self, removal: Removal | JointRemoval) -> float:
        """Return the mean of the errors of a removal over the calls, weighted by their noise.

        Args:
            removal: the removal of one region, or of two together.
        Returns:
            The squared error of the output, relative to the squared output.
        """
        return float(np.average(removal.errors, weights=self.noise))

    def cost(self, removal: Removal, criterion: Criterion = "error") -> float:
        """Return the cost of a removal by a criterion.

        Args:
            removal: the removal of one region.
            criterion: "error" is `error`, "gate" the learned gate.
        Raises:
            SpecError: the gate was not learned.
        """
        if criterion == "error":
            return self.error(removal)
        if removal.gate is None:
            raise SpecError(
                f"the analysis has no gate of {removal.path}",
                where="criterion",
                hint="learn it: sdgraph.analyse(..., gates=100)",
            )
        return removal.gate

    @checked(SpecError)
    def cheapest(
        self,
        *,
        time: Share | None = None,
        macs: Share | None = None,
        parameters: Share | None = None,
        neighbours: tuple[int, int] | None = (2, 3),
        criterion: Criterion = "error",
    ) -> PruningChoice:
        """Choose the removals that cost least for one or more budgets, by integer programming.

        Costs and savings are added up over the removals; pairs that were measured together correct the sum of their
        errors. No region is removed within another one that is.

        Args:
            time: the seconds of a call that may be left, as a share of those of the whole UNet.
            macs: the multiply-accumulates of a call that may be left, as a share.
            parameters: the parameters that may be left, as a share.
            neighbours: N and M: of M layers that follow each other in a block at most N are removed, because runs of
                removals recover badly; None for no limit.
            criterion: the cost of a removal: the "error" of the output, or the learned "gate".
        Returns:
            The choice, whose `paths` are those of a `PruneBlocks`.
        Raises:
            SpecError: no budget, or one that no choice meets; the error names the least possible share. Or there are
                no gates.
            ExtraError: scipy is not installed.
        Example:
            `PruneBlocks(redundancy.cheapest(time=0.7).paths)`
        Source:
            The knapsack over additive output errors is LAPTOP-Diff's (Zhang et al., 2024), the limit for neighbours
            TinyFusion's (Fang et al., 2025).
        """
        budgets = {name: b for name, b in zip(BUDGETS, (time, macs, parameters), strict=True) if b is not None}
        if not budgets:
            raise SpecError("there is no budget", where="cheapest", hint="time=0.7, macs=0.7 or parameters=0.7")
        program = _Program(self, neighbours, criterion)
        chosen = program.solve(budgets)
        if chosen is None:
            parts = []
            for name in budgets:
                most = program.most(name)
                parts.append(f"{name}={1 - most:.3g}")
            raise SpecError(
                f"no choice meets {', '.join(f'{name}={share:g}' for name, share in budgets.items())}",
                where="cheapest",
                hint=f"the least possible shares, each alone, are {', '.join(parts)}"
                + (", or neighbours=None" if neighbours else ""),
            )
        picked = tuple(self.removals[i] for i in chosen)
        return PruningChoice(
            tuple(one.path for one in picked),
            program.error(chosen),
            {name: 1 - sum(float(getattr(one, name)) for one in picked) for name in BUDGETS},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the analysis to a JSON file.

        Args:
            path: the file.
        """
        plain = {"format": FORMAT, **dataclasses.asdict(self)}
        with written(Path(path)) as file:
            file.write_text(json.dumps(plain, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read an analysis that `save` wrote.

        Args:
            path: the file.
        Returns:
            The analysis, equal to the one that was saved.
        Raises:
            SavedError: the file is missing, damaged, incomplete or of another format.
        """
        hint = "measure again: sdgraph.analyse, or the command that wrote it"
        plain = json_object(Path(path), SavedError, hint=hint)
        if plain.pop("format", None) != FORMAT:
            raise SavedError("the file is no analysis of this version", where=str(path), hint=hint)
        try:
            removals = tuple(
                Removal(**{**one, "errors": tuple(map(_number, one["errors"]))}) for one in plain.pop("removals")
            )
            pairs = tuple(
                JointRemoval((one["paths"][0], one["paths"][1]), tuple(map(_number, one["errors"])))
                for one in plain.pop("pairs")
            )
            for one in removals:
                for name in (*BUDGETS, "similarity"):
                    _number(getattr(one, name))
                for number in (one.latents, one.gate):
                    if number is not None:
                        _number(number)
            read = cls(
                removals=removals, pairs=pairs, timesteps=tuple(map(_number, plain.pop("timesteps"))),
                noise=tuple(map(_number, plain.pop("noise"))), **plain,
            )  # fmt: skip
            errors = [*(one.errors for one in removals), *(pair.errors for pair in pairs)]
            sizes = {len(read.timesteps), len(read.noise), *map(len, errors)}
            if len(sizes) != 1 or not removals or {name for p in pairs for name in p.paths} - set(read._index):
                raise ValueError("its parts do not fit together")
        except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            raise SavedError(f"the analysis is damaged: {error}", where=str(path), hint=hint) from error
        return read

    @cached_property
    def _index(self) -> dict[str, int]:
        return {one.path: number for number, one in enumerate(self.removals)}

    def __str__(self) -> str:
        rows = [("region", "level", "error", "latents", "similarity", "gate", "parameters", "MACs", "time")]
        for one in sorted(self.removals, key=self.error):
            drift = "" if one.latents is None else f"{one.latents:.1%}"
            gate = "" if one.gate is None else f"{one.gate:.3f}"
            rows.append(
                (
                    one.path, one.level, f"{self.error(one):.2e}", drift, f"{one.similarity:.3f}", gate,
                    f"{one.parameters:.1%}", f"{one.macs:.1%}", f"{one.time:.1%}",
                )
            )  # fmt: skip
        told = (
            f"error: squared error of the output without the region, relative to the squared output, at "
            f"{len(self.timesteps)} timesteps of {self.prompts} prompts, weighted by their noise.\n"
            f"Parameters, MACs and time ({self.target}): what the removal saves."
        )
        fixed = f"\n{len(self.fixed)} regions cannot be removed alone." if self.fixed else ""
        return f"{format_table(rows)}\n\n{told}{fixed}"


@dataclass(frozen=True)
class PruningChoice:
    """Removals that were chosen for a budget.

    Args:
        paths: the module paths of the regions.
        error: the predicted error of the output, as in `Redundancy`.
        left: the predicted shares of time, macs and parameters that are left.
    """

    paths: tuple[str, ...]
    error: float
    left: Mapping[str, float]

    def __str__(self) -> str:
        left = ", ".join(f"{share:.3f} of the {name}" for name, share in self.left.items())
        return f"PruneBlocks({self.paths!r})  # predicted: {left}; error {self.error:.2e}"


class _Program:
    """The choice as an integer program: a variable for each removal, and one for each pair that was measured."""

    def __init__(
        self, redundancy: Redundancy, neighbours: tuple[int, int] | None, criterion: Criterion = "error"
    ) -> None:
        self.removals, index = redundancy.removals, redundancy._index
        singles = [redundancy.error(one) for one in self.removals]
        self.pairs = [(index[pair.paths[0]], index[pair.paths[1]]) for pair in redundancy.pairs]
        joint = [
            redundancy.error(pair) - singles[a] - singles[b]
            for pair, (a, b) in zip(redundancy.pairs, self.pairs, strict=True)
        ]
        self.errors = np.array([*singles, *joint])
        self.costs = self.errors
        if criterion != "error":
            costs = [redundancy.cost(one, criterion) for one in self.removals]
            self.costs = np.array([*costs, *(0.0 for _ in joint)])
        self.rules: list[tuple[dict[int, float], float]] = []  # coefficients of variables, and what they may add up to
        for a, first in enumerate(self.removals):
            for b, second in enumerate(self.removals):
                if second.path.startswith(f"{first.path}."):
                    self.rules.append(({a: 1, b: 1}, 1))
        if neighbours is not None:
            most, of = neighbours
            if not 1 <= most <= of:
                raise SpecError(
                    f"at most {most} of {of} neighbours", where="neighbours", hint="two numbers such as (2, 3)"
                )
            for run in self._runs():
                for begin in range(max(1, len(run) - of + 1)):
                    window = run[begin : begin + of]
                    if len(window) > most:
                        self.rules.append((dict.fromkeys(window, 1.0), most))
        for number, (a, b) in enumerate(self.pairs, len(self.removals)):
            self.rules += [({number: 1, a: -1}, 0), ({number: 1, b: -1}, 0), ({a: 1, b: 1, number: -1}, 1)]

    def error(self, chosen: Sequence[int]) -> float:
        """Return the predicted error of a choice."""
        both = [n for n, (a, b) in enumerate(self.pairs, len(self.removals)) if a in chosen and b in chosen]
        return float(self.errors[[*chosen, *both]].sum())

    def solve(self, budgets: Mapping[str, float]) -> list[int] | None:
        """Return the numbers of the removals with the least error that meet all budgets, None if there are none."""
        saved = [({i: -float(getattr(one, name)) for i, one in enumerate(self.removals)}, share - 1)
                 for name, share in budgets.items()]  # fmt: skip
        return self._minimum(self.costs, saved)

    def most(self, name: str) -> float:
        """Return the largest share that can be saved of one budget."""
        saving = np.zeros(len(self.costs))
        saving[: len(self.removals)] = [getattr(one, name) for one in self.removals]
        return float(saving[self._minimum(-saving, [])].sum())

    def _minimum(self, costs: Any, more: Sequence[tuple[dict[int, float], float]]) -> list[int] | None:
        optimize = imported("scipy.optimize", "pruning")
        rules = [*self.rules, *more]
        matrix, bounds = np.zeros((len(rules), len(costs))), np.array([bound for _, bound in rules])
        for row, (coefficients, _) in enumerate(rules):
            for column, value in coefficients.items():
                matrix[row, column] = value
        constraints = optimize.LinearConstraint(matrix, -np.inf, bounds) if rules else ()
        scale = np.abs(costs).max() or 1.0
        found = optimize.milp(
            costs / scale, integrality=np.ones(len(costs)), bounds=optimize.Bounds(0, 1), constraints=constraints
        )
        if found.x is None:
            return None
        return [number for number, value in enumerate(found.x[: len(self.removals)]) if value > 0.5]

    def _runs(self) -> list[list[int]]:
        """Return the removals of the same level and kind that follow each other in a block."""
        runs: dict[tuple[str, str, str], list[int]] = {}
        for number, one in enumerate(self.removals):
            kind = re.sub(r"\d+", "", one.path.removeprefix(block_of(one.path)))
            runs.setdefault((block_of(one.path), one.level, kind), []).append(number)
        return list(runs.values())


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)
