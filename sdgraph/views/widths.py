"""`Widths`: the widths of a graph as a table, and the size of the graph once they are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from ..ir.regions import matching
from ..ir.state import GraphState
from ..ir.widths import End, Fixed, Width, find_widths, no_width, size_of
from .format import format_count, format_names, format_table


@dataclass(frozen=True)
class Widths(Mapping[str, Width]):
    """The widths of a graph by path, in graph order. Prints as a table.

    Args:
        graph: the graph.
        found: the widths that can be cut, by path.
        fixed: the others, with the reasons.
    """

    graph: GraphState
    found: Mapping[str, Width]
    fixed: tuple[Fixed, ...]

    @classmethod
    def of(cls, graph: GraphState) -> Widths:
        """Return the widths of a graph.

        Args:
            graph: the graph.
        """
        found, fixed = find_widths(graph)
        return cls(graph, found, tuple(fixed))

    def __getitem__(self, path: str) -> Width:
        return self.found[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def matching(self, patterns: str | Iterable[str]) -> list[str]:
        """Return the paths of the widths that patterns name, in graph order; see `Graph.matching`.

        Args:
            patterns: a path or pattern, or several.
        Raises:
            PathError: a pattern names nothing, or a width that cannot be cut; the error gives the reason.
        """
        return matching(patterns, list(self.found), self._check)

    def _check(self, path: str) -> None:
        if path not in self.found:
            raise no_width(path, self.found, self.fixed)

    def parts(
        self, path: str, value: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    ) -> Iterator[torch.Tensor]:
        """Yield the parameters of all weights that share a width, each as a tensor (slices, elements of a slice).

        Args:
            path: the path of the width.
            value: a function of a parameter that returns a tensor of its shape, such as its gradient; by default the
                parameter itself.
        Example:
            `sum(part.square().sum(1) for part in graph.widths().parts("mid_block.resnets.0"))`
        """
        width = self.found[path]
        for end in width.ends:
            held = self.graph.weights.get(end.path)
            dim = 1 if end.side == "in" else 0
            for tensor in [held] if isinstance(held, torch.Tensor) else held.parameters():
                if dim < tensor.ndim:
                    copies = value(tensor).movedim(dim, 0).reshape(end.copies, width.slices, -1)
                    yield copies.transpose(0, 1).reshape(width.slices, -1)

    def size(self, kept: Mapping[str, int]) -> tuple[int, int]:
        """Return the parameters and the multiply-accumulates of the graph once widths are cut, at the nominal sizes.

        Args:
            kept: the numbers of slices that stay, by path; all slices of a width that is not named.
        """
        parameters, macs = self._whole
        for path in dict.fromkeys(end.path for name in kept for end in self.found[name].ends):
            weight, others, cost = self._layers[path]
            inner, outer = (self._left(path, kept, sides) for sides in (("in",), ("out", "norm")))
            parameters += round(weight * inner * outer) - weight + round(others * outer) - others
            macs += round(cost * inner * outer) - cost
        for name, count in kept.items():
            whole = sum(map(self.graph.macs_of, self.found[name].nodes))
            macs += whole * count // self.found[name].slices - whole
        return parameters, macs

    def _left(self, path: str, kept: Mapping[str, int], sides: tuple[str, ...]) -> float:
        """Return the share of a dimension of a weight that stays."""
        name = next((self._names[path, side] for side in sides if (path, side) in self._names), None)
        return kept[name] / self.found[name].slices if name in kept else 1.0  # type: ignore[index]

    @cached_property
    def _names(self) -> dict[tuple[str, str], str]:
        return {(end.path, end.side): name for name, width in self.found.items() for end in width.ends}

    @cached_property
    def _whole(self) -> tuple[int, int]:
        return sum(p.numel() for p in self.graph.parameters().values()), self.graph.macs

    @cached_property
    def _layers(self) -> dict[str, tuple[int, int, int]]:
        """The elements of the weight, those of the bias or of a norm, and the multiply-accumulates, by path."""
        costs: dict[str, int] = {}
        for node in self.graph.fx.nodes:
            if node.op == "call_module":
                costs[str(node.target)] = costs.get(str(node.target), 0) + self.graph.macs_of(node)
        layers = {}
        for path, _ in self._names:
            held = self.graph.weights.get(path)
            tensors = list(held.parameters()) if hasattr(held, "parameters") else [held]
            weight = sum(t.numel() for t in tensors if t.ndim > 1)
            layers[path] = weight, sum(t.numel() for t in tensors) - weight, costs.get(path, 0)
        return layers

    def __str__(self) -> str:
        parameters, macs = self._whole
        rows = [("width", "slices", "parameters of each", "MACs of each", "weights")]
        for name, width in self.found.items():
            fewer = self.size({name: width.slices - 1})
            ends = ", ".join(self._short(name, end) for end in width.ends[:6])
            more = f" and {len(width.ends) - 6} more" if len(width.ends) > 6 else ""
            slices = f"{width.slices} {width.kind}" + (f" of {width.channels}" if width.channels > 1 else "")
            each = format_count(parameters - fewer[0]), format_count(macs - fewer[1])
            rows.append((name, slices, *each, ends + more))
        lines = [format_table(rows)] if self.found else ["no width can be cut"]
        reasons: dict[str, list[str]] = {}
        for one in self.fixed:
            reasons.setdefault(one.reason, []).append(one.path)
        lines += [f"fixed: {format_names(paths)}: {reason}" for reason, paths in reasons.items()]
        return "\n".join(lines)

    def _short(self, name: str, end: End) -> str:
        path = end.path.removeprefix(f"{name}.")
        size = size_of(self.graph, end)
        return f"{path} ({size})" if end.side == "norm" else f"{path} {end.side} ({size})"
