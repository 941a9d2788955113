"""`WidthTimes`: the measured seconds of the regions of a UNet by their width."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import fx

from ..atomic import written
from ..errors import EditError, SavedError
from ..graph import Graph
from ..ir.widths import Width
from ..options import Count, Misfit, NotNegative, Positive, fitted
from ..progress import Bar
from ..runtime.apply import apply
from ..runtime.unet import GraphUNet
from ..spec import Spec
from ..text import json_object
from .targets import Run, seconds_of

Table = Mapping[str, Mapping[str, NotNegative]]
FORMAT = 1


@dataclass(frozen=True)
class WidthTimes(Spec):
    """The seconds of regions at several of their widths, and of the whole UNet. It prints as the target alone.

    Args:
        target: what was timed, as text.
        whole: the seconds of a call of the whole UNet.
        table: the seconds of a region by the number of slices that are left, by the path of the width.
    """

    has_text: ClassVar[bool] = False
    target: str = ""
    whole: Positive = field(default=1.0, compare=False)
    table: Table = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return f"WidthTimes({self.target!r})"

    @classmethod
    def measure(
        cls, unet: Any, *, target: Literal["eager", "compiled"] = "eager", points: Count = 4, turns: Count = 7,
        progress: bool = True, **sizes: int,
    ) -> Self:  # fmt: skip
        """Time each region that holds all weights of a width at several numbers of slices, in turns.

        A region runs alone, on random inputs of the shapes that it has in the UNet.

        Args:
            unet: a diffusers UNet or a traced one, on the device to measure.
            target: "eager" or "compiled" PyTorch.
            points: the number of widths of a region, spread evenly up to its own.
            turns: the number of timed calls of each, of which the fastest counts; two more warm up.
            progress: whether a bar is shown.
            sizes: sizes of the call, such as `B=2, H=64, W=64`; by default the model's, for one sample.
        Returns:
            The times.
        Raises:
            SpecError: the graph does not cover the sizes.
        Example:
            `WidthTimes.measure(pipe.unet, B=2)`
        Source:
            Shen et al., "Structural pruning via latency-saliency knapsack" (HALP), 2022, whose table this is.
        """
        graph = apply(unet, ()).graph.at(**sizes)
        widths = {path: width for path, width in graph.widths().items() if _lies_in_region(graph, width)}
        counts = {
            path: sorted({max(1, round(width.slices * (i + 1) / points)) for i in range(points)})
            for path, width in widths.items()
        }
        narrow = [graph.copy() for _ in range(points - 1)]
        for i, each in enumerate(narrow):
            each.narrow({path: range(max(1, round(w.slices * (i + 1) / points))) for path, w in widths.items()})
        found: dict[str, dict[str, float]] = {}
        with Bar(total=len(widths), desc="measure", unit="region", disable=not progress) as bar:
            for path in widths:
                calls = [_region_call(each, path, target) for each in (*narrow, graph)]
                seconds = _in_turns(calls, turns, graph.device)
                last = dict(zip(sorted(counts[path]), seconds[-len(counts[path]) :], strict=True))
                found[path] = {str(count): each for count, each in last.items()}
                bar.update()
        whole = _in_turns([_whole_call(graph, target)], turns, graph.device)[0]
        shape = ", ".join(f"{symbol.name}={symbol.nominal}" for symbol in graph.dims.symbols)
        return cls(f"{target} on {graph.device.type} at {shape}", whole, found)

    def seconds(self, path: str, slices: int) -> float:
        """Return the seconds of a region, interpolated between the widths that were measured.

        Args:
            path: the path of its width.
            slices: the number of slices that are left.
        Raises:
            EditError: the region was not measured.
        """
        if path not in self.table:
            raise EditError(
                f"{self} has no times of {path}", where=path,
                hint="leave it out of `where`, or pass WidthTimes.measure(unet) or WidthTimes.load(path)",
            )  # fmt: skip
        points = sorted((int(count), seconds) for count, seconds in self.table[path].items())
        counts, seconds = [count for count, _ in points], [each for _, each in points]
        if slices < counts[0] and len(points) > 1:  # beyond the narrowest, in the direction of the last two
            slope = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
            return float(max(seconds[0] - max(slope, 0.0) * (counts[0] - slices), 0.0))
        return float(np.interp(slices, counts, np.maximum.accumulate(seconds)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the times to a JSON file.

        Args:
            path: the file.
        """
        plain = {"format": FORMAT, "target": self.target, "whole": self.whole, "table": self.table}
        with written(path) as file:
            file.write_text(json.dumps(plain, indent=1) + "\n")

    @classmethod
    def load(cls, path: str) -> Self:
        """Read a file that `save` wrote.

        Args:
            path: the file.
        Returns:
            The times.
        Raises:
            SavedError: the file is missing or damaged.
        """
        hint = "pass a file that WidthTimes.save wrote"
        plain = json_object(Path(path), SavedError, hint=hint, format=FORMAT)
        try:
            table = fitted(plain["table"], Table)
            if not all(each and all(count.isdigit() for count in each) for each in table.values()):
                raise SavedError("the numbers of slices are no numbers", where=path, hint=hint)
            return cls(fitted(plain["target"], str), fitted(plain["whole"], Positive), table)
        except (KeyError, Misfit) as error:
            raise SavedError(f"these are no times: {error}", where=path, hint=hint) from error


def _lies_in_region(graph: Graph, width: Width) -> bool:
    """Return whether all that a width changes is in the region of its name, which nothing else shares."""
    inside = width.path in graph.paths()
    return inside and all(end.path.startswith(f"{width.path}.") for end in width.ends)


def _region_call(graph: Graph, path: str, target: str) -> Run:
    """Return a call of a region alone, on random inputs."""
    region, nodes = graph.region(path), fx.Graph()
    values: dict[fx.Node, Any] = {}
    inputs = []
    for node in region.nodes:
        for read in node.all_input_nodes:
            if read not in values:
                value = read.meta["val"]
                values[read] = nodes.placeholder(read.name) if isinstance(value, torch.Tensor) else value
                if isinstance(value, torch.Tensor):
                    inputs.append(_random(value, graph.device))
        values[node] = nodes.node_copy(node, values.__getitem__)
    nodes.output(tuple(values[node] for node in region.outputs))
    module: Any = fx.GraphModule(graph.weights, nodes)
    if target == "compiled":
        module = torch.compile(module)
    return lambda: module(*inputs)


def _whole_call(graph: Graph, target: str) -> Run:
    """Return a call of the whole UNet, on random inputs."""
    unet = GraphUNet(graph.copy())
    if target == "compiled":
        unet.compile()
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    given = [spec.name for spec in graph.inputs if not spec.optional]
    flat = {name: _random(nodes[name].meta["val"], graph.device) for name in given}
    return lambda: unet.run(flat)


def _random(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not value.is_floating_point():
        return torch.ones(value.shape, dtype=value.dtype, device=device)
    return torch.randn(value.shape, device=device).to(value.dtype)


def _in_turns(calls: Sequence[Run], turns: int, device: torch.device) -> list[float]:
    """Return the seconds of the fastest call of each, one of each per turn."""
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(turns + 2):
        for call, sample in zip(calls, samples, strict=True):
            seconds = seconds_of(call, device)
            if turn > 1:  # two turns warm up
                sample.append(seconds)
    return [min(sample) for sample in samples]
