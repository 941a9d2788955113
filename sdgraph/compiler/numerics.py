"""Running graphs on random inputs, to compare what they compute.

Graphs are tried on generations: calls with the same conditioning, of which the later ones inherit what the first one
computed. So what sites keep is compared as well as what is computed at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..contract import Contract
from ..graph import Graph
from ..ir.dims import evaluate
from ..ir.guards import raised
from ..ir.inputs import Input
from ..ir.nodes import scope
from ..ir.sites import Step, step
from ..ir.specialize import drop_inputs

Call = dict[str, torch.Tensor]


def example(graph: Graph, seed: int = 0, optional: bool = False, **sizes: int) -> Call:
    """Random inputs of a call, small by default, on the device of the weights.

    Args:
        optional: also the inputs that a call may leave out.
        sizes: sizes of the call by symbol, e.g. `B=2, H=8, W=16, L=5`; made larger where the graph requires it.
    """
    known = _sizes([graph])[0]
    known |= raised(graph.guards, known | sizes)
    generator = torch.Generator().manual_seed(seed)
    flat = {}
    for spec in graph.resolved_inputs():
        if (spec.optional and not optional) or spec.shape is None or "?" in spec.shape:
            continue
        shape = [d if isinstance(d, int) else int(evaluate(d, known)) for d in spec.shape]
        flat[spec.name] = _random(graph, spec, shape, generator)
    return flat


def _random(graph: Graph, spec: Input, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    weight = next(iter(graph.parameters().values()), torch.empty(0, dtype=graph.dtype, device=graph.device))
    if spec.kind == "float":
        return torch.randn(shape, generator=generator).to(weight)
    if spec.kind == "mask":
        return torch.ones(shape).index_fill(-1, torch.tensor([shape[-1] - 1]), 0.0).to(weight)
    highest = graph.config.get("num_class_embeds") or 1000
    return torch.randint(0, highest, shape, generator=generator).to(weight.device)


def generations(graph: Graph, *others: Graph) -> tuple[list[Call], list[Call]]:
    """Random calls of two generations: one call, and two at another, odd size with the optional inputs.

    Args:
        others: graphs that are to take them, too. A residual that is added to something of another shape there is left
            out.
    """
    even, odd = _sizes([graph, *others])
    inputs = [set(g.resolved_inputs()) for g in (graph, *others)]
    shared = {i.name for i in set.intersection(*inputs)}
    constant = {i.name for i in graph.inputs if i.conditioning}
    first, second = (
        {n: value for n, value in example(graph, seed, True, **odd).items() if n in shared} for seed in (1, 2)
    )
    return [example(graph, 0, False, **even)], [
        first,
        {n: first[n] if n in constant else value for n, value in second.items()},
    ]


def _sizes(graphs: Sequence[Graph]) -> tuple[dict[str, int], dict[str, int]]:
    """Two sets of sizes of a call that the guards of all graphs accept; odd ones where they may be."""
    unit = 2 ** max(len(graphs[0].config.get("down_block_types", ())) - 1, 0)
    nominal = {s.name: s.nominal for s in graphs[0].dims.symbols}
    guards = tuple(dict.fromkeys(guard for graph in graphs for guard in graph.guards))
    even = {"B": 2, "H": unit, "W": 2 * unit, "L": 5}
    odd = {"B": 3, "H": unit + 1, "W": 2 * unit + 3, "L": 7}
    return nominal | raised(guards, nominal | even), nominal | raised(guards, nominal | odd)


def run(graph: Graph, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The output of a graph for flat inputs, without gradients."""
    return play(graph, [flat])[0]


def play(graph: Graph, calls: Sequence[Mapping[str, torch.Tensor]], stale: Collection[str] = ()) -> list[torch.Tensor]:
    """The outputs of the calls of a generation, without gradients.

    Args:
        calls: flat inputs of each call. The first call refreshes all sites.
        stale: sites that the other calls inherit from it.
    """
    outputs, values = [], dict[str, torch.Tensor]()
    steps: dict[tuple[frozenset[str], bool], Step] = {}
    with torch.no_grad():
        for number, flat in enumerate(calls):
            kind = frozenset(flat), bool(number and stale)
            if kind not in steps:
                steps[kind] = _step(graph, flat, stale if number else ())
            made = steps[kind]
            # Interpreted: generating code takes longer than running it once.
            result = fx.Interpreter(graph.weights, graph=made.nodes).run(*_arguments(graph, flat, made, values))
            output, *refreshed = result if made.returns_tuple else (result,)
            values |= zip(made.gives, refreshed, strict=True)
            outputs.append(output)
    return outputs


def _step(graph: Graph, flat: Mapping[str, torch.Tensor], stale: Collection[str]) -> Step:
    return step(drop_inputs(graph.fx, {i.name for i in graph.inputs if i.name not in flat}), stale)


def _arguments(
    graph: Graph, flat: Mapping[str, torch.Tensor], made: Step, values: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    return [*(flat[i.name] for i in graph.inputs if i.name in flat), *(values[site] for site in made.takes)]


def largest_difference(before: torch.Tensor, after: torch.Tensor) -> float:
    """Largest absolute difference, computed in float64; nan where a shape differs."""
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
    """Name, scope and difference of the first node of `after` that does not compute what it did in `before`."""
    recorded = []
    for graph in (before, after):
        made = _step(graph, flat, ())
        recorder = _Recorder(graph.weights, made.nodes)
        with torch.no_grad():
            recorder.run(*_arguments(graph, flat, made, {}))
        recorded.append((made.nodes, recorder.seen))
    (_, was), (nodes, now) = recorded
    for node in nodes.nodes:
        if node.op in ("placeholder", "output"):
            continue
        old, new = was.get(node.name), now[node.name]
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and not Contract.EXACT.holds(old, new):
            figure = largest_difference(old, new)
            sources = ", ".join(n.name for n in node.all_input_nodes if n.name not in was)
            made_from = f", computed from the new {sources}" if sources else ""
            return f"{scope(node) or '(top level)'}, node {node.name} (largest difference {figure:.3g}{made_from})"
    return "the output, through new nodes only"
