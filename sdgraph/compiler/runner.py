"""The runner: it applies a pass to a copy of a graph and checks the result, or leaves everything as it was."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from ..contract import Contract
from ..errors import ContractError, NoChangeError, OrderError, SdgraphError, SpecError
from ..graph import Graph
from ..ir.decisions import Applied, Decision, Decisions
from ..ir.read_only import read_only
from ..ir.tracer import watched_modules
from ..ir.verify import fingerprint
from .error_location import failure
from .numerics import check_contract
from .passes import CompilerRun, Pass
from .report import PassReport, Size


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
        for inner in _leaves(pass_):
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
    notes: tuple[str, ...] = ()
    if pass_.chooses:
        pass_, notes = _chosen(pass_, graph)
    run = CompilerRun(graph, Decisions(recorded))
    before = Size.of(graph)  # before the copy, which takes over what its nodes cost
    after = graph.copy()
    with read_only(graph.tensors(), lambda name: _written(pass_, name)):
        with watched_modules():
            report = pass_.apply(after, run)
        if not pass_.may_change_nothing and fingerprint(after) == fingerprint(graph):
            closest = "; ".join(f"{m.where}: {m.reason}" for m in report.near_misses[:3])
            raise NoChangeError(
                f"{pass_} changed nothing",
                where=f"nearest misses: {closest}" if closest else "",
                hint="drop it, or set may_change_nothing = True on the pass",
            )
        difference = check_contract(pass_, graph, after) if verify else None
    decisions = run.decisions.finish()
    after.passes = (*graph.passes, Applied(pass_, decisions))
    seconds = time.perf_counter() - start
    report = replace(report, before=before, difference=difference, seconds=seconds, decisions=decisions)
    return after, replace(report, notes=(*notes, *report.notes))


def _chosen(pass_: Pass, graph: Graph) -> tuple[Pass, tuple[str, ...]]:
    """Return the pass that another one chooses, and lines of text for its report."""
    try:
        return pass_.choose(graph)
    except SdgraphError as error:
        error.came_through(str(pass_))
        raise
    except Exception as error:
        raise failure(pass_, error, graph) from error


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


def _leaves(pass_: Pass) -> list[Pass]:
    """Return the passes that edit graphs themselves."""
    return [leaf for part in pass_.parts for leaf in _leaves(part)] or [pass_]


def _names(applied: Applied) -> list[str]:
    inner = _leaves(applied.one) if isinstance(applied.one, Pass) else []
    return [type(pass_).__name__ for pass_ in (applied.one, *inner)]
