"""The replay of calls without a region: only what comes after it is computed, from kept values of the whole UNet."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..graph import Graph
from ..ir.dims import evaluate
from ..ir.evaluation import Operation
from ..ir.guards import check_call
from ..ir.nodes import eliminate_dead_code
from ..ir.variants import copy_nodes, drop_inputs
from ..runtime.unet import GraphUNet


class Replay:
    """Calls of the whole UNet, and the same calls without regions.

    A value that does not depend on a removed region is the same without it. Such values are kept from one run of the
    whole UNet, as far as they fit, and the others are computed again; both ways give the same bits.

    Args:
        whole: the UNet with all of its regions.
        calls: the flat inputs of the calls. Those that have other inputs than the first are computed as a whole.
        paths: the module paths of the regions that are going to be removed.
        limit: the bytes of the values that are kept, of all calls together.
    """

    def __init__(
        self, whole: GraphUNet, calls: Sequence[Mapping[str, Tensor]], paths: Iterable[str], limit: int
    ) -> None:
        self._whole, self.calls, self._paths, self._limit = whole, calls, tuple(paths), limit
        inputs = whole.graph.inputs
        self._missing = {spec.name for spec in inputs if spec.name not in calls[0]}
        self._given = [spec.name for spec in inputs if spec.name in calls[0]]

    @property
    def outputs(self) -> list[Tensor]:
        """The output of the whole UNet at each call."""
        return self._recorded[0]

    def similarities(self) -> dict[str, float]:
        """Return the cosine similarity of each region's outputs and of the values that replace them, by path.

        It is the mean over the outputs of the region and over the calls.
        """
        return self._recorded[2]

    def run(self, without: GraphUNet) -> list[Tensor]:
        """Return the output of a pruned UNet at each call.

        Args:
            without: the UNet without some of its regions, over the same weights.
        """
        module, reads = self.rest(without.graph)
        with torch.no_grad():
            return [
                without.run(flat)
                if kept is None
                else module(*(flat[name] for name in self._given), *(kept[name] for name in reads))
                for flat, kept in zip(self.calls, self._recorded[1], strict=True)
            ]

    def rest(self, pruned: Graph) -> tuple[fx.GraphModule, tuple[str, ...]]:
        """Return the part of a pruned graph that kept values do not hold, and the names of the values that it reads.

        Args:
            pruned: the graph without some of its regions.
        Returns:
            The part as a module, whose arguments are the inputs of the call and those values.
        """
        nodes = drop_inputs(pruned.fx, self._missing)
        same = _unchanged(self._nodes, nodes)
        kept = self._recorded[1][0] or {}
        last = [node for node in nodes.nodes if node.op == "placeholder"][-1]
        given = dict[str, fx.Node]()
        for node in [node for node in nodes.nodes if node.name in kept and node.name in same]:
            with nodes.inserting_after([last, *given.values()][-1]):
                given[node.name] = value = nodes.placeholder(f"kept_{len(given)}")
            node.replace_all_uses_with(value)
        eliminate_dead_code(nodes, unneeded=given.values())
        reads = tuple(name for name, value in given.items() if not value._erased)
        return fx.GraphModule(pruned.weights, nodes), reads

    @cached_property
    def _nodes(self) -> fx.Graph:
        """The nodes of the whole UNet for calls with these inputs."""
        return drop_inputs(self._whole.graph.fx, self._missing)

    @cached_property
    def _recorded(self) -> tuple[list[Tensor], list[dict[str, Tensor] | None], dict[str, float]]:
        """The outputs and kept values of each call of the whole UNet, and the similarities of regions.

        Of calls that have other inputs than the first, no values are kept.
        """
        nodes = copy_nodes(self._whole.graph.fx)
        copies, end = {node.name: node for node in nodes.nodes}, nodes.output_node()
        names, compared = self._worth_keeping(), list[str]()
        results = [end.args[0], *(copies[name] for name in names)]
        with nodes.inserting_before(end):
            for path in self._paths:
                region = self._whole.graph.region(path)
                for output in region.outputs:
                    pair = tuple(copies[node.name] for node in region.stand_in(output))
                    results.append(nodes.call_function(cosine, pair))
                    compared.append(path)
        end.args = (tuple(results),)
        nodes = drop_inputs(nodes, self._missing)
        module = fx.GraphModule(self._whole.graph.weights, nodes)
        outputs, kept = list[Tensor](), list[dict[str, Tensor] | None]()
        found: dict[str, list[float]] = {path: [] for path in self._paths}
        for flat in self.calls:
            if flat.keys() != self.calls[0].keys():
                with torch.no_grad():
                    outputs.append(self._whole.run(flat))
                kept.append(None)
                continue
            with torch.no_grad():
                result, *values = module(*(flat[name] for name in self._given))
            outputs.append(result)
            kept.append(dict(zip(names, values[: len(names)], strict=True)))
            for path, value in zip(compared, values[len(names) :], strict=True):
                found[path].append(float(value))
        return outputs, kept, {path: sum(values) / len(values) for path, values in found.items()}

    def _worth_keeping(self) -> list[str]:
        """Return the names of the values to keep: those that most regions need for their bytes, as many as fit."""
        needed, graph = Counter[str](), self._whole.graph
        for path in self._paths:
            region = graph.region(path)
            pairs = dict(region.stand_in(output) for output in region.outputs)
            after = set[fx.Node]()
            for node in graph.fx.nodes:
                if node not in pairs and any(n in pairs or n in after for n in node.all_input_nodes):
                    after.add(node)
            read = {pairs.get(n, n) for node in after for n in node.all_input_nodes if n not in after}
            needed.update(node.name for node in read if node.op not in ("placeholder", "get_attr"))
        sizes = check_call(graph.resolved_inputs(), (), self.calls[0], self._whole.dtype)
        nodes = {node.name: node for node in self._nodes.nodes}
        room, names = self._limit / len(self.calls), list[str]()
        costs = {name: _bytes(graph, nodes[name], sizes) for name in needed if name in nodes}
        for name in sorted(costs, key=lambda name: (costs[name] / needed[name], name)):
            if costs[name] <= room:
                room -= costs[name]
                names.append(name)
        return names


def cosine(value: Tensor, instead: Tensor) -> Tensor:
    """Return the cosine similarity of two tensors of one shape, a scalar."""
    return F.cosine_similarity(value.double().flatten(), instead.double().flatten(), dim=0)


def _unchanged(whole: fx.Graph, pruned: fx.Graph) -> set[str]:
    """Return the names of the nodes of a pruned graph whose values are those of the whole graph."""
    before, same = {node.name: node for node in whole.nodes}, set[str]()
    for node in pruned.nodes:
        other = before.get(node.name)
        if (
            other is not None
            and Operation.of(node) == Operation.of(other)
            and all(source.name in same for source in node.all_input_nodes)
        ):
            same.add(node.name)
    return same


def _bytes(graph: Graph, node: fx.Node, sizes: Mapping[str, int]) -> float:
    """Return the bytes that keeping the value of a node takes; infinite if it is no tensor, or of unknown size."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return math.inf
    if node.target is operator.getitem:  # a part of a tensor would keep all of it
        whole = node.all_input_nodes[0].meta["val"]
        if not isinstance(whole, Tensor) or whole.numel() != value.numel():
            return math.inf
    shape = graph.dims.expressions(value, node.meta["probe"])
    if "?" in shape:
        return math.inf
    return math.prod(int(evaluate(str(size), sizes)) for size in shape) * value.element_size()
