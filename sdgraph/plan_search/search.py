"""`search`: the plan with the least error of the final latents, for a budget of time.

Every measurement is of a whole generation, by the pipeline's own solver and steps. In a multistep solver the errors of
neighbouring calls cancel or add up, so the error of a part of a generation does not predict its error in another plan.

The prompts are dealt into three groups. The search begins with the best of a few simple plans: even spacings and
others, of each candidate, with a few dampings, and every proposal of earlier searches that fits the budget. It fits the
dampings of all calls on the *tuning* prompts, and then tries moves: two neighbouring calls change places, a call leaves
out something else, or a damping is changed. A change is accepted if it is better on the tuning prompts and also on the
*validation* prompts, by more than the standard error. The *held-out* prompts give the error to expect. If the plan is
not better than the best even spacing on these, the even spacing is the result.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import log10
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import owned
from ..compiler.passes import Chain, Pass
from ..errors import ScheduleError, SpecError
from ..options import Budget, Index, Seed, Text, checked
from ..progress import Bar
from ..runtime.apply import apply
from ..schedules import Steps
from ..views.format import format_table
from ..views.timetable import Timetable, timetable
from . import PLAN_FORMAT
from .candidates import SHAPES, Candidates, Proposal
from .costs import seconds_of
from .evaluator import HELD_OUT, TUNING, VALIDATION, Evaluator, Measurements, SearchedPipeline
from .final_latents import check_request, typical

CONVERGED = 100  # steps of the reference latents, unless given
DAMPINGS = (0.0, 0.5, 1.0)
RELIABLE = 2.0  # the largest factor between a predicted error and the error on held-out prompts


@dataclass(frozen=True)
class Row:
    """A way of generating, with its cost and its errors.

    Args:
        name: the name of the way.
        share: its cost, as a share of the cost of all steps.
        predicted: the error of the final latents on the validation prompts: the root mean square, relative to the
            latents, and of this the geometric mean over the prompts. None if it was not measured.
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
        timetable: the calls of the chosen plan, and what each computes and reuses.
        rows: the chosen plan, the best even spacing, the solver with fewer steps in the same time, rounded up to whole
            steps, and the solver with all steps.
        moved: whether the chosen plan differs from the even spacing and is better on the held-out prompts.
        prompts: the number of prompts of the search, without those that were passed as held out.
        reference_steps: the number of steps of the reference latents, from which errors are measured.
        steps: the number of steps of the generations.
        config: the configuration of the UNet that was searched on.
    Example:
        `result = sdgraph.search(...); print(result); pipe.unet = sdgraph.apply(pipe.unet, result.passes)`
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
        """A warning if the prediction is off by more than a factor of two, else an empty text."""
        ratio = max(self.measured, 1e-12) / max(self.predicted, 1e-12)
        if 1 / RELIABLE <= ratio <= RELIABLE:
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
        notes = [f"errors of the final latents, relative to the latents of {self.reference_steps} steps"]
        if not self.moved:
            notes.append("no move from the even spacing helped on the held-out prompts")
        if self.warning:
            notes.append(f"warning: {self.warning}")
        notes = [textwrap.fill(note, 110, initial_indent="  ", subsequent_indent="  ") for note in notes]
        return "\n".join([*map(str, self.passes.passes), str(self.timetable), format_table(rows), *notes])

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain data, whose passes `sdgraph.parse` reads."""
        return {
            "format": PLAN_FORMAT,
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


@checked(SpecError)
def search(
    pipe: Any,
    candidates: Sequence[Pass],
    prompts: Sequence[str],
    *,
    budget: Budget,
    held_out: Sequence[str] = (),
    cost: Text | Path = "time",
    reference_steps: Steps | None = None,
    trials: Index = 60,
    seed: Seed = 0,
    folder: Text | Path | None = None,
    progress: bool = True,
    **call: Any,
) -> SearchResult:
    """Find what each call should compute, reuse, forecast or bypass, for the pipeline's solver and number of steps.

    It chooses the schedule and fits the dampings; if the schedule is settled, use `fit_forecast`.

    Args:
        pipe: a diffusers pipeline; its UNet is diffusers' own or a `GraphUNet`. The search leaves it as it was.
        candidates: the passes, `InheritFeatures` and `Bypass`, whose sites a call may leave out. They may be
            alternatives, such as the branches of DeepCache. The search replaces their schedules and forecasts.
        prompts: the prompts to tune and to validate on, by turns; pass 16 or more.
        budget: the time of a generation, as a share of the time of computing everything, over 0 and up to 1.
        held_out: the prompts on which only the result is measured; by default every third of `prompts`.
        cost: "time" measures calls on this machine, "macs" counts multiply-accumulates, and any other value is the JSON
            file of `sdgraph bench --out` for a bundle with these candidates, measured on the machine it is for.
        reference_steps: the number of steps of the reference generation, which computes everything and whose final
            latents are the aim; by default 100, or twice the number of steps if that is more.
        trials: the number of moves that are tried.
        seed: the seed of the first image's latents; the others count up from it.
        folder: the folder of measurements. With it, a search that was stopped continues, and a search for another
            budget begins with the best known plan that fits.
        progress: whether to show a bar.
        call: further arguments of the pipeline, such as `num_inference_steps=20`.
    Returns:
        The passes with their schedules and forecasts, and their errors beside those of the best even spacing and of
        fewer steps of the same solver.
    Raises:
        SourceError: the pipeline has no UNet, or its solver adds random numbers.
        SpecError: there are no candidates or too few prompts, a candidate has no sites, the budget is no share, a file
            is damaged, or another search writes to the folder.
        ScheduleError: no plan meets the budget, or the file has no time of a call.
    Example:
        `sdgraph.search(pipe, [InheritFeatures.damped(2)], prompts, budget=0.5, num_inference_steps=20)`
    """
    check_request("search", pipe, prompts, call)
    check_settings(prompts, budget, held_out, cost)
    dealt = 2 if held_out else 3
    groups = {TUNING: prompts[0::dealt], VALIDATION: prompts[1::dealt], HELD_OUT: held_out or prompts[2::dealt]}
    source = apply(pipe.unet, ())
    options = Candidates(source, candidates)
    pipeline = SearchedPipeline(pipe, source, options, groups, seed, call)
    steps = int(call.get("num_inference_steps") or pipeline.run.calls or 0)
    aim = max(CONVERGED, 2 * steps) if reference_steps is None else reference_steps
    key = "\n".join([*map(str, options.passes), str(aim)]).encode()
    key += b"".join(latents.cpu().float().numpy().tobytes() for latents in pipeline.unchanged.values())
    alone = owned(Path(folder), SpecError, "folder") if folder else contextlib.nullcontext()
    with alone, Bar(desc="search", unit="generation", disable=not progress) as bar:
        measurements = Measurements(Path(folder) if folder else None, key)
        evaluator = Evaluator(pipeline, measurements, cost, aim, budget, bar)
        even, start = starting_proposals(evaluator)
        improved = improve(evaluator, start, trials, seed)
        moved = bool(evaluator.gains(even, improved, HELD_OUT).mean() > 0)
        chosen = improved if moved else even
        share = evaluator.share(chosen)
        fewer = int(np.ceil(steps * share - 1e-9))
        rows = [_row(evaluator, "chosen", chosen), _row(evaluator, "best even spacing", even)]
        for number, part in ((fewer, fewer / steps), (steps, 1.0)):
            rows.append(Row(f"{number} steps, all computed", part, None, typical(evaluator.computed(number))))
    chain = options.chain(chosen, pipeline.run)
    result = apply(source, chain.passes, verify=False)
    return SearchResult(
        chain, timetable({"": result.graph}, pipeline.run), tuple(rows), moved, len(prompts), aim, steps, source.config
    )


@checked(SpecError)
def check_settings(prompts: Sequence[str], budget: Budget, held_out: Sequence[str], cost: str | Path) -> None:
    """Refuse the settings of a search that no pipeline could fulfil; the arguments are those of `search`.

    Raises:
        SpecError: there are too few prompts, the budget is no share, or the file of costs is damaged.
    """
    if len(prompts) < (2 if held_out else 3):
        hint = "pass 16 to 32 prompts, which are split into tuning, validation and held-out prompts"
        raise SpecError(f"there are {len(prompts)} prompts, too few to search on", where="search", hint=hint)
    if cost not in ("time", "macs"):
        seconds_of(Path(cost))  # a bad file is refused before anything is generated


def _row(evaluator: Evaluator, name: str, proposal: Proposal) -> Row:
    """Return the row of a proposal."""
    validated, held_out = (typical(evaluator.errors(proposal, group)) for group in (VALIDATION, HELD_OUT))
    return Row(name, evaluator.share(proposal), validated, held_out)


def starting_proposals(evaluator: Evaluator) -> tuple[Proposal, Proposal]:
    """Return the best even spacing, and the best of it, of other spacings and of all known proposals.

    Args:
        evaluator: the evaluator of proposals.
    Raises:
        ScheduleError: no proposal meets the budget.
    """
    options, calls = evaluator.candidates, evaluator.calls

    def error(proposal: Proposal) -> float:
        return typical(evaluator.errors(proposal, VALIDATION))  # known proposals may be fitted to the tuning prompts

    choices = [reused for reused in options.choices() if reused]
    most = {reused: _most_refreshes(evaluator, reused) for reused in choices}
    if not any(most.values()):
        least = min(evaluator.share(Proposal.spaced(calls, 1, reused, 0.0)) for reused in choices)
        raise ScheduleError(
            f"no plan meets a budget of {evaluator.budget:.3g}: these candidates need at least {least:.3g}",
            where="search",
            hint="a larger budget, or other candidates",
        )
    spacings = [
        (number, reused, damping)
        for reused, largest in most.items()
        if largest
        for number in dict.fromkeys((largest, -(-calls // -(-calls // largest))))  # the second is that of a Uniform
        for damping in DAMPINGS
    ]
    best = min(spacings, key=lambda spacing: error(options.simplified(Proposal.spaced(calls, *spacing))))
    even = options.simplified(Proposal.spaced(calls, *best))
    number, reused, damping = max(best[0], most[best[1]]), best[1], best[2]
    shaped = [options.simplified(Proposal.spaced(calls, number, reused, damping, shape)) for shape in SHAPES]
    known = map(Proposal.read, evaluator.measurements.subjects(VALIDATION))
    others = [*shaped, options.own_proposal(evaluator.pipeline.run), *known]
    others = [proposal for proposal in others if evaluator.fits(proposal)]
    return even, min((even, *others), key=error)


def _most_refreshes(evaluator: Evaluator, reused: frozenset[int]) -> int:
    """Return the largest number of calls that may compute everything, if the others reuse the same; 0 if none may."""
    numbers = range(evaluator.calls, 0, -1)
    return next((n for n in numbers if evaluator.fits(Proposal.spaced(evaluator.calls, n, reused, 0.0))), 0)


def improve(evaluator: Evaluator, proposal: Proposal, trials: int, seed: int) -> Proposal:
    """Return the proposal after fits and moves, each accepted if it is better on tuning and on validation prompts.

    Args:
        evaluator: the evaluator of proposals.
        proposal: the proposal to begin with.
        trials: the number of moves that are tried.
        seed: the seed of the order of moves.
    """

    def better(other: Proposal) -> bool:
        for group in (TUNING, VALIDATION):
            gains = evaluator.gains(proposal, other, group)
            if gains.mean() <= gains.std() / np.sqrt(len(gains)):
                return False
        return True

    random, tried = np.random.default_rng(seed), {proposal}
    proposal = fitted if better(fitted := evaluator.fitted(proposal)) else proposal
    while len(tried) <= trials:
        moves = [evaluator.candidates.simplified(move) for move in proposal.neighbours(evaluator.candidates.choices())]
        random.shuffle(moves)
        move = next((move for move in moves if move not in tried and evaluator.fits(move)), None)
        if move is None:
            break
        tried.add(move)
        if better(move):
            proposal = move
    return fitted if better(fitted := evaluator.fitted(proposal)) else proposal
