"""Comparison of graphs: they are run on random inputs, and what a pass changed is held against its contract.

The inputs are those of generations: calls with the same conditioning, in which later calls reuse values of the first.
So the values that sites keep are compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from ..contract import Contract
from ..errors import ContractError, SdgraphError
from ..forecasts import REPEAT
from ..graph import Graph
from ..inheritance.cache import FeatureCache, no_value
from ..ir.decisions import Decisions
from ..ir.dims import evaluate
from ..ir.guards import raised
from ..ir.inputs import random_value
from ..ir.nodes import scope
from ..ir.variants import Variant
from ..schedules import Once, SamplingRun, Uniform
from .error_location import failure
from .passes import CompilerRun, Pass

Call = dict[str, torch.Tensor]
NO_TIME = 0.0  # the timestep of a call whose schedules count calls


def example(graph: Graph, seed: int = 0, optional: bool = False, **sizes: int) -> Call:
    """Return random inputs of a call, on the device of the weights.

    Args:
        seed: the seed of the random numbers.
        optional: whether inputs are included that a call may leave out.
        sizes: sizes of the call by symbol, such as `B=2, H=8, W=16, L=5`; small by default, and enlarged as far as the
            graph requires.
    """
    known = _sizes([graph])[0]
    return _random_call(graph, known | raised(graph.guards, known | sizes), seed, optional)


def _random_call(graph: Graph, sizes: Mapping[str, int], seed: int, optional: bool) -> Call:
    """Return random inputs of a call of known sizes, see `example`."""
    weight = next(iter(graph.parameters().values()), torch.empty(0, dtype=graph.dtype, device=graph.device))
    generator = torch.Generator().manual_seed(seed)
    flat = {}
    for spec in graph.resolved_inputs():
        if (spec.optional and not optional) or spec.shape is None or "?" in spec.shape:
            continue
        shape = [d if isinstance(d, int) else int(evaluate(d, sizes)) for d in spec.shape]
        value = random_value(spec, shape, generator, graph.config)
        flat[spec.name] = value.to(weight) if spec.kind in ("float", "mask") else value.to(weight.device)
    return flat


def generations(graph: Graph, *others: Graph) -> tuple[list[Call], list[Call]]:
    """Return random calls of two generations: one of a single call, and one of two calls.

    The two calls have another, odd size and the optional inputs.

    Args:
        others: graphs that must accept the calls too. A residual that has another shape in one of them is left out.
    """
    even, odd = _sizes([graph, *others])
    inputs = [set(g.resolved_inputs()) for g in (graph, *others)]
    shared = {i.name for i in set.intersection(*inputs)}
    constant = {i.name for i in graph.inputs if i.conditioning}
    first, second = (
        {n: value for n, value in _random_call(graph, odd, seed, True).items() if n in shared} for seed in (1, 2)
    )
    return [_random_call(graph, even, 0, False)], [
        first,
        {n: first[n] if n in constant else value for n, value in second.items()},
    ]


def _sizes(graphs: Sequence[Graph]) -> tuple[dict[str, int], dict[str, int]]:
    """Return two sets of sizes that the guards of all graphs accept; those of the second are odd if they may be."""
    unit = 2 ** max(len(graphs[0].config.get("down_block_types", ())) - 1, 0)
    nominal = {s.name: s.nominal for s in graphs[0].dims.symbols}
    guards = tuple(dict.fromkeys(guard for graph in graphs for guard in graph.guards))
    even = {"B": 2, "H": unit, "W": 2 * unit, "L": 5}
    odd = {"B": 3, "H": unit + 1, "W": 2 * unit + 3, "L": 7}
    return nominal | raised(guards, nominal | even), nominal | raised(guards, nominal | odd)


def run(graph: Graph, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the output of a graph for flat inputs, without gradients."""
    return play(graph, [flat])[0]


def play(graph: Graph, calls: Sequence[Mapping[str, torch.Tensor]], reused: Collection[str] = ()) -> list[torch.Tensor]:
    """Return the outputs of the calls of a generation, without gradients.

    Args:
        graph: the graph.
        calls: the flat inputs of every call. The first call computes all sites.
        reused: the sites that the other calls reuse from it.
    """
    backend, outputs = Interpreted(graph, reused), []
    cache = FeatureCache(backend.sites, SamplingRun(len(calls)))
    with torch.no_grad():
        for flat in calls:
            output, computed = backend.compute(flat, cache.reused(NO_TIME), cache.read)
            cache.write(computed)
            cache.advance()
            outputs.append(output)
    return outputs


