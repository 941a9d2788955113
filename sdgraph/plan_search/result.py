"""The result of a search."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import log10
from typing import Any

from ..compiler.passes import Chain
from ..views.format import format_table
from ..views.timetable import Timetable

TRUSTED = 2.0  # a prediction within this factor is as good as they are


@dataclass(frozen=True)
class Row:
    """A way of generating, and what came of it.

    Args:
        name: the way.
        share: its cost, as a share of that of all steps.
        predicted: error of the final latents on the validation prompts: their root mean square, relative to the
            latents, the geometric mean over the prompts. None if it was not measured.
        held_out: the same on the held-out prompts.
    """

    name: str
    share: float
    predicted: float | None
    held_out: float


@dataclass(frozen=True)
class SearchResult:
    """The result of a search. Prints as a table.

    Args:
        passes: the candidates that are used, with their schedules and forecasts.
        timetable: what the calls do.
        rows: the plan that was chosen, the best even spacing, the solver with fewer steps in the same time, rounded up
            to whole steps, and with all steps.
        moved: whether the chosen plan is another one than the even spacing, and better on the held-out prompts.
        prompts: how many the search saw, without those that were passed as held out.
        reference_steps: the number of steps of the latents that errors are differences from.
        steps: the number of steps of the generations.
        config: the configuration of the UNet that was searched on.
    """

    passes: Chain
    timetable: Timetable
    rows: tuple[Row, ...]
    moved: bool
    prompts: int
    reference_steps: int
    steps: int
    config: Mapping[str, Any] = field(repr=False)

    @property
    def predicted(self) -> float:
        """The error of the chosen plan on the validation prompts."""
        return self.rows[0].predicted or 0.0

    @property
    def measured(self) -> float:
        """The error of the chosen plan on the held-out prompts."""
        return self.rows[0].held_out

    @property
    def warning(self) -> str:
        """What is to be said if the prediction is off by more than a factor of two; else nothing."""
        ratio = max(self.measured, 1e-12) / max(self.predicted, 1e-12)
        if 1 / TRUSTED <= ratio <= TRUSTED:
            return ""
        off = f"{ratio:.2g} times" if ratio > 1 else f"1/{1 / ratio:.2g} of"
        return (
            f"the error on the held-out prompts is {off} what was predicted (prompts: {self.prompts}), so the error on "
            f"other prompts is not known either: search on more prompts, such as {max(32, 2 * self.prompts)}"
        )

    def __str__(self) -> str:
        rows = [("", "cost", "predicted", "held out", "")]
        for row in self.rows:
            predicted = "" if row.predicted is None else _decibels(row.predicted)
            rows.append((row.name, f"{row.share:.3f}", predicted, _decibels(row.held_out), f"{row.held_out:.2%}"))
        told = [f"errors of the final latents, relative to the latents of {self.reference_steps} steps"]
        if not self.moved:
            told.append("no move from the even spacing helped on the held-out prompts")
        if self.warning:
            told.append(f"warning: {self.warning}")
        notes = [textwrap.fill(note, 110, initial_indent="  ", subsequent_indent="  ") for note in told]
        return "\n".join([*map(str, self.passes.passes), str(self.timetable), format_table(rows), *notes])

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `sdgraph.parse` reads the passes."""
        return {
            "passes": str(self.passes),
            "steps": self.steps,
            "solver": self.timetable.run.solver,
            "unet": {name: value for name, value in self.config.items() if not name.startswith("_")},
            "rows": [asdict(row) for row in self.rows],
            "moved": self.moved,
            "prompts": self.prompts,
            "reference_steps": self.reference_steps,
            "warning": self.warning or None,
            "timetable": self.timetable.as_dict(),
        }


def _decibels(error: float) -> str:
    return f"{-20 * log10(max(error, 1e-12)):.1f} dB"
