"""Forecasts: what an inherited value is, as a weighted sum of the values of the last refreshes.

Every forecast is a handful of numbers that the host computes before a call; the sum over stored tensors has the same
form for all of them. Forecasts are specs: they print as text, parse back, and are saved with the passes that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite, prod
from typing import Literal, get_args

import torch

from .errors import ScheduleError
from .schedules import Run
from .spec import Spec

Coordinate = Literal["call", "lambda", "sigma"]


@dataclass(frozen=True)
class Forecast(Spec):
    """Base of all forecasts. Subclass it as a frozen dataclass and define `memory` and `weights`."""

    @property
    def memory(self) -> int:
        """How many refreshes the forecast looks back on."""
        raise NotImplementedError(f"{type(self).__name__}.memory")

    def weights(self, known: Sequence[int], call: int, run: Run) -> tuple[float, ...]:
        """The weights of the values from the calls `known` (oldest first, `memory` of them or fewer) at call `call`."""
        raise NotImplementedError(f"{type(self).__name__}.weights")

    def doubt(self, run: Run) -> str:
        """What a run makes of the forecast instead of what it says, and why, as a sentence; empty if nothing."""
        if run.random and self.memory > 1:
            return "the solver adds random numbers at each step, so the last features are repeated"
        return ""


@dataclass(frozen=True)
class Polynomial(Forecast):
    """The polynomial through the last refreshes, damped towards the last value: last + damping · (polynomial - last).

    At equal distances the undamped forecasts are TaylorSeer's by finite differences (Liu et al., 2025). Solvers with
    two or more steps amplify what a line overshoots: with DPM-Solver++ 2M Karras a line damped by half wins.

    Args:
        order: 0 repeats the last value, 1 is the line through the last two, 2 the parabola through the last three.
        damping: 0 repeats the last value, 1 is the polynomial.
        along: what the values are a polynomial of: "call" (its number), "lambda" (log(alpha / sigma)) or "sigma". The
            last two are known where a scheduler is: `sdgraph.attach(pipe)`, or `unet.expecting(scheduler)`; elsewhere
            the number of the call stands in for them, and a warning says so.
    Raises:
        ScheduleError: an order, damping or coordinate that there is not.
    """

    order: int = 1
    damping: float = 1.0
    along: Coordinate = "call"

    def __post_init__(self) -> None:
        if self.order not in (0, 1, 2) or isinstance(self.order, bool):
            raise ScheduleError(
                f"there is no forecast of order {self.order!r}", where="forecast", hint="0 (the last value), 1 or 2"
            )
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float) or not isfinite(self.damping):
            raise ScheduleError(
                f"the damping is {self.damping!r}", where="forecast", hint="0 repeats, 1 is the polynomial; 0.5 between"
            )
        if self.along not in get_args(Coordinate):
            hint = f"one of {', '.join(get_args(Coordinate))}"
            raise ScheduleError(f"there is no coordinate {self.along!r}", where="forecast", hint=hint)

    @property
    def memory(self) -> int:
        return self.order + 1 if self.damping else 1

    def weights(self, known: Sequence[int], call: int, run: Run) -> tuple[float, ...]:
        last = (*[0.0] * (len(known) - 1), 1.0)
        if len(known) == 1 or self.memory == 1 or run.random:
            return last
        *at, now = self._coordinates((*known, call), run)
        line = [prod((now - other) / (mine - other) for other in at if other != mine) for mine in at]
        return tuple(end + self.damping * (weight - end) for weight, end in zip(line, last, strict=True))

    def _coordinates(self, calls: Sequence[int], run: Run) -> list[float]:
        levels = [] if run.lambdas is None else [run.lambdas[call] for call in calls if call < len(run.lambdas)]
        if self.along == "call" or len(set(levels)) < len(calls):  # unknown, or the same twice as Heun has them
            return [float(call) for call in calls]
        return levels if self.along == "lambda" else [exp(-level) for level in levels]

    def doubt(self, run: Run) -> str:
        if self.along != "call" and run.lambdas is None and self.memory > 1:
            return (
                f"the number of the call takes the place of {self.along}, which nobody tells: sdgraph.attach(pipe) "
                "does, or unet.expecting(scheduler), for schedulers that have noise levels"
            )
        return super().doubt(run)


@dataclass(frozen=True)
class Fitted(Forecast):
    """Weights for the calls of one solver and number of steps, fitted to the error of the final latents.

    `sdgraph.fit_forecast` makes them. In another run `otherwise` takes their place, and a warning says so.

    Args:
        table: the weights of the values from the last refreshes, oldest first, for call 0, 1, ...; empty for calls that
            refresh.
        solver: the solver they were fitted for, as `Run.solver` names it.
        otherwise: the forecast for other solvers and other numbers of calls.
    """

    table: tuple[tuple[float, ...], ...]
    solver: str = ""
    otherwise: Forecast = Polynomial(1, 0.5)

    @property
    def memory(self) -> int:
        return max(self.otherwise.memory, *map(len, self.table))

    def weights(self, known: Sequence[int], call: int, run: Run) -> tuple[float, ...]:
        if not self.doubt(run) and call < len(self.table) and 0 < len(self.table[call]) <= len(known):
            fitted = self.table[call]
            return (*[0.0] * (len(known) - len(fitted)), *fitted)
        kept = known[-self.otherwise.memory :]
        return (*[0.0] * (len(known) - len(kept)), *self.otherwise.weights(kept, call, run))

    def doubt(self, run: Run) -> str:
        if (run.calls, run.solver) != (len(self.table), self.solver):
            return (
                f"the weights are fitted for {len(self.table)} calls of {self.solver}, and this run has "
                f"{run.calls or 'an unknown number'} of {run.solver or 'an unknown solver'}, so {self.otherwise} takes "
                "their place"
            )
        return super().doubt(run)


def weighted(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum of tensors of one shape; the tensor itself where it is the only one that counts."""
    terms = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight]
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    (total, first), *others = terms or [(values[-1], 0.0)]
    total = total * first
    for value, weight in others:
        total = torch.add(total, value, alpha=weight)
    return total


REPEAT = Polynomial(0)


def as_forecast(forecast: Forecast | int) -> Forecast:
    """The forecast that an order stands for; a forecast as it is.

    Raises:
        ScheduleError: it is neither.
    """
    if isinstance(forecast, Forecast):
        return forecast
    return Polynomial(forecast)
