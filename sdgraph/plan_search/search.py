"""`search`: the plan with the least error of the final latents, for a budget of time.

Every measurement is of a whole generation, by the pipeline's own solver and steps. In a multistep solver the errors of
neighbouring calls cancel or add up, so the error of a part of a generation does not predict its error in another plan.

The prompts are dealt into three groups. The search begins with the best of a few simple plans: even spacings and
others, of each candidate, with a few dampings, and every proposal of earlier searches that fits the budget. It fits the
dampings of all calls on the *tuning* prompts, and then tries moves: two neighbouring calls change places, a call leaves
out something else, or a damping is changed. A change is accepted if it is better on the tuning prompts and also on the
*validation* prompts, by more than the standard error. The *held-out* prompts give the error to expect. If the plan is
not better than the best even spacing on these, the even spacing is the result.

Of several UNets, a move may also let another one compute a call, and the simple plans are those of each UNet, and
switches between two of them: the costlier one first, last, or spread evenly. If there are no more plans than trials,
all are measured.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from math import ceil, log10
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ..atomic import owned
from ..compiler.passes import Chain, Pass
from ..errors import ScheduleError, SourceError, SpecError, did_you_mean
from ..options import Budget, Index, Seed, Text, checked
from ..progress import Bar
from ..runtime.apply import apply
from ..runtime.switch import SwitchUNet, switch
from ..runtime.unet import GraphUNet
from ..schedules import ByCall, InTurns, Steps
from ..views.format import format_table
from ..views.timetable import Timetable, timetable
from . import PLAN_FORMAT
from .candidates import SHAPES, Candidates, Proposal, ProposedCall
from .costs import seconds_of
from .evaluator import HELD_OUT, TUNING, VALIDATION, Evaluator, Measurements, SearchedPipeline
from .final_latents import check_request, typical
from .switch_plan import SwitchPlan

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
        passes: the candidates that are used, with their schedules and forecasts; none if there are several UNets.
        timetable: the calls of the chosen plan, and what each computes and reuses.
        rows: the chosen plan, the best even spacing, the best simple switch of several UNets, and of each UNet alone
            the solver with fewer steps in the same time, rounded up to whole steps, and with all steps.
        moved: whether the chosen plan differs from the best simple plan and is better on the held-out prompts.
        prompts: the number of prompts of the search, without those that were passed as held out.
        reference_steps: the number of steps of the reference latents, from which errors are measured.
        steps: the number of steps of the generations.
        config: the configuration of the UNet that was searched on, the first of several.
        plan: the UNet of each call and the passes of each UNet, if `unets` were given; `plan.switch(unets)` applies it.
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
    plan: SwitchPlan | None = None

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
            simple = "even spacing" if self.plan is None else "best simple plan"
            notes.append(f"no move from the {simple} helped on the held-out prompts")
        if self.warning:
            notes.append(f"warning: {self.warning}")
        notes = [textwrap.fill(note, 110, initial_indent="  ", subsequent_indent="  ") for note in notes]
        found = map(str, self.passes.passes) if self.plan is None else [str(self.plan)]
        return "\n".join([*found, str(self.timetable), format_table(rows), *notes])

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain data, whose passes `sdgraph.parse` reads, or whose plan `SwitchPlan.load` does."""
        one = {
            "format": PLAN_FORMAT,
            "passes": str(self.passes),
            "steps": self.steps,
            "solver": self.timetable.run.solver,
            "unet": {name: value for name, value in self.config.items() if not name.startswith("_")},
        }
        return {
            **(one if self.plan is None else self.plan.as_dict()),
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
    candidates: Annotated[Sequence[Pass] | Mapping[str, Sequence[Pass]], Any],
    prompts: Sequence[str],
    *,
    budget: Budget,
    unets: Annotated[Mapping[str, Any] | None, Any] = None,
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

    It chooses the schedule and fits the dampings; if the schedule is settled, use `fit_forecast`. Of several UNets it
    also chooses the one that computes each call. Features are inherited within a turn of one UNet.

    Args:
        pipe: a diffusers pipeline; its UNet is diffusers' own or a `GraphUNet`. The search leaves it as it was.
        candidates: the passes, `InheritFeatures` and `Bypass`, whose sites a call may leave out. They may be
            alternatives, such as the branches of DeepCache. The search replaces their schedules and forecasts. For
            several UNets they hold for each, or are given by the names of UNets; there may be none.
        prompts: the prompts to tune and to validate on, by turns; pass 16 or more.
        budget: the time of a generation, as a share of the time of computing everything, over 0 and up to 1. Of several
            UNets, the first one computes everything.
        unets: the UNets to choose from, by name, as for `sdgraph.switch`; by default the pipeline's UNet alone. The
            first one is the large one, to whose latents the others come close.
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
        fewer steps of the same solver. Of several UNets, `plan` holds the UNet of each call and the passes of each, and
        the errors of simple switches and of each UNet alone stand beside.
    Raises:
        SourceError: the pipeline has no UNet, its solver adds random numbers, a UNet is a switch itself, or the UNets
            take different latents or conditioning.
        SpecError: there are no candidates or too few prompts, a candidate has no sites, the budget is no share, a file
            is damaged, or another search writes to the folder.
        SavedError: a file in the folder is damaged.
        ScheduleError: no plan meets the budget, or the file has no time of a call.
    Example:
        `sdgraph.search(pipe, [InheritFeatures.damped(2)], prompts, budget=0.5, num_inference_steps=20)`
    """
    check_request("search", pipe, prompts, call)
    check_settings(prompts, budget, held_out, cost)
    dealt = 2 if held_out else 3
    groups = {TUNING: prompts[0::dealt], VALIDATION: prompts[1::dealt], HELD_OUT: held_out or prompts[2::dealt]}
    if unets is not None and cost not in ("time", "macs"):
        hint = "use cost='time' on the machine that it is for, or 'macs'"
        raise SpecError("a file has the times of one UNet, not of several", where="cost", hint=hint)
    sources = {"": apply(pipe.unet, ())} if unets is None else _members(unets)
    options = Candidates(sources, _by_member(candidates, tuple(sources)))
    pipeline = SearchedPipeline(pipe, options, groups, seed, call)
    steps = int(call.get("num_inference_steps") or pipeline.run.calls or 0)
    aim = max(CONVERGED, 2 * steps) if reference_steps is None else reference_steps
    named = [f"{name}@{one}" if name else str(one) for name, each in options.members.items() for one in each.passes]
    key = "\n".join([*named, *filter(None, sources), str(aim)]).encode()
    unchanged = [*pipeline.unchanged.values(), *pipeline.unchanged_others]
    key += b"".join(latents.cpu().float().numpy().tobytes() for latents in unchanged)
    alone = owned(Path(folder), SpecError, "folder") if folder else contextlib.nullcontext()
    with alone, Bar(desc="search", unit="generation", disable=not progress) as bar:
        measurements = Measurements(Path(folder) if folder else None, key)
        evaluator = Evaluator(pipeline, measurements, cost, aim, budget, bar)
        simple, start = starting_proposals(evaluator, trials)
        improved = improve(evaluator, start, trials, seed)
        best = min(simple.values(), key=lambda proposal: typical(evaluator.errors(proposal, VALIDATION)))
        moved = bool(evaluator.gains(best, improved, HELD_OUT).mean() > 0)
        chosen = improved if moved else best
        rows = [_row(evaluator, name, proposal) for name, proposal in {"chosen": chosen, **simple}.items()]
        for name in sources:
            rows += _computed_rows(evaluator, name, steps, rows[0].share)
    chains, turns = options.chains(chosen, pipeline.run), chosen.turns
    graphs = {name: apply(sources[name], chain.passes, verify=False).graph for name, chain in chains.items()}
    table = timetable(graphs, pipeline.run, () if unets is None else turns)
    plan = None
    if unets is not None:
        passes = {name: chain.passes for name, chain in chains.items()}
        configs = {name: sources[name].config for name in chains}
        plan = SwitchPlan(ByCall.of_calls(turns), passes, steps, pipeline.run.solver, configs)
    chain = chains[options.first] if len(sources) == 1 else Chain(())
    config = sources[options.first].config
    return SearchResult(chain, table, tuple(rows), moved, len(prompts), aim, steps, config, plan)


def _members(unets: Mapping[str, Any]) -> dict[str, GraphUNet]:
    """Return the traced UNets by name, which agree on latents and conditioning, and hold equal weights once."""
    for name, unet in unets.items() if isinstance(unets, Mapping) else ():
        if isinstance(getattr(unet, "unet", unet), SwitchUNet):
            hint = "pass the UNets that it was made of"
            raise SourceError("it is a switch of several UNets itself", where=f"unets[{name!r}]", hint=hint)
    names = tuple(unets) if isinstance(unets, Mapping) else ()
    schedule = InTurns(names) if names and all(isinstance(name, str) and name for name in names) else None
    return dict(switch(unets, schedule).members)  # which refuses names and mappings that do not fit


def _by_member(
    candidates: Sequence[Pass] | Mapping[str, Sequence[Pass]], members: tuple[str, ...]
) -> dict[str, Sequence[Pass]]:
    """Return the candidates of each UNet."""
    given = candidates if isinstance(candidates, Mapping) else dict.fromkeys(members, candidates)
    for name, passes in given.items():
        if name not in members:
            hint = did_you_mean(str(name), members) or f"UNets: {', '.join(members)}"
            raise SpecError(f"there are candidates of a UNet {name!r}", where="candidates", hint=hint)
        if not isinstance(passes, Sequence) or not all(isinstance(one, Pass) for one in passes):
            hint = "pass a list of passes, or such lists by the names of UNets"
            raise SpecError("the candidates are no passes", where="candidates", hint=hint)
    return {name: given.get(name, ()) for name in members}


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


def _computed_rows(evaluator: Evaluator, member: str, steps: int, share: float) -> list[Row]:
    """Return the rows of a UNet that computes everything: in the time of a share, and with all steps."""
    whole = evaluator.share(Proposal.spaced(evaluator.calls, evaluator.calls, member=member))
    rows = []
    for number in (ceil(steps * share / whole - 1e-9), steps):
        name = f"{number} steps of {member}" if member else f"{number} steps, all computed"
        rows.append(Row(name, whole * number / steps, None, typical(evaluator.computed(number, member))))
    return rows


def starting_proposals(evaluator: Evaluator, trials: int) -> tuple[dict[str, Proposal], Proposal]:
    """Return the best simple plans by name, and the best of them, of other spacings and of all known proposals.

    Args:
        evaluator: the evaluator of proposals.
        trials: the largest number of proposals of several UNets that are all measured.
    Raises:
        ScheduleError: no proposal meets the budget.
    """
    options, calls = evaluator.candidates, evaluator.calls

    def error(proposal: Proposal) -> float:
        return typical(evaluator.errors(proposal, VALIDATION))  # known proposals may be fitted to the tuning prompts

    cheapest = min(_cheapest_of_turns(options, calls), key=evaluator.share)
    if not evaluator.fits(cheapest):
        which = "candidates" if len(options.members) == 1 else "UNets and candidates"
        raise ScheduleError(
            f"no plan meets a budget of {evaluator.budget:.3g}: these {which} need at least "
            f"{evaluator.share(cheapest):.3g}",
            where="search",
            hint="a larger budget, or other candidates",
        )
    choices = [choice for choice in options.choices() if choice.reused]
    most = {choice.choice: _most_refreshes(evaluator, choice) for choice in choices}
    spacings = [
        (number, reused, damping, member)
        for (member, reused), largest in most.items()
        if largest
        for number in dict.fromkeys((largest, -(-calls // -(-calls // largest))))  # the second is that of a Uniform
        for damping in DAMPINGS
    ]
    simple, others = {}, []

    def spaced(number: int, reused: frozenset[int], damping: float, member: str, shape: str = "even") -> Proposal:
        return options.simplified(Proposal.spaced(calls, number, reused, damping, shape, member))

    if spacings:
        best = min(spacings, key=lambda spacing: error(spaced(*spacing)))
        simple["best even spacing"] = spaced(*best)
        number, reused, damping, member = best
        number = max(number, most[member, reused])
        others += [spaced(number, reused, damping, member, shape) for shape in SHAPES]
    if len(options.members) > 1:
        switches = [proposal for proposal in _simple_switches(evaluator) if evaluator.fits(proposal)]
        if switches:
            simple["best simple switch"] = min(switches, key=error)
        if len(options.choices()) ** calls <= trials:
            others += options.every_proposal(calls)
    if not simple:
        simple["cheapest plan"] = cheapest
    known = (options.read(text, calls) for text in evaluator.measurements.subjects(VALIDATION))
    others += [*options.own_proposals(evaluator.pipeline.run), *known]
    others = [proposal for proposal in others if evaluator.fits(proposal)]
    return simple, min((*simple.values(), *others), key=error)


def _cheapest_of_turns(options: Candidates, calls: int) -> Iterator[Proposal]:
    """Yield proposals of which one costs least: a UNet computes the first call, and one leaves out the same later."""
    for choice in options.choices():
        if choice.reused or len(options.members) > 1:
            for first in options.members:
                yield options.simplified(Proposal((ProposedCall(member=first), *[choice] * (calls - 1))))


def _simple_switches(evaluator: Evaluator) -> Iterator[Proposal]:
    """Yield what computes everything: each UNet alone, and of each two the costlier one at as many calls as the budget
    allows: the first ones, the last ones, or spread evenly.
    """
    calls, members = evaluator.calls, list(evaluator.candidates.members)
    shares = {name: evaluator.share(Proposal.spaced(calls, calls, member=name)) for name in members}
    for name in members:
        yield Proposal.spaced(calls, calls, member=name)
    for one, other in combinations(sorted(members, key=lambda name: -shares[name]), 2):
        number = calls
        if shares[one] > shares[other]:
            number = int((evaluator.budget - shares[other]) / (shares[one] - shares[other]) * calls + 1e-9)
        largest = min(number, calls - 1)
        for number in sorted({largest, calls // 2} & set(range(1, largest + 1))):
            spread = {ceil(calls * i / number - 1e-9) for i in range(number)}
            for at in (range(number), range(calls - number, calls), spread):
                yield Proposal(tuple(ProposedCall(member=one if n in at else other) for n in range(calls)))


def _most_refreshes(evaluator: Evaluator, choice: ProposedCall) -> int:
    """Return the largest number of calls that may compute everything, if the others reuse the same; 0 if none may."""
    for number in range(evaluator.calls, 0, -1):
        if evaluator.fits(Proposal.spaced(evaluator.calls, number, choice.reused, member=choice.member)):
            return number
    return 0


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
