"""`PruneBlocks`: take whole regions out of a UNet."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import torch

from sdgraph import Contract, Graph, Pass
from sdgraph.errors import EditError, PathError, SpecError, did_you_mean
from sdgraph.options import Paths

PRESETS = ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")


@dataclass(frozen=True)
class PruneBlocks(Pass):
    """Remove blocks, by preset or by module path.

    Presets fit any UNet with two layers per block. `bk-sdm-base` keeps the first layer of every down block and the
    first and last layers of every up block; `bk-sdm-small` also removes the mid block; `bk-sdm-tiny` also removes the
    innermost level. The remaining weights are those of the source, as BK-SDM initializes its students; good images need
    distillation afterwards.

    A list of paths removes any regions: resnets, attentions, transformer blocks, units (`...attn1`, `...ff`), the mid
    block, whole levels. Patterns such as `up_blocks.*.attentions.-1` are those of `sdgraph.Graph.matching`. The main
    flow goes past a removed region as `sdgraph.Graph.bypass` describes: an up layer is removed together with its skip
    connection, and of a resnet that changes the channels the 1x1 shortcut stays. ControlNet and adapter residuals of
    the remaining skips are added where they were before.

    Args:
        blocks: a preset, a path, or several paths.
    Raises:
        PathError: a path is unknown (the error names the nearest ones), or was removed before.
        ShapeError: the remaining parts do not fit together; the error names the place and the two shapes.
    Source:
        The presets are BK-SDM's: Kim et al., 2023, arXiv 2305.15798.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    blocks: Paths = ()

    def __post_init__(self) -> None:
        blocks = self.blocks
        if isinstance(blocks, str) and blocks not in PRESETS and not re.search(r"[._*]", blocks):
            hint = did_you_mean(blocks, PRESETS) or f"presets: {', '.join(PRESETS)}; or module paths"
            raise SpecError(f"no preset {blocks!r}", where="PruneBlocks", hint=hint)

    def run(self, graph: Graph) -> None:
        for path in self._paths(graph):
            graph.bypass(path)

    def stages(self, graph: Graph) -> tuple[PruneBlocks, ...]:
        """Return the same removals as several passes, which can be trained apart.

        Blocks change together if the skip connection that is removed with an up layer comes from the other block, or if
        a block is removed as a whole and only its neighbours can learn to do without it.

        Args:
            graph: the graph that the pass would be applied to. It is not changed.
        Example:
            `PruneBlocks("bk-sdm-base").stages(sdgraph.trace(unet))`
        """
        paths = self._paths(graph)
        order = list(dict.fromkeys(block for path in graph.paths() if (block := _block(path))))
        together: nx.Graph[str] = nx.Graph()
        for path in paths:
            block = _block(path)
            together.add_node(block)
            entry = graph.region(path).main_input
            if entry is not None and entry.target is torch.cat:
                for skip in entry.all_input_nodes[1:]:
                    together.add_edge(block, _origin(graph, skip) or block)
            if path == block:
                place = order.index(block)
                for side in (order[place::-1], order[place:]):
                    together.add_edge(block, next((b for b in side if b not in paths), block))
        parts = sorted(nx.connected_components(together), key=lambda part: min(map(order.index, part)))
        stages = [tuple(path for path in paths if _block(path) in part) for part in parts]
        return tuple(PruneBlocks(stage) for stage in stages if stage)

    def _paths(self, graph: Graph) -> list[str]:
        if isinstance(self.blocks, str) and self.blocks in PRESETS:
            return list(_preset(graph, self.blocks))
        return _outermost(graph.matching(self.blocks))


def _block(path: str) -> str:
    """Return the path of the block that a path lies in, "" outside of blocks."""
    match = re.match(r"(down_blocks|up_blocks)\.\d+|mid_block", path)
    return match[0] if match else ""


def _origin(graph: Graph, skip: torch.fx.Node) -> str:
    """Return the block that a skip connection comes from, "" if it comes from none."""
    while not (block := _block(graph.module_path(skip))) and skip.all_input_nodes:
        skip = skip.all_input_nodes[0]  # past the sum with a ControlNet's residual
    return block


def _outermost(paths: list[str]) -> list[str]:
    """Return the paths that lie in no other path, last in the graph first."""
    return [p for p in reversed(paths) if not any(p.startswith(f"{other}.") for other in paths)]


def _preset(graph: Graph, preset: str) -> Iterator[str]:
    down, up = _layers(graph, "down_blocks"), _layers(graph, "up_blocks")
    if graph.removed:
        first = next(iter(graph.removed))
        raise PathError(
            f"the UNet is pruned already: {graph.removed[first]} removed {first}",
            where=first,
            hint="apply a preset to the whole UNet, or name the paths to remove",
        )
    if {len(level) for level in down} != {2} or {len(level) for level in up} != {3}:
        raise EditError(
            f"{preset} needs two layers per block; this UNet has {[len(level) for level in down]} going down and "
            f"{[len(level) for level in up]} going up",
            where="config layers_per_block",
            hint="name the paths to remove: PruneBlocks(('down_blocks.0.resnets.1', ...))",
        )
    innermost = len(down) - 1
    tiny = preset == "bk-sdm-tiny"
    present = set(graph.paths())
    for level in range(len(up)):
        if not (tiny and level == 0):
            yield from _layer(present, f"up_blocks.{level}", 1)
    if tiny:
        yield "up_blocks.0"
    if preset != "bk-sdm-base" and "mid_block" in present:
        yield "mid_block"
    if tiny:
        yield f"down_blocks.{innermost}"
        yield f"down_blocks.{innermost - 1}.downsamplers.0"
    for level in range(innermost - tiny, -1, -1):
        yield from _layer(present, f"down_blocks.{level}", 1)


def _layer(present: set[str], block: str, index: int) -> list[str]:
    """Return the paths of the attention, if there is one, and the resnet of a layer."""
    return [p for p in (f"{block}.attentions.{index}", f"{block}.resnets.{index}") if p in present]


def _layers(graph: Graph, side: str) -> list[list[str]]:
    """Return the paths of the resnets of every level."""
    levels: dict[str, list[str]] = {}
    for path in graph.paths():
        if fnmatch.fnmatchcase(path, f"{side}.*.resnets.*") and path.count(".") == 3:
            levels.setdefault(path.split(".")[1], []).append(path)
    return list(levels.values())
