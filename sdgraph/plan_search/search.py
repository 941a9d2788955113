"""`search`: the plan with the least error of the final latents, for a budget of time.

What is measured is always a whole generation, by the pipeline's own solver and steps. In a multistep solver the errors
of neighbouring calls cancel or add up, so parts of a generation do not tell what they are worth in another plan.

The prompts are dealt into three groups. The search begins with the best of a few simple plans: even spacings and
others, of each candidate, with a few dampings, and whatever fits the budget of what was measured before. It fits the
dampings of all calls on the *tuning* prompts, and then tries moves: two neighbouring calls change places, a call leaves
out something else, or a damping is changed. A change is accepted if it is better on the tuning prompts and also on the
*validation* prompts, by more than the standard error. The *held-out* prompts tell what to expect. If the plan is not
better than the best even spacing on these, the even spacing is the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ..atomic import owned
from ..compiler.passes import Pass
from ..errors import ScheduleError, SpecError
from ..options import Bounds, Index, Seed, Text, checked
from ..progress import Bar
from ..runtime.apply import apply
from ..schedules import Steps
from ..views.timetable import timetable
from .candidates import SHAPES, Candidates, Plan
from .costs import Cost, seconds_here, seconds_of
from .final_latents import Array, check_request, relative_errors, typical
from .measurements import Measurements
from .rehearsal import Rehearsal, with_dampings
from .result import Row, SearchResult

Budget = Annotated[float, Bounds(gt=0, le=1)]
CONVERGED = 100  # steps of the generation that is aimed at, unless told
DAMPINGS = (0.0, 0.5, 1.0)
TUNING, VALIDATION, HELD_OUT = "tuning", "validation", "held out"


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
    """Find what each call should compute, inherit, forecast or bypass, for the pipeline's solver and number of steps.

    It chooses the schedule and fits the dampings; if the schedule is settled, use `fit_forecast`.

    Args:
        pipe: a diffusers pipeline; its UNet is diffusers' own or a `GraphUNet`. It is as it was afterwards.
        candidates: `InheritFeatures` and `Bypass` passes, each with sites that a call may leave out. They may be
            alternatives, such as the branches of DeepCache. The search replaces their schedules and forecasts.
        prompts: the prompts to tune and to validate on, by turns; pass 16 or more.
        budget: time of a generation, as a share of that which computes everything.
        held_out: prompts on which the result is measured only. By default every third of `prompts`.
        cost: "time" measures the variants on this machine, "macs" counts multiply-accumulates, and anything else
            is the JSON file of `sdgraph bench --out` for a bundle with these candidates, on the machine it is for.
        reference_steps: the number of steps of the generation whose final latents are aimed at, all computed. By
            default 100, or twice the number of steps if that is more.
        trials: the number of moves that are tried.
        seed: the seed of the first image's latents; the others count up from it.
        folder: the folder of measurements. With it, a search goes on from the best plan that is known to fit, after it
            was stopped or for another budget.
        progress: whether to show a bar.
        call: further arguments of the pipeline, such as `num_inference_steps=20`.
    Returns:
        The passes with their schedules and forecasts, and their errors beside those of the best even spacing and of
        fewer steps of the same solver.
    Raises:
        SourceError: the pipeline has no UNet, or its solver adds random numbers.
        SpecError: no candidates, a candidate without sites, too few prompts, a budget that is no share, a bad file, or
            another search in the folder.
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
    rehearsal = Rehearsal(pipe, source, options, groups, seed, call)
    steps = int(call.get("num_inference_steps") or rehearsal.run.calls or 0)
    aim = max(CONVERGED, 2 * steps) if reference_steps is None else reference_steps
    key = "\n".join([*map(str, options.passes), str(aim)]).encode()
    key += b"".join(latents.cpu().float().numpy().tobytes() for latents in rehearsal.whole.values())
    alone = owned(Path(folder), SpecError, "folder") if folder else contextlib.nullcontext()
    with alone, Bar(desc="search", unit="generation", disable=not progress) as bar:
        judge = _Judge(options, rehearsal, Measurements(Path(folder) if folder else None, key), cost, aim, budget, bar)
        even, start = _starts(judge)
        improved = _improved(judge, start, trials, seed)
        moved = bool(_gains(judge, even, improved, HELD_OUT).mean() > 0)
        chosen = improved if moved else even
        share = judge.share(chosen)
        fewer = int(np.ceil(steps * share - 1e-9))
        rows = [judge.row("chosen", chosen), judge.row("best even spacing", even)]
        for number, part in ((fewer, fewer / steps), (steps, 1.0)):
            rows.append(Row(f"{number} steps, all computed", part, None, typical(judge.computed(number))))
    chain = options.chain(chosen, rehearsal.run)
    result = apply(source, chain.passes, verify=False)
    return SearchResult(
        chain, timetable(result.graph, rehearsal.run), tuple(rows), moved, len(prompts), aim, steps, source.config
    )


