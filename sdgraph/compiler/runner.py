"""Running a pass: on a copy, checked, or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from ..contract import Contract
from ..errors import ContractError, DecisionError, NoChangeError, OrderError, PassError, SdgraphError, SpecError
from ..graph import Graph
from ..ir.decisions import Applied, Decision, Decisions
from ..ir.guards import Guard
from .base import Findings, Pass
from .chain import Chain
from .numerics import Call, first_difference, generations, largest_difference, play
from .place import place
from .report import NearMiss, PassReport, Size


def check_order(done: tuple[Applied, ...], passes: Iterable[Pass]) -> None:
    """Refuse passes in an order that one of them forbids, before anything runs.

    Raises:
        OrderError: naming both passes and the reason.
    """
    earlier = [name for applied in done for name in _names(applied)]
    for one in passes:
        for inner in _flat(one):
            name = type(inner).__name__
            for needed in inner.requires:
                if needed not in earlier:
                    raise OrderError(f"{name} needs {needed} before it", where=str(one), hint=f"put {needed} first")
            for other, reason in inner.not_after.items():
                if other in earlier:
                    raise OrderError(
                        f"{name} cannot come after {other}: {reason}", where=str(one), hint=f"put {name} first"
                    )
            earlier.append(name)
        earlier.append(type(one).__name__)


def run_pass(
    one: Pass, graph: Graph, verify: bool, recorded: Iterable[Decision] | None = None
) -> tuple[Graph, PassReport]:
    """A new graph with the pass applied, and its report. The given graph is not changed.

    Args:
        verify: check the numeric contract on random inputs, not only the structure.
        recorded: what the pass decided when it ran before; by default it decides.
    Raises:
        SdgraphError: whatever the pass raised, or which of its promises it broke.
    """
    start = time.perf_counter()
    if not isinstance(one.contract, Contract):
        raise SpecError(
            f"the contract of {type(one).__name__} is {one.contract!r}",
            where=type(one).__name__,
            hint="annotate it as no option: contract: ClassVar[Contract] = Contract.EXACT",
        )
    # Tensors made in inference mode do not count their edits.
    versions = [(name, p, p._version) for name, p in graph.parameters().items() if not p.is_inference()]
    decisions = Decisions(recorded)
    size_before = size(graph)  # before the copies, which take over what its nodes cost
    after, findings, children = _edited(one, graph, decisions)
    if fingerprint(after) == fingerprint(graph) and not one.may_change_nothing:
        closest = "; ".join(f"{m.where}: {m.reason}" for m in findings.near_misses[:3])
        raise NoChangeError(
            f"{one} changed nothing",
            where=f"nearest misses: {closest}" if closest else "",
            hint="drop it, or set may_change_nothing = True on the pass",
        )
    touched = [name for name, p, version in versions if p._version != version]
    if touched:
        raise ContractError(
            f"{one} edited weights in place, which the source UNet shares",
            where=", ".join(touched[:3]),
            hint="give the graph new tensors (add_tensor, add_parameter)",
        )
    difference = _verify(one, graph, after) if verify else None
    applied = Applied(one, decisions.finish())
    after.passes = (*graph.passes, applied)
    seconds = time.perf_counter() - start
    return after, PassReport(
        str(one),
        str(one.contract),
        size_before,
        size(after),
        difference,
        seconds,
        findings.edits,
        findings.near_misses,
        children,
        applied.decisions,
    )


def replay(passes: Iterable[Applied], graph: Graph) -> Graph:
    """A new graph that has gone through passes as another one did: their decisions are given back, nothing is verified.

    Raises:
        SdgraphError: as `run_pass`.
    """
    for applied in passes:
        assert isinstance(applied.one, Pass)
        graph, _ = run_pass(applied.one, graph, verify=False, recorded=applied.decisions)
    return graph


def _edited(one: Pass, graph: Graph, decisions: Decisions) -> tuple[Graph, Findings, tuple[PassReport, ...]]:
    """A copy of the graph with the pass's edits, structurally sound."""
    if isinstance(one, Chain):
        return _edited_by_each(one, graph, decisions)
    work = graph.copy()
    work._decisions = decisions
    try:
        findings = one.run(work)
        work.guards = tuple(g if g in graph.guards else _named(g, one) for g in work.guards)
        _settle(one, graph, work)
    except SdgraphError as error:
        ours = type(one).__module__.startswith("sdgraph.")  # meant for who uses the pass, not for who writes it
        error.came_through(", ".join(filter(None, (str(one), "" if ours else place(error, one, work)))))
        raise
    except Exception as error:
        raise _failed(one, error, work) from error
    work._decisions = Decisions()
    return work, findings or Findings(), ()


def _named(guard: Guard, one: Pass) -> Guard:
    """A guard that says which pass it comes from."""
    return replace(guard, where=f"{one}{f': {guard.where}' if guard.where else ''}")


def _failed(one: Pass, error: Exception, graph: Graph) -> PassError:
    """The error for one that the pass's code raised."""
    where, said = place(error, one, graph), f"{type(error).__name__}: {error}"
    if graph.device.type != "meta" or "meta" not in said.lower():
        return PassError(f"{one} failed: {said}", where=where, hint="the graph is unchanged; mend the pass")
    return DecisionError(
        f"{one} needs the numbers of weights, and here are only their shapes: {said.splitlines()[0]}",
        where=where,
        hint="to decide by numbers: rank = graph.decide(path, code, weight), or by_weights = True on a Rewrite; "
        "to fill new weights: make them on the device of the old ones (device=weight.device)",
    )


