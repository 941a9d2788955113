"""What a pass promises about the numbers, and the check of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from .specialise import without
from .trace import scope

if TYPE_CHECKING:
    from .graph import Graph


@dataclass(frozen=True)
class Contract:
    """A numeric promise: EXACT (bit for bit), CLOSE (within `rtol`, `atol`), or APPROXIMATE (changed on purpose).

    `Contract.CLOSE(rtol=1e-3)` sets other bounds. The output of an APPROXIMATE pass must still be finite.
    """

    kind: str
    rtol: float = 0.0
    atol: float = 0.0

    EXACT: ClassVar[Contract]
    CLOSE: ClassVar[Contract]
    APPROXIMATE: ClassVar[Contract]

    def __call__(self, *, rtol: float | None = None, atol: float | None = None) -> Contract:
        if self.kind != "close":
            raise TypeError(f"{self} has no bounds to set")
        return replace(self, rtol=self.rtol if rtol is None else rtol, atol=self.atol if atol is None else atol)

    def __str__(self) -> str:
        return f"CLOSE(rtol={self.rtol:g}, atol={self.atol:g})" if self.kind == "close" else self.kind.upper()

    def holds(self, before: torch.Tensor, after: torch.Tensor) -> bool:
        """Whether `after` is what this contract allows for `before`."""
        if before.shape != after.shape or before.dtype != after.dtype:
            return False
        if self.kind == "exact":
            return torch.equal(before, after) or bool(((before == after) | (before.isnan() & after.isnan())).all())
        if self.kind == "close":
            return torch.allclose(before, after, rtol=self.rtol, atol=self.atol)
        return bool(after.isfinite().all()) or not bool(before.isfinite().all())

    @staticmethod
    def weakest(contracts: list[Contract]) -> Contract:
        """What a sequence of passes promises."""
        rank = ["exact", "close", "approximate"]
        kind = max((c.kind for c in contracts), key=rank.index, default="exact")
        close = [c for c in contracts if c.kind == "close"]
        if kind != "close":
            return Contract(kind)
        return Contract(kind, sum(c.rtol for c in close), sum(c.atol for c in close))


Contract.EXACT = Contract("exact")
Contract.CLOSE = Contract("close", rtol=1e-4, atol=1e-5)
Contract.APPROXIMATE = Contract("approximate")


def example(graph: Graph, seed: int = 0, **sizes: int) -> dict[str, torch.Tensor]:
    """Random inputs of a graph without its optional ones, small by default, on its weights' device.

    Args:
        sizes: sizes of the call by symbol, e.g. `B=2, H=8, W=16, L=5`.
    """
    weight = next(iter(graph.parameters().values()), torch.empty(0, dtype=graph.dtype, device=graph.device))
    unit = 2 ** max(len(graph.config.get("down_block_types", ())) - 1, 0)
    least = [int(g.condition[len("H >= ") :]) for g in graph.guards if g.condition.startswith("H >= ") and g.outcome]
    unit = max(unit, *least, 1)
    known = {s.name: s.nominal for s in graph.dims.symbols}
    known |= {"B": 2, "H": unit, "W": 2 * unit, "L": 5, **sizes}
    generator = torch.Generator().manual_seed(seed)
    flat = {}
    for spec in graph.inputs:
        if spec.optional or spec.shape is None:
            continue
        shape = [d if isinstance(d, int) else known[d] for d in spec.shape]
        if spec.kind == "float":
            flat[spec.name] = torch.randn(shape, generator=generator).to(weight)
        else:
            highest = graph.config.get("num_class_embeds") or 1000
            flat[spec.name] = torch.randint(0, highest, shape, generator=generator).to(weight.device)
    return flat


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n.name] = value = super().run_node(n)
        return value

    def record(self, flat: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        self.seen: dict[str, Any] = {}
        with torch.no_grad():
            self.run(*[flat[n.name] for n in self.graph.nodes if n.op == "placeholder"])
        return self.seen


def run(graph: Graph, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The output of a graph for flat inputs, without gradients."""
    with torch.no_grad():
        return _runnable(graph, flat)(*[flat[i.name] for i in graph.inputs if i.name in flat])  # type: ignore[no-any-return]


def _runnable(graph: Graph, flat: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    absent = {i.name for i in graph.inputs if i.name not in flat}
    return fx.GraphModule(graph.weights, without(graph.fx, absent))


def largest_difference(before: torch.Tensor, after: torch.Tensor) -> float:
    """Largest absolute difference, computed in float64; nan where a shape differs."""
    if before.shape != after.shape:
        return float("nan")
    return float((before.double() - after.double()).abs().max()) if before.numel() else 0.0


def first_difference(before: Graph, after: Graph, flat: Mapping[str, torch.Tensor]) -> str:
    """Name, scope and difference of the first node of `after` that does not compute what it did in `before`."""
    was = _Recorder(_runnable(before, flat)).record(flat)
    runnable = _runnable(after, flat)
    now = _Recorder(runnable).record(flat)
    for node in runnable.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        old, new = was.get(node.name), now[node.name]
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and not Contract.EXACT.holds(old, new):
            figure = largest_difference(old, new)
            sources = ", ".join(n.name for n in node.all_input_nodes if n.name not in was)
            made = f", computed from the new {sources}" if sources else ""
            return f"{scope(node) or '(top level)'}, node {node.name} (largest difference {figure:.3g}{made})"
    return "the output, through new nodes only"