@checked(SpecError)
def check_settings(prompts: Sequence[str], budget: Budget, held_out: Sequence[str], cost: str | Path) -> None:
    """Refuse the settings of a search that no pipeline could fulfil; the arguments are those of `search`.

    Raises:
        SpecError: too few prompts, a budget that is no share, or a bad file.
    """
    if len(prompts) < (2 if held_out else 3):
        hint = "16 to 32 prompts: some are tuned on, some validate, and some are held out"
        raise SpecError(f"there are {len(prompts)} prompts, too few to search on", where="search", hint=hint)
    if cost not in ("time", "macs"):
        seconds_of(Path(cost))  # a bad file is refused before anything is generated


class _Judge:
    """What plans cost, and the errors that they have.

    Args:
        cost: see `search`.
        aim: the number of steps of the references.
        budget: the largest share of the cost.
        bar: counts generations.
    """

    def __init__(
        self,
        options: Candidates,
        rehearsal: Rehearsal,
        kept: Measurements,
        cost: str | Path,
        aim: int,
        budget: float,
        bar: Any,
    ) -> None:
        self.options, self.rehearsal, self.kept, self.budget, self._bar = options, rehearsal, kept, budget, bar
        self._cost, self._costs = cost, dict[frozenset[str], float]()
        self._measure: Cost | None = None
        self._references = {
            group: kept.latents(group.replace(" ", "-"), partial(rehearsal.computed, aim, group))
            for group in rehearsal.whole
        }
        self.calls = rehearsal.run.calls or 0
        self._whole = options.cost(Plan.spaced(self.calls, self.calls, frozenset(), 0.0), rehearsal.run, self._of_call)

    def share(self, plan: Plan) -> float:
        """Return the cost of a plan as a share of that of computing everything."""
        return self.options.cost(plan, self.rehearsal.run, self._of_call) / self._whole

    def fits(self, plan: Plan) -> bool:
        """Return whether a plan meets the budget; one that was computed as such a share does."""
        return self.share(plan) <= self.budget * (1 + 1e-9)

    def errors(self, plan: Plan, group: str) -> Array:
        """Return the relative errors of the final latents of a group, with a plan."""
        return self._errors(group, str(plan), lambda: self.rehearsal.latents(plan, group))

    def computed(self, steps: int) -> Array:
        """Return the relative errors of the held-out prompts with a number of steps, everything computed."""
        return self._errors(HELD_OUT, f"{steps} steps", lambda: self.rehearsal.computed(steps, HELD_OUT))

    def fitted(self, plan: Plan) -> Plan:
        """Return the plan with dampings that are fitted to the tuning prompts."""
        free = self.options.free(plan)
        if not free:
            return plan
        reference = self._references[TUNING]
        dampings = self.kept.numbers("fit", str(plan), lambda: self.rehearsal.fitted(plan, TUNING, reference))
        return self.options.plain(with_dampings(plan, free, dampings))

    def row(self, name: str, plan: Plan) -> Row:
        """Return what is known of a plan."""
        validated, held_out = (typical(self.errors(plan, group)) for group in (VALIDATION, HELD_OUT))
        return Row(name, self.share(plan), validated, held_out)

    def _errors(self, group: str, name: str, generate: Any) -> Array:
        def measure() -> Array:
            self._bar.update()
            return relative_errors(generate(), self._references[group])

        return self.kept.numbers(group, name, measure)

    def _of_call(self, reused: frozenset[str]) -> float:
        if reused not in self._costs:
            if self._cost == "macs":
                self._costs[reused] = self.options.unet.graph.call_macs(reused)
            elif self._cost == "time":
                name = ", ".join(sorted(reused))
                self._costs[reused] = float(self.kept.numbers("seconds", name, lambda: self._seconds(reused))[0])
            else:
                self._measure = self._measure or seconds_of(Path(self._cost))
                self._costs[reused] = self._measure(reused)
        return self._costs[reused]

    def _seconds(self, reused: frozenset[str]) -> Array:
        if self._measure is None:
            self._measure = seconds_here(self.options.unet, self.rehearsal.first_call(TUNING))
        return np.array([self._measure(reused)])


