"""Forecasts: inherited values as weighted sums of the values of the last refreshes.

Every forecast is a handful of numbers that the host computes before a call; the sum over stored tensors has the same
form for all of them. Forecasts are specs: they print as text, parse back, and are saved with the passes that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, prod
from typing import Annotated, ClassVar, Literal

import torch

from .errors import ScheduleError, SdgraphError
from .options import Bounds, Finite
from .schedules import SamplingRun
from .spec import Spec

__all__ = ["DAMPING", "Fitted", "Forecast", "Order", "Polynomial"]


def __dir__() -> list[str]:
    return __all__


Order = Literal[0, 1, 2]
Coordinate = Literal["call", "lambda", "sigma"]
DAMPINGS = -1.0, 2.0
DAMPING = Bounds(ge=DAMPINGS[0], le=DAMPINGS[1])


@dataclass(frozen=True)
class Forecast(Spec):
    """Base of all forecasts. Subclass it as a frozen dataclass and define `memory` and `weights`."""

    refusal: ClassVar[type[SdgraphError]] = ScheduleError

    @property
    def memory(self) -> int:
        """The number of refreshes that the forecast looks back on."""
        raise NotImplementedError(f"{type(self).__name__}.memory")

    def weights(self, known: Sequence[int], call: int, run: SamplingRun) -> tuple[float, ...]:
        """Return the weights of earlier values at a call, one for each.

        Args:
            known: the numbers of the calls that the values are from, oldest first; `memory` of them or fewer.
            call: the number of the call.
            run: the known facts about the generation.
        """
        raise NotImplementedError(f"{type(self).__name__}.weights")

    def doubt(self, run: SamplingRun) -> str:
        """Return a sentence that says what replaces the forecast in a run, and why; empty if nothing does.

        Args:
            run: the known facts about the generation.
        """
        if run.random and self.memory > 1:
            return "the solver adds random numbers at each step, so the last features are repeated"
        return ""


@dataclass(frozen=True)
class Polynomial(Forecast):
    """The polynomial through the last refreshes, damped towards the last value: last + damping · (polynomial - last).

    At equal distances the undamped forecasts are TaylorSeer's by finite differences. Where a line overshoots, as it
    does between few steps of a multistep solver, a damped forecast has the smaller error.

    Args:
        order: 0 repeats the last value, 1 is the line through the last two, 2 the parabola through the last three.
        damping: 0 repeats the last value, 1 is the polynomial. From -1 to 2; a search finds some outside of 0 to 1.
        along: the variable of the polynomial: "call" (its number), "lambda" (log(alpha / sigma)) or "sigma". The noise
            levels are known of an attached scheduler, or from `unet.expecting(scheduler)`; elsewhere the number of the
            call replaces them, and a warning says so.
    Raises:
        ScheduleError: the order, the damping or the variable is not one of those above.
    Example:
        `InheritFeatures("mid_block", Uniform(2), forecast=Polynomial(1, damping=0.5))`
    Source:
        TaylorSeer (Liu et al., 2025) for undamped forecasts.
    """

    order: Order = 1
    damping: Annotated[float, DAMPING] = 1.0
    along: Coordinate = "call"

    @property
    def memory(self) -> int:
        return self.order + 1 if self.damping else 1

    def weights(self, known: Sequence[int], call: int, run: SamplingRun) -> tuple[float, ...]:
        last = (*[0.0] * (len(known) - 1), 1.0)
        if len(known) == 1 or self.memory == 1 or run.random:
            return last
        *at, now = self._coordinates((*known, call), run)
        line = [prod((now - other) / (mine - other) for other in at if other != mine) for mine in at]
        return tuple(end + self.damping * (weight - end) for weight, end in zip(line, last, strict=True))

    def _coordinates(self, calls: Sequence[int], run: SamplingRun) -> list[float]:
        levels = [] if run.lambdas is None else [run.lambdas[call] for call in calls if call < len(run.lambdas)]
        if self.along == "call" or len(set(levels)) < len(calls):  # unknown, or the same twice as Heun has them
            return [float(call) for call in calls]
        return levels if self.along == "lambda" else [exp(-level) for level in levels]

    def doubt(self, run: SamplingRun) -> str:
        if self.along != "call" and run.lambdas is None and self.memory > 1:
            return (
                f"the noise levels are not known, so forecasts go by the number of the call instead of {self.along}. "
                "Use sdgraph.attach(pipe) or unet.expecting(scheduler), with a scheduler that has noise levels"
            )
        return super().doubt(run)


@dataclass(frozen=True)
class Fitted(Forecast):
    """Weights for the calls of one solver and number of steps, fitted to the error of the final latents.

    `sdgraph.fit_forecast` makes them. In another run `otherwise` takes their place, and a warning says so.

    Args:
        table: a row for every call: the weights of the values from the last refreshes, oldest first. The row of a call
            that refreshes is empty.
        solver: the solver that the weights were fitted for, as text.
        otherwise: the forecast for other solvers, and for other calls of the same solver.
        timesteps: the timesteps of the calls that the weights were fitted for; without any, only the number of calls is
            compared, which image-to-image and custom timesteps may share.
    Raises:
        ScheduleError: there are timesteps, but not one for every row.
    """

    table: Annotated[tuple[tuple[Finite, ...], ...], Bounds(length=1)]
    solver: str = ""
    otherwise: Forecast = Polynomial(1, 0.5)
    timesteps: tuple[Finite, ...] = ()

    @classmethod
    def of(cls, table: Sequence[Sequence[float]], run: SamplingRun, otherwise: Forecast) -> Fitted:
        """Return a forecast whose numbers are rounded, to print short.

        Args:
            table: the weights, a row for every call.
            run: the run that they were fitted for.
            otherwise: the forecast for other runs.
        """
        rows = tuple(tuple(round(weight, 4) for weight in row) for row in table)
        return cls(rows, run.solver, otherwise, _rounded(run.timesteps))

    def __post_init__(self) -> None:
        if len(self.timesteps) not in (0, len(self.table)):
            hint = "none, or one for every row of the table"
            raise ScheduleError(f"there are {len(self.timesteps)} timesteps", where="Fitted", hint=hint)

    @property
    def memory(self) -> int:
        return max(self.otherwise.memory, *map(len, self.table))

    def weights(self, known: Sequence[int], call: int, run: SamplingRun) -> tuple[float, ...]:
        if not self.doubt(run) and call < len(self.table) and 0 < len(self.table[call]) <= len(known):
            fitted = self.table[call]
            return (*[0.0] * (len(known) - len(fitted)), *fitted)
        kept = known[-self.otherwise.memory :]
        return (*[0.0] * (len(known) - len(kept)), *self.otherwise.weights(kept, call, run))

    def doubt(self, run: SamplingRun) -> str:
        if (run.calls, run.solver) != (len(self.table), self.solver):
            return (
                f"the weights are fitted for {len(self.table)} calls of {self.solver}, and this run has "
                f"{run.calls or 'an unknown number'} of {run.solver or 'an unknown solver'}, so {self.otherwise} takes "
                "their place"
            )
        if self.timesteps and self.timesteps != _rounded(run.timesteps):
            return (
                f"the weights are fitted for other timesteps than this run has, so {self.otherwise} takes their place"
            )
        return super().doubt(run)


def _rounded(timesteps: tuple[float, ...] | None) -> tuple[float, ...]:
    """Return timesteps as forecasts keep them: whole numbers print as such."""
    return tuple(int(time) if float(time).is_integer() else round(time, 2) for time in timesteps or ())


def weighted(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted sum of tensors of one shape: the last itself if its weight is 1, the others 0."""
    if weights[-1] == 1 and not any(weights[:-1]):
        return values[-1]
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = torch.add(total, value, alpha=weight)
    return total


REPEAT = Polynomial(0)


def as_forecast(forecast: Forecast | Order) -> Forecast:
    """Return the forecast itself, or the polynomial of an order.

    Raises:
        ScheduleError: the argument is neither a forecast nor an order.
    """
    return forecast if isinstance(forecast, Forecast) else Polynomial(forecast)