class Interpreted:
    """The backend that checks contracts: variants are interpreted, because generating code takes longer than one call.

    Args:
        graph: the graph.
        reused: the sites that only the first call of a generation computes. All others are computed at every call.
    """

    def __init__(self, graph: Graph, reused: Collection[str] = ()) -> None:
        self._graph = graph
        self._variants: dict[tuple[frozenset[str], frozenset[str]], Variant] = {}
        self.sites = {
            name: replace(site, schedule=Once() if name in reused else Uniform(1), forecast=REPEAT)
            for name, site in graph.sites.items()
        }

    def compute(
        self, inputs: Mapping[str, torch.Tensor], reused: frozenset[str], read: Callable[[str], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the output of a call, and the values of the sites that it computed.

        Args:
            inputs: the inputs of the call, by name.
            reused: the sites that are not computed.
            read: the function that returns the value of a reused site.
        """
        variant = self.variant(inputs, reused)
        arguments = self.arguments(inputs, variant, read)
        result = fx.Interpreter(self._graph.weights, graph=variant.nodes).run(*arguments)
        output, *computed = result if variant.returns_tuple else (result,)
        return output, dict(zip(variant.writes, computed, strict=True))

    def variant(self, inputs: Collection[str], reused: frozenset[str] = frozenset()) -> Variant:
        """Return the variant for a call.

        Args:
            inputs: the names of the inputs of the call.
            reused: the sites that are not computed.
        """
        key = frozenset(inputs), reused
        if key not in self._variants:
            missing = {i.name for i in self._graph.inputs if i.name not in inputs}
            self._variants[key] = Variant.split(self._graph.fx, reused, missing)
        return self._variants[key]

    def arguments(
        self, inputs: Mapping[str, torch.Tensor], variant: Variant, read: Callable[[str], torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return the arguments of a variant, in its order.

        Args:
            inputs: the inputs of the call, by name.
            variant: the variant.
            read: the function that returns the value of a reused site.
        """
        return [*(inputs[i.name] for i in self._graph.inputs if i.name in inputs), *map(read, variant.reads)]


def largest_difference(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the largest absolute difference, computed in float64; nan if the shapes differ."""
    if before.shape != after.shape:
        return float("nan")
    return float((before.double() - after.double()).abs().max()) if before.numel() else 0.0


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n.name] = value = super().run_node(n)
        return value


def first_difference(before: Graph, after: Graph, flat: Mapping[str, torch.Tensor]) -> str:
    """Return name, scope and difference of the first node whose value in `after` is not its value in `before`."""
    recorded = []
    for graph in (before, after):
        backend = Interpreted(graph)
        variant = backend.variant(flat)
        recorder = _Recorder(graph.weights, variant.nodes)
        with torch.no_grad():
            recorder.run(*backend.arguments(flat, variant, no_value))
        recorded.append((variant.nodes, recorder.seen))
    (_, old_values), (nodes, new_values) = recorded
    for node in nodes.nodes:
        if node.op in ("placeholder", "output"):
            continue
        old, new = old_values.get(node.name), new_values[node.name]
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and not Contract.EXACT.holds(old, new):
            figure = largest_difference(old, new)
            sources = ", ".join(n.name for n in node.all_input_nodes if n.name not in old_values)
            origin = f", computed from the new {sources}" if sources else ""
            return f"{scope(node) or '(top level)'}, node {node.name} (largest difference {figure:.3g}{origin})"
    return "the output, through new nodes only"


def check_contract(pass_: Pass, before: Graph, after: Graph) -> float:
    """Return the largest difference that a pass made to the outputs, on random inputs.

    The graphs are compared at two sizes, with and without optional inputs, and at a second call that inherits the sites
    that the pass added.

    Args:
        pass_: the pass.
        before: the graph that it was applied to.
        after: the graph that it left.
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
        raise failure(pass_, error, after) from error
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


def _blame(pass_: Pass, graph: Graph) -> None:
    """Apply the parts of a failed pass one by one, so that the error names the guilty one."""
    for inner in pass_.parts:
        after = graph.copy()
        inner.apply(after, CompilerRun(graph, Decisions()))
        check_contract(inner, graph, after)
        graph = after
