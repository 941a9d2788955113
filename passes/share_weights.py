"""`ShareWeights`: one set of weights for several regions of the same shape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sdgraph import Contract, Graph, Pass
from sdgraph.errors import EditError, SpecError
from sdgraph.options import Count, Index, Paths, Text


@dataclass(frozen=True)
class ShareWeights(Pass):
    """Let regions of the same shape use one set of weights, those of the first region in the graph.

    Norms stay their own. The other weights are in the graph once, and so they are in `parameters()`, in a saved folder
    and in an export. Multiply-accumulates stay the same. The UNet needs distillation afterwards.

    Args:
        groups: groups of regions, each by patterns that name at least two.
        among: the regions that groups are proposed from; see `similar`.
        count: the number of regions that give up their weights; see `similar`.
    Raises:
        SpecError: there are no groups, or a group is no text.
        PathError: there is no such region.
        EditError: a group has one region or regions of unlike shapes, groups overlap, or weights are shared already.
    Example:
        `sdgraph.apply(unet, ShareWeights(("mid_block.resnets.*", ("up_blocks.1.resnets.1", "up_blocks.2.resnets.1"))))`
    Source:
        Liu et al., "FoldGPT", 2024, where neighbouring blocks of a language model share weights.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    groups: tuple[Paths, ...] = ()
    among: str | tuple[Text, ...] = ()
    count: Index = 0

    def __post_init__(self) -> None:
        if bool(self.groups) == bool(self.among) or bool(self.among) != (self.count > 0):
            hint = "pass groups, or ShareWeights.similar(among, count)"
            raise SpecError(f"{self} names no groups", where="ShareWeights", hint=hint)

    @classmethod
    def similar(cls, among: Paths = "**.resnets.*", count: Count = 2) -> ShareWeights:
        """Return the pass that groups the regions whose weights are the most similar.

        The similarity of two regions of the same shape is the cosine of all weights that they would share. Pairs are
        grouped from the most similar one down. The groups are recorded, and used again on loading.

        Args:
            among: patterns of the regions to choose from.
            count: the number of regions that give up their weights, at least 1.
        """
        return cls(among=among, count=count)

    def run(self, graph: Graph) -> None:
        groups = [graph.matching(group) for group in self.groups]
        if self.among:
            groups = graph.decide("groups of similar regions", self._proposed, graph)
        _check_apart(groups)
        for group in groups:
            first, *others = group
            if not others:
                raise EditError(f"{first} is alone in its group", where=first, hint="name two regions or more")
            shared = _leaves(graph, first)
            for path in others:
                own = _leaves(graph, path)
                _check_alike(graph, first, shared, path, own)
                for name, node in own.items():
                    graph.share(node, str(shared[name].target))

    def _proposed(self, graph: Graph) -> list[list[str]]:
        leaves = {path: _leaves(graph, path) for path in graph.matching(self.among)}
        kinds = {path: _kinds(graph, own) for path, own in leaves.items()}
        tensors = {path: _tensors(graph, own) for path, own in leaves.items()}
        pairs = [pair for pair in combinations(leaves, 2) if kinds[pair[0]] == kinds[pair[1]] and kinds[pair[0]]]
        pairs.sort(key=lambda pair: _cosine(tensors[pair[0]], tensors[pair[1]]), reverse=True)
        group_of = {path: [path] for path in leaves}
        left = self.count
        for one, other in pairs:
            if left and group_of[one] is not group_of[other]:
                merged = sorted(group_of[one] + group_of[other], key=list(leaves).index)
                group_of |= dict.fromkeys(merged, merged)
                left -= 1
        if left:
            raise EditError(
                f"of {len(leaves)} regions only {self.count - left} can use the weights of others of the same shape",
                where=str(self.among),
                hint="lower count, or name more regions",
            )
        return [group for path, group in group_of.items() if group[0] == path and len(group) > 1]


def _check_apart(groups: Iterable[Iterable[str]]) -> None:
    """Refuse regions that are in several groups, or within each other."""
    for one, other in combinations([path for group in groups for path in group], 2):
        if one == other or one.startswith(f"{other}.") or other.startswith(f"{one}."):
            raise EditError(f"{one} and {other} overlap", where=other, hint="name every region once")


def _leaves(graph: Graph, path: str) -> dict[str, fx.Node]:
    """Return the nodes of a region that use weights, except norms, by their paths in it."""
    inside = set(graph.region(path).nodes)
    reading = [node for node in graph.nodes if node.op in ("call_module", "get_attr")]
    users = {str(node.target): node for node in reading if node not in inside}
    leaves = {}
    for node in reading:
        target = str(node.target)
        if node not in inside or not _tensors(graph, {"": node}):
            continue
        if "Norm" in graph.classes.get(target if node.op == "call_module" else target.rpartition(".")[0], ""):
            continue
        if target in users or not f"{target}.".startswith(f"{path}."):
            other = graph.module_path(users[target]) if target in users else target
            raise EditError(
                f"{path} and {other} share weights already", where=path, hint="name all regions in one group, once"
            )
        leaves[target[len(path) :]] = node
    return leaves


def _tensors(graph: Graph, leaves: dict[str, fx.Node]) -> list[Tensor]:
    """Return the parameters of leaves, in the order of their names."""
    tensors: list[Tensor] = []
    for _, node in sorted(leaves.items()):
        target = str(node.target)
        if node.op == "call_module":
            tensors += graph.module(target).parameters()
        elif isinstance(graph.tensor(target), nn.Parameter):
            tensors.append(graph.tensor(target))
    return tensors


def _kinds(graph: Graph, leaves: dict[str, fx.Node]) -> dict[str, str]:
    """Return what the leaves of a region are, by their paths in it."""
    return {
        name: repr(graph.module(str(node.target)))
        if node.op == "call_module"
        else f"of shape {tuple(graph.tensor(str(node.target)).shape)}"
        for name, node in sorted(leaves.items())
    }


def _check_alike(graph: Graph, one: str, its: dict[str, fx.Node], other: str, own: dict[str, fx.Node]) -> None:
    """Refuse two regions that differ in more than the values of their weights."""
    kinds = _kinds(graph, its), _kinds(graph, own)
    for name in sorted(its.keys() | own.keys()):
        was, now = (kind.get(name, "nothing") for kind in kinds)
        if was != now:
            raise EditError(
                f"{one}{name} is {was}, and {other}{name} is {now}",
                where=other,
                hint="only regions of the same shape can share weights",
            )
    if not its:
        raise EditError(f"{one} and {other} have no weights to share", where=other, hint="name other regions")


def _cosine(ones: list[Tensor], others: list[Tensor]) -> float:
    with torch.no_grad():
        products = [
            sum(float(a.double().flatten() @ b.double().flatten()) for a, b in zip(x, y, strict=True))
            for x, y in ((ones, others), (ones, ones), (others, others))
        ]
    return float(products[0] / (products[1] * products[2]) ** 0.5)