def _edited_by_each(one: Chain, graph: Graph, decisions: Decisions) -> tuple[Graph, Findings, tuple[PassReport, ...]]:
    reports: list[PassReport] = []
    edits: list[str] = []
    misses: list[NearMiss] = []
    for _ in range(one.repeat):
        before, misses = graph, []
        for inner in one.passes:
            start = time.perf_counter()
            after, findings, children = _edited(inner, graph, decisions)
            if fingerprint(after) != fingerprint(graph):
                seconds = time.perf_counter() - start
                sizes = size(graph), size(after)
                reports.append(
                    PassReport(str(inner), str(inner.contract), *sizes, None, seconds, findings.edits, (), children)
                )
            edits += findings.edits
            misses += findings.near_misses
            graph = after
        if fingerprint(before) == fingerprint(graph):
            break
    else:
        if one.repeat > 1:
            raise PassError(
                f"{one} still changes the graph after {one.repeat} rounds", hint="raise repeat, or break the cycle"
            )
    return graph, Findings(tuple(edits), tuple(misses)), tuple(reports)


def _settle(one: Pass, before: Graph, after: Graph) -> None:
    """Dead code out, values anew, and the invariants that hold after every pass."""
    after.eliminate_dead_code()
    after.propagate()
    after.fx.lint()
    if after.dims is not before.dims:  # the pass requires sizes: compare at those
        before = before.copy()
        before.probe_at(after.dims.symbols)
    names = [[n.name for n in g.fx.nodes if n.op == "placeholder"] for g in (before, after)]
    if names[0] != names[1]:
        raise ContractError(f"{one} changed the inputs", where=str(set(names[0]) ^ set(names[1])), hint="keep them")
    for key in ("val", "probe"):
        was, now = before.output.meta[key], after.output.meta[key]
        if was.shape != now.shape or was.dtype != now.dtype:
            raise ContractError(
                f"{one} changed the output from {before.shape(before.output)} to {after.shape(after.output)}",
                where=after.output.name,
                hint="keep its shape and dtype",
            )


def _verify(one: Pass, before: Graph, after: Graph) -> float:
    """Largest difference on random inputs: at two sizes, with the optional inputs and without, and at a second call
    that inherits what the pass lets it inherit.

    Raises:
        ContractError: more than the contract allows; naming the first node that differs.
    """
    single, double = generations(before, after)
    old, new = frozenset(before.sites), frozenset(after.sites)
    trials = [(single, old, new), (double, frozenset(), new - old), *([(double, old, new)] if old else ())]
    return max(_compare(one, before, after, *trial) for trial in trials)


def _compare(
    one: Pass, before: Graph, after: Graph, calls: list[Call], old: frozenset[str], new: frozenset[str]
) -> float:
    was, now = play(before, calls, old), play(after, calls, new)
    differences = [largest_difference(a, b) for a, b in zip(was, now, strict=True)]
    difference = max(differences)
    wrong = [number for number, (a, b) in enumerate(zip(was, now, strict=True)) if not one.contract.holds(a, b)]
    if not wrong:
        return difference
    if one.contract.kind == "exact":
        noise = max(map(largest_difference, was, play(before, calls, old)))
        if difference <= 4 * noise:
            return difference  # the device's kernels do not repeat bit for bit either
    if isinstance(one, Chain):
        _blame(one, before)
    number = wrong[0]
    inherited = new if number else frozenset()
    where = (
        f"a call that inherits {', '.join(sorted(inherited)[:3])}"
        if inherited and one.contract.holds(*(play(g, [calls[number]])[0] for g in (before, after)))
        else first_difference(before, after, calls[number])
    )
    if one.contract.kind == "approximate":
        raise ContractError(f"{one} makes the output infinite or nan", where=where)
    raise ContractError(
        f"{one} promises {one.contract} but its output differs by {differences[number]:.3g}",
        where=where,
        hint="mend the pass, or declare what it does: Contract.CLOSE(...) or Contract.APPROXIMATE",
    )


def _blame(one: Chain, graph: Graph) -> None:
    """Run the passes of a failed sequence one by one, so that the error names the guilty one."""
    for inner in one.passes:
        after, _, _ = _edited(inner, graph, Decisions())
        _verify(inner, graph, after)
        graph = after


def size(graph: Graph) -> Size:
    """Nodes, parameters and MACs of a graph."""
    return Size(len(graph.fx.nodes), sum(p.numel() for p in graph.parameters().values()), graph.macs)


def fingerprint(graph: Graph) -> tuple[object, ...]:
    """What makes two graphs the same: their operations, how they are joined, the modules and tensors they hold, what
    calls may inherit, and which calls they are for."""
    nodes = tuple(
        (n.op, n.target if n.op != "call_function" else id(n.target), repr(n.args), repr(n.kwargs))
        for n in graph.fx.nodes
    )
    held = {**dict(graph.weights.named_parameters(remove_duplicate=False)), **dict(graph.weights.named_buffers())}
    # The storage, for on the meta device there are no addresses to tell tensors apart by.
    tensors = tuple(
        (name, t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.dtype) for name, t in held.items()
    )
    return nodes, tensors, graph.details()


def _flat(one: Pass) -> list[Pass]:
    return [p for inner in one.passes for p in _flat(inner)] if isinstance(one, Chain) else [one]


def _names(applied: Applied) -> list[str]:
    inner = _flat(applied.one) if isinstance(applied.one, Pass) else []
    return [type(one).__name__ for one in (applied.one, *inner)]
