"""The log of a training run: the terms of the loss by step, as numbers, as text and as a picture."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..atomic import written
from ..errors import TuningError
from ..extra import imported
from ..runtime.masks_by_call import MasksByCall
from ..spec import read
from ..text import json_object

LOG = "loss.csv"
PRUNING, CHOICE = "pruning", "pruning.json"  # the folder of the search of a learned pruning, and what it has chosen
ROUTING = "routing.json"  # what a learned routing has learned
LEARNED_FORMAT = 1  # of these two files
GATE = "gate "  # before the path of a region, in the columns of such a search
COLUMNS = ("learning_rate", "gradient_norm", "loss")  # before the terms of the loss
WINDOW = 50  # steps that one figure of the text is the mean of, at the beginning and at the end
log = logging.getLogger("sdgraph")


@dataclass(frozen=True)
class TuningReport:
    """The log of a training run.

    Args:
        output_dir: the folder of the run.
        names: the columns: "step", "seconds", "learning_rate", "gradient_norm", "loss", and the terms of the loss.
        rows: the figures of every step, in the order of the columns; seconds are those since the run began.
        search: the log of the steps before, if they have learned what to prune; it has a column "gate PATH" for each
            region.
        chosen: the pass that a search has chosen, and what it leaves; "" of any other log.
        routing: the masks by call that were learned, whose `switch` makes them a UNet; None of any other log.
    Example:
        `report.column("loss")[-1]`, `print(report)`
    """

    output_dir: Path
    names: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    search: TuningReport | None = None
    chosen: str = ""
    routing: MasksByCall | None = None

    @classmethod
    def of(cls, output_dir: Path) -> TuningReport:
        """Return the log of a run, read from its folder.

        Args:
            output_dir: the folder of the run.
        """
        names, rows = _read(output_dir / LOG)
        hint = "delete it; the same command writes it again"
        before, chosen = output_dir / PRUNING, output_dir / CHOICE
        search = cls.of(before) if (before / CHOICE).exists() else None
        text = _described(json_object(chosen, TuningError, hint=hint, format=LEARNED_FORMAT)) if chosen.exists() else ""
        figures, routed = tuple(tuple(map(float, row)) for row in rows), output_dir / ROUTING
        routing = None
        if routed.exists():
            masks = read(json_object(routed, TuningError, hint=hint, format=LEARNED_FORMAT)["masks"], MasksByCall)
            routing = masks if isinstance(masks, MasksByCall) else None
        return cls(output_dir, names, figures, search, text, routing)

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of the columns of the loss and its terms."""
        return tuple(name for name in self.names[4:] if not name.startswith(GATE))

    @property
    def gates(self) -> tuple[str, ...]:
        """The names of the columns of gates."""
        return tuple(name for name in self.names if name.startswith(GATE))

    def column(self, name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return a column, (steps,).

        Args:
            name: the name of the column.
        """
        return np.array([row[self.names.index(name)] for row in self.rows])

    def __str__(self) -> str:
        before = "" if self.search is None else f"{self.search}\n"
        if not self.rows:
            return f"{before}the log of the run is gone: {self.output_dir}"
        count = len(self.rows)
        twice = count >= 2 * WINDOW  # a shorter run has steps that would count in both means
        means = f"means of its first and last {WINDOW} steps" if twice else "mean of all steps"
        steps = f"{count} step{'s' * (count > 1)} in {self.column('seconds')[-1]:.0f} s"
        lines = [f"{steps}: {self.output_dir}", f"  {means}:"]
        width = max(len(name) for name in self.losses)
        for name in self.losses:
            values = self.column(name)
            parts = (values[:WINDOW], values[-WINDOW:]) if twice else (values,)
            lines.append(f"  {name.ljust(width)}  {' -> '.join(f'{part.mean():.4g}' for part in parts)}")
        for name in sorted(self.gates, key=lambda name: self.column(name)[-1]):
            values = self.column(name)
            lines.append(f"  {' -> '.join(f'{value:.2f}' for value in values[[0, count // 2, -1]])}  {name}")
        if self.chosen:
            lines.append(f"  chosen: {self.chosen}")
        if self.routing is not None:
            lines.append(f"  learned: {self.routing}")
        return before + "\n".join(lines)

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw the terms of the loss by step, on logarithmic axes, as means over a hundredth of the run.

        Args:
            path: the file, `.svg` or `.png`.
        Raises:
            ExtraError: matplotlib is missing.
        """
        figure = imported("matplotlib.figure", "plots").Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        window = max(1, len(self.rows) // 100)
        count = len(self.rows) // window * window
        steps = self.column("step")[:count].reshape(-1, window)[:, -1]
        for name in self.losses:
            values = self.column(name)[:count].reshape(-1, window).mean(1)
            axes.plot(steps, values, label=name, linewidth=2 if name == "loss" else 1)
        axes.set(xlabel="step", ylabel="loss", yscale="log" if (self.column("loss") > 0).any() else "linear")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path)


class Log:
    """The log of a run that is under way, one line for every step. It is a context manager, which closes the file.

    Args:
        path: the file; None logs nothing, in all processes but the main one.
        terms: the names of the terms of the loss.
        step: the step that the run begins at; lines of later steps are removed, and those that are damaged.
    Raises:
        TuningError: the file cannot be written.
    """

    def __init__(self, path: Path | None, terms: Sequence[str], step: int) -> None:
        self._lines: TextIO | None = None
        if path is None:
            return
        head, kept = ("step", "seconds", *COLUMNS, *terms), []
        if step and path.exists():
            names, rows = _read(path)
            kept = [row for row in rows if names == head and float(row[0]) <= step]
            if len(kept) < step:
                log.warning("%s has lost the lines of %d steps", path, step - len(kept))
        with _writing(path):
            self._lines = path.open("w", encoding="utf-8", newline="", buffering=1)
            csv.writer(self._lines).writerows([head, *kept])

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()

    def write(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        """Add the line of a step.

        Args:
            figures: the learning rate, the norm of the gradient, the loss and its terms, in this order.
        """
        if self._lines is not None:
            row = [step, f"{seconds:.2f}", *(f"{figure:.10g}" for figure in figures.values())]
            with _writing(Path(self._lines.name)):
                csv.writer(self._lines).writerow(row)


def _read(path: Path) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the columns of a log, and its lines of numbers; those that were written in part are left out."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as lines:
            names, *rows = csv.reader(lines)
    except (FileNotFoundError, ValueError, csv.Error):  # gone, empty, or of other bytes; it only tells of the run
        return (), []
    return tuple(names), [row for row in rows if len(row) == len(names) and all(map(_is_number, row))]


def _described(choice: Mapping[str, Any]) -> str:
    left = ", ".join(f"{share:.3f} of the {name}" for name, share in choice["left"].items())
    return f"{', '.join(choice['passes'])}, which leaves {left}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TuningError(
            f"the log of the run cannot be written: {error.strerror or error}",
            where=str(path),
            hint="free space there; the same command goes on from the last checkpoint",
        ) from error


def write_learned(path: Path, record: Mapping[str, Any]) -> None:
    """Write what a search has learned.

    Args:
        path: the file, in the folder of the run.
        record: what was learned, as plain data.
    Raises:
        TuningError: it cannot be written.
    """
    try:
        with written(path) as file:
            file.write_text(json.dumps({"format": LEARNED_FORMAT, **record}, indent=1) + "\n")
    except OSError as error:
        raise TuningError(
            f"{path.name} cannot be written: {error.strerror or error}",
            where=str(path.parent),
            hint="free space there; the same command goes on from the last checkpoint",
        ) from error
