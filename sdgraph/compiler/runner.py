"""The runner: it applies a pass to a copy of a graph and checks the result, or leaves everything as it was."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from ..contract import Contract
from ..errors import ContractError, DecisionError, NoChangeError, OrderError, PassError, SdgraphError, SpecError
from ..graph import Graph
from ..ir.decisions import Applied, Decision, Decisions
from ..ir.guards import Guard
from ..ir.read_only import read_only
from ..ir.verify import fingerprint
from .error_location import location
from .numerics import Call, first_difference, generations, largest_difference, play
from .passes import Chain, Findings, Pass
from .report import NearMiss, PassReport, Size


def check_order(done: tuple[Applied, ...], passes: Iterable[Pass]) -> None:
    """Refuse passes in an order that one of them forbids, before any of them runs.

    Args:
        done: the passes that were applied before.
        passes: the passes to apply, in order.
    Raises:
        OrderError: the order is forbidden; the error names both passes and the reason.
    """
    earlier = [name for applied in done for name in _names(applied)]
    for pass_ in passes:
        for inner in _flat(pass_):
            name = type(inner).__name__
            for needed in inner.requires:
                if needed not in earlier:
                    raise OrderError(f"{name} needs {needed} before it", where=str(pass_), hint=f"put {needed} first")
            for other, reason in inner.not_after.items():
                if other in earlier:
                    raise OrderError(
                        f"{name} cannot come after {other}: {reason}", where=str(pass_), hint=f"put {name} first"
                    )
            earlier.append(name)
        earlier.append(type(pass_).__name__)


def run_pass(
    pass_: Pass, graph: Graph, verify: bool, recorded: Iterable[Decision] | None = None
) -> tuple[Graph, PassReport]:
    """Apply a pass to a copy of a graph.

    Args:
        verify: whether the numeric contract is checked on random inputs, in addition to the structure.
        recorded: the decisions of an earlier run, which are used again; by default the pass decides.
    Returns:
        The new graph and the report of the pass.
    Raises:
        SdgraphError: the pass raised an error, or broke one of its promises.
    """
    start = time.perf_counter()
    if not isinstance(pass_.contract, Contract):
        raise SpecError(
            f"the contract of {type(pass_).__name__} is {pass_.contract!r}",
            where=type(pass_).__name__,
            hint="annotate it as no option: contract: ClassVar[Contract] = Contract.EXACT",
        )
    decisions = Decisions(recorded)
    size_before = size(graph)  # before the copy, which takes over what its nodes cost
    after = graph.copy()
    with read_only(graph.tensors(), lambda name: _written(pass_, name)):
        findings, children = _edit(pass_, graph, after, decisions)
        if fingerprint(after) == fingerprint(graph) and not pass_.may_change_nothing:
            closest = "; ".join(f"{m.where}: {m.reason}" for m in findings.near_misses[:3])
            raise NoChangeError(
                f"{pass_} changed nothing",
                where=f"nearest misses: {closest}" if closest else "",
                hint="drop it, or set may_change_nothing = True on the pass",
            )
        difference = _verify(pass_, graph, after) if verify else None
    applied = Applied(pass_, decisions.finish())
    after.passes = (*graph.passes, applied)
    seconds = time.perf_counter() - start
    return after, PassReport(
        str(pass_),
        str(pass_.contract),
        size_before,
        size(after),
        difference,
        seconds,
        findings.edits,
        findings.near_misses,
        children,
        applied.decisions,
    )


def _written(pass_: Pass, name: str) -> ContractError:
    return ContractError(
        f"{pass_} edits weights in place, which the source UNet shares",
        where=name,
        hint="edit a clone(), and give it to the graph (add_tensor, add_parameter, add_module)",
    )


def replay(passes: Iterable[Applied], graph: Graph) -> Graph:
    """Apply passes again with their recorded decisions, without verification.

    Returns:
        The new graph.
    Raises:
        SdgraphError: as `run_pass`.
    """
    for applied in passes:
        assert isinstance(applied.one, Pass)
        graph, _ = run_pass(applied.one, graph, verify=False, recorded=applied.decisions)
    return graph


def _edit(pass_: Pass, original: Graph, work: Graph, decisions: Decisions) -> tuple[Findings, tuple[PassReport, ...]]:
    """Run a pass on a copy of a graph, and return its findings and the reports of inner passes.

    Args:
        original: the graph before the outermost pass.
        work: the copy, with the edits of earlier inner passes.
    """
    if isinstance(pass_, Chain):
        return _edit_in_turn(pass_, original, work, decisions)
    guards = work.guards
    work._decisions, work._editor = decisions, str(pass_)
    try:
        findings = pass_.run(work)
        if not isinstance(findings, Findings | None):
            raise PassError(
                f"run returned a {type(findings).__name__}",
                where=type(pass_).__qualname__,
                hint="edit the graph that run receives, and return None, or Findings with what was found",
            )
        work.guards = tuple(g if g in guards else _named(g, pass_) for g in work.guards)
        _settle(pass_, original, work)
    except SdgraphError as error:
        ours = type(pass_).__module__.startswith(
            "sdgraph."
        )  # our passes' errors are for their users, who do not read their code
        error.came_through(", ".join(filter(None, (str(pass_), "" if ours else location(error, pass_, work)))))
        raise
    except Exception as error:
        raise _failed(pass_, error, work) from error
    work._decisions, work._editor = Decisions(), ""
    return findings or Findings(), ()


def _named(guard: Guard, pass_: Pass) -> Guard:
    """Return the guard with the name of the pass that it comes from."""
    return replace(guard, where=f"{pass_}{f': {guard.where}' if guard.where else ''}")


def _failed(pass_: Pass, error: Exception, graph: Graph) -> PassError:
    """Return our error for an exception in the code of a pass."""
    where, message = location(error, pass_, graph), f"{type(error).__name__}: {error}"
    if graph.device.type != "meta" or "meta" not in message.lower():
        return PassError(f"{pass_} failed: {message}", where=where, hint="the graph is unchanged; mend the pass")
    return DecisionError(
        f"{pass_} needs the numbers of weights, and here are only their shapes: {message.splitlines()[0]}",
        where=where,
        hint="to decide by numbers: rank = graph.decide(path, code, weight), or by_weights = True on a Rewrite; "
        "to fill new weights: make them on the device of the old ones (device=weight.device)",
    )


def _edit_in_turn(
    pass_: Chain, original: Graph, work: Graph, decisions: Decisions
) -> tuple[Findings, tuple[PassReport, ...]]:
    reports: list[PassReport] = []
    edits: list[str] = []
    misses: list[NearMiss] = []
    mark, size_before = fingerprint(work), size(work)
    for _ in range(pass_.repeat):
        mark_before, misses = mark, []
        for inner in pass_.passes:
            start = time.perf_counter()
            findings, children = _edit(inner, original, work, decisions)
            mark_after = fingerprint(work)
            if mark_after != mark:
                seconds = time.perf_counter() - start
                sizes = size_before, size(work)
                reports.append(
                    PassReport(str(inner), str(inner.contract), *sizes, None, seconds, findings.edits, (), children)
                )
                mark, size_before = mark_after, sizes[1]
            edits += findings.edits
            misses += findings.near_misses
        if mark == mark_before:
            break
    else:
        if pass_.repeat > 1:
            raise PassError(
                f"{pass_} still changes the graph after {pass_.repeat} rounds", hint="raise repeat, or break the cycle"
            )
    return Findings(tuple(edits), tuple(misses)), tuple(reports)


def _settle(pass_: Pass, before: Graph, after: Graph) -> None:
    """Remove dead code, evaluate changed values, and check what must hold after every pass."""
    after.eliminate_dead_code()
    after.propagate()
    after.fx.lint()
    if after.dims is not before.dims:  # the pass requires certain sizes: compare at those
        before = before.copy()
        before.evaluate_at(after.dims.symbols)
    names = [[n.name for n in g.fx.nodes if n.op == "placeholder"] for g in (before, after)]
    if names[0] != names[1]:
        raise ContractError(f"{pass_} changed the inputs", where=str(set(names[0]) ^ set(names[1])), hint="keep them")
    for key in ("val", "probe"):
        old, new = before.output.meta[key], after.output.meta[key]
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ContractError(
                f"{pass_} changed the output from {before.shape(before.output)} to {after.shape(after.output)}",
                where=after.output.name,
                hint="keep its shape and dtype",
            )


def _verify(pass_: Pass, before: Graph, after: Graph) -> float:
    """Return the largest difference on random inputs.

    The graphs are compared at two sizes, with and without optional inputs, and at a second call that inherits the sites
    that the pass added.

    Raises:
        ContractError: the difference is larger than the contract allows; the error names the first node that differs.
    """
    single, double = generations(before, after)
    old, new = frozenset(before.sites), frozenset(after.sites)
    trials = [(single, old, new), (double, frozenset(), new - old), *([(double, old, new)] if old else ())]
    return max(_compare(pass_, before, after, *trial) for trial in trials)


def _compare(
    pass_: Pass, before: Graph, after: Graph, calls: list[Call], old: frozenset[str], new: frozenset[str]
) -> float:
    expected = play(before, calls, old)
    try:
        outputs = play(after, calls, new)
    except SdgraphError:
        raise
    except Exception as error:
        raise _failed(pass_, error, after) from error
    differences = [largest_difference(a, b) for a, b in zip(expected, outputs, strict=True)]
    difference = max(differences)
    wrong = [
        number for number, (a, b) in enumerate(zip(expected, outputs, strict=True)) if not pass_.contract.holds(a, b)
    ]
    if not wrong:
        return difference
    if pass_.contract.kind == "exact":
        noise = max(map(largest_difference, expected, play(before, calls, old)))
        if difference <= 4 * noise:
            return difference  # the device's kernels do not repeat bit for bit either
    if isinstance(pass_, Chain):
        _blame(pass_, before)
    number = wrong[0]
    inherited = new if number else frozenset()
    where = (
        f"a call that inherits {', '.join(sorted(inherited)[:3])}"
        if inherited and pass_.contract.holds(*(play(g, [calls[number]])[0] for g in (before, after)))
        else first_difference(before, after, calls[number])
    )
    if pass_.contract.kind == "approximate":
        raise ContractError(f"{pass_} makes the output infinite or nan", where=where)
    raise ContractError(
        f"{pass_} promises {pass_.contract} but its output differs by {differences[number]:.3g}",
        where=where,
        hint="mend the pass, or declare what it does: Contract.CLOSE(...) or Contract.APPROXIMATE",
    )


def _blame(pass_: Chain, graph: Graph) -> None:
    """Run the passes of a failed sequence one by one, so that the error names the guilty pass."""
    for inner in pass_.passes:
        after = graph.copy()
        _edit(inner, graph, after, Decisions())
        _verify(inner, graph, after)
        graph = after


def size(graph: Graph) -> Size:
    """Return the size of a graph."""
    return Size(len(graph.fx.nodes), sum(p.numel() for p in graph.parameters().values()), graph.macs)


def _flat(pass_: Pass) -> list[Pass]:
    return [p for inner in pass_.passes for p in _flat(inner)] if isinstance(pass_, Chain) else [pass_]


def _names(applied: Applied) -> list[str]:
    inner = _flat(applied.one) if isinstance(applied.one, Pass) else []
    return [type(pass_).__name__ for pass_ in (applied.one, *inner)]
