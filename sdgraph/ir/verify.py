"""Verification of graphs: the invariants of a graph, what edits must keep, and the equality of graphs."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import fx, nn

from ..errors import ContractError
from .evaluation import Operation
from .guards import satisfied
from .nodes import values, weights_read
from .regions import above
from .sites import bypass, inherit
from .state import GraphState

Invariant = Callable[[GraphState], Iterator[str]]


def operands_come_first(graph: GraphState) -> Iterator[str]:
    """Every operand of a node is a node of the graph that comes before it."""
    seen: set[fx.Node] = set()
    for node in graph.fx.nodes:
        yield from (f"{node.name} reads {operand.name}" for operand in node.all_input_nodes if operand not in seen)
        seen.add(node)


def inputs_are_placeholders(graph: GraphState) -> Iterator[str]:
    """The placeholders are the inputs, in order, and come before all operations."""
    names = [spec.name for spec in graph.inputs]
    first = [node.name for node in list(graph.fx.nodes)[: len(names)] if node.op == "placeholder"]
    placeholders = [node.name for node in graph.fx.nodes if node.op == "placeholder"]
    if not names == first == placeholders:
        yield f"inputs {names}, placeholders {placeholders}"


def one_tensor_is_returned(graph: GraphState) -> Iterator[str]:
    """The last node returns one value, a tensor."""
    *_, last = graph.fx.nodes
    value = last.args[0] if last.op == "output" else None
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        yield f"{last.name} returns {value}"


def values_are_current(graph: GraphState) -> Iterator[str]:
    """Every node knows its module path, and its values at both calls, as its present operation computes them."""
    for node in graph.fx.nodes:
        operation = node.op not in ("placeholder", "output")
        missing = {"val", "probe", "nn_module_stack"} - node.meta.keys() if node.op != "output" else ()
        if missing or (operation and node.meta.get("evaluated") != Operation.of(node)):
            yield node.name


def weights_are_there(graph: GraphState) -> Iterator[str]:
    """Every leaf module that is called, and every tensor that is read, is among the weights."""
    for node in graph.fx.nodes:
        kind = {"call_module": nn.Module, "get_attr": torch.Tensor}.get(node.op)
        if kind is not None and not isinstance(graph.weights.get(str(node.target)), kind):
            yield f"{node.name} reads {node.target}"


def weights_are_read(graph: GraphState) -> Iterator[str]:
    """Every weight belongs to a leaf module that is called, or is read itself."""
    read = weights_read(graph.fx.nodes)
    names = (name for name, _ in (*graph.weights.named_parameters(), *graph.weights.named_buffers()))
    yield from (name for name in names if not any(path in read for path in (name, *above(name))))


def nothing_is_dead(graph: GraphState) -> Iterator[str]:
    """Every node but inputs and the output has users."""
    yield from (node.name for node in graph.fx.nodes if not node.users and node.op not in ("placeholder", "output"))


def sites_have_names(graph: GraphState) -> Iterator[str]:
    """Every site has one node."""
    marks = Counter(str(node.args[-1]) for node in graph.fx.nodes if node.target in (inherit, bypass))
    yield from (name for name, count in marks.items() if count > 1)


def guards_hold(graph: GraphState) -> Iterator[str]:
    """The nominal and the generic sizes satisfy the guards."""
    for sizes in ({s.name: s.nominal for s in graph.dims.symbols}, {s.name: s.generic for s in graph.dims.symbols}):
        yield from (guard.condition for guard in graph.guards if not satisfied(guard, sizes))


INVARIANTS: tuple[Invariant, ...] = (
    operands_come_first,
    inputs_are_placeholders,
    one_tensor_is_returned,
    values_are_current,
    weights_are_there,
    weights_are_read,
    nothing_is_dead,
    sites_have_names,
    guards_hold,
)


def check_invariants(graph: GraphState) -> None:
    """Refuse a graph that breaks an invariant. Dead code is removed and changed values are evaluated before.

    Raises:
        ContractError: an invariant is broken; the error says which one, and where.
    """
    for invariant in INVARIANTS:
        broken = list(itertools.islice(invariant(graph), 3))
        if broken:
            rule = (invariant.__doc__ or "").removesuffix(".")
            raise ContractError(f"the graph breaks an invariant: {rule}", where="; ".join(broken))


def check_interface(before: GraphState, after: GraphState) -> None:
    """Refuse edits that changed the inputs of a graph, or the shape or dtype of its output.

    Raises:
        ContractError: they did.
    """
    if after.dims is not before.dims:  # a pass requires certain sizes: compare at those
        before = before.copy()
        before.evaluate_at(after.dims.symbols)
    names = [[n.name for n in g.fx.nodes if n.op == "placeholder"] for g in (before, after)]
    if names[0] != names[1]:
        raise ContractError("the pass changed the inputs", where=str(set(names[0]) ^ set(names[1])), hint="keep them")
    for old, new in zip(values(before.output), values(after.output), strict=True):
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ContractError(
                f"the pass changed the output from {before.shape(before.output)} to {after.shape(after.output)}",
                where=after.output.name,
                hint="keep its shape and dtype",
            )


def structure(graph: GraphState) -> str:
    """Return the SHA-256 of the operations of a graph and their arguments, regardless of the names of nodes.

    Saved folders contain this digest, so the text that is hashed must not change.
    """
    number: dict[fx.Node, int] = {}
    digest = hashlib.sha256()
    for node in graph.fx.nodes:
        number[node] = len(number)
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        arguments = fx.map_arg((node.args, dict(sorted(node.kwargs.items()))), lambda n: f"%{number[n]}")
        digest.update(f"{node.op} {target} {arguments}\n".encode())
    return digest.hexdigest()


def alike(graph: GraphState, other: GraphState) -> bool:
    """Return whether two graphs are equal except for their weights and the names of their nodes."""
    return structure(graph) == structure(other) and graph.details() == other.details()


def fingerprint(graph: GraphState) -> tuple[Hashable, ...]:
    """Return a value that is equal for graphs that are alike, call the same functions and hold the same tensors.

    It is valid within one process.
    """
    # By identity, because `structure` knows functions by name only, and different functions may share a name.
    functions = tuple(id(node.target) for node in graph.fx.nodes if node.op == "call_function")
    held = {**dict(graph.weights.named_parameters(remove_duplicate=False)), **dict(graph.weights.named_buffers())}
    # By storage, because tensors on the meta device have no addresses.
    tensors = tuple(
        (name, t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.dtype) for name, t in held.items()
    )
    return structure(graph), functions, tensors, graph.details()