def _starts(judge: _Judge) -> tuple[Plan, Plan]:
    """Return the best even spacing, and the best of it, of other spacings and of all plans that are known.

    Raises:
        ScheduleError: no plan meets the budget.
    """
    options, calls = judge.options, judge.calls

    def error(plan: Plan) -> float:
        return typical(judge.errors(plan, VALIDATION))  # for plans that are known may be fitted to tuning prompts

    kinds = [kind for kind in options.kinds() if kind]
    most = {kind: _refreshes(judge, kind) for kind in kinds}
    if not any(most.values()):
        least = min(judge.share(Plan.spaced(calls, 1, kind, 0.0)) for kind in kinds)
        raise ScheduleError(
            f"no plan meets a budget of {judge.budget:.3g}: these candidates need at least {least:.3g}",
            where="search",
            hint="a larger budget, or other candidates",
        )
    spacings = [
        (number, kind, damping)
        for kind, largest in most.items()
        if largest
        for number in dict.fromkeys((largest, -(-calls // -(-calls // largest))))  # the second is that of a Uniform
        for damping in DAMPINGS
    ]
    best = min(spacings, key=lambda spacing: error(options.plain(Plan.spaced(calls, *spacing))))
    even = options.plain(Plan.spaced(calls, *best))
    number, kind, damping = max(best[0], most[best[1]]), best[1], best[2]
    shaped = [options.plain(Plan.spaced(calls, number, kind, damping, shape)) for shape in SHAPES]
    known = map(Plan.read, judge.kept.subjects(VALIDATION))
    others = [plan for plan in (*shaped, options.given(judge.rehearsal.run), *known) if judge.fits(plan)]
    return even, min((even, *others), key=error)


def _refreshes(judge: _Judge, kind: frozenset[int]) -> int:
    """The largest number of calls that may compute everything if the others leave out a kind; 0 if none may."""
    numbers = range(judge.calls, 0, -1)
    return next((n for n in numbers if judge.fits(Plan.spaced(judge.calls, n, kind, 0.0))), 0)


def _improved(judge: _Judge, plan: Plan, trials: int, seed: int) -> Plan:
    """Return the plan after fits and moves, each accepted if it is better on tuning and on validation prompts."""

    def better(other: Plan) -> bool:
        for group in (TUNING, VALIDATION):
            gains = _gains(judge, plan, other, group)
            if gains.mean() <= gains.std() / np.sqrt(len(gains)):
                return False
        return True

    random, tried = np.random.default_rng(seed), {plan}
    plan = fitted if better(fitted := judge.fitted(plan)) else plan
    while len(tried) <= trials:
        moves = [judge.options.plain(move) for move in plan.neighbours(judge.options.kinds())]
        random.shuffle(moves)
        move = next((move for move in moves if move not in tried and judge.fits(move)), None)
        if move is None:
            break
        tried.add(move)
        if better(move):
            plan = move
    return fitted if better(fitted := judge.fitted(plan)) else plan


def _gains(judge: _Judge, before: Plan, after: Plan, group: str) -> Array:
    """By how much the errors of the prompts of a group fall, in logarithms."""
    errors = [np.maximum(judge.errors(plan, group), 1e-12) for plan in (before, after)]
    gains: Array = np.log(errors[0] / errors[1])
    return gains
