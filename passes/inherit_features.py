"""`InheritFeatures`: let calls of a generation take over features from earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sdgraph import Contract, Findings, Graph, Pass, Region
from sdgraph.errors import EditError, SpecError
from sdgraph.schedules import Schedule, Uniform

PARTS = ("auto", "branch", "value", "entry")
EVERY_OTHER = Uniform(2)


@dataclass(frozen=True)
class InheritFeatures(Pass):
    """Inherit the features of some modules from earlier calls instead of computing them (A-SDM's feature inheritance).

    Each module is a site: at the calls that `schedule` names it is computed and kept; at all others what was kept is
    used, and everything that only served to compute it is left out. Sites may be blocks, layers (a resnet, an
    attention) or units (`...attn1`, `...ff`). Several of these passes give sites their own schedules.

    Args:
        sites: a module path or pattern, or several, see `sdgraph.Graph.matching`.
        schedule: when they are refreshed; `sdgraph.schedules` has them.
        part: what is inherited.
            "value": what the module returns, all of it.
            "branch": its residual branch, which is then added to what is fresh.
            "auto": the branch of resnets, attentions and units, else the value.
            "entry": the main flow into an up layer, before the skip is concatenated to it.
    Raises:
        PathError: a site that is not in the graph.
        EditError: a site within another one, without such a part, or whose inheritance leaves nothing out.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    sites: str | tuple[str, ...] = ()
    schedule: Schedule = EVERY_OTHER
    part: str = "auto"

    def __post_init__(self) -> None:
        sites = (self.sites,) if isinstance(self.sites, str) else tuple(self.sites)
        if not sites or not all(isinstance(site, str) for site in sites):
            raise SpecError(f"sites are module paths, got {self.sites!r}", where="InheritFeatures", cure="pass some")
        if not isinstance(self.schedule, Schedule):
            raise SpecError(f"{self.schedule!r} is no schedule", where="InheritFeatures", cure="such as Uniform(3)")
        if self.part not in PARTS:
            raise SpecError(f"no part {self.part!r}", where="InheritFeatures", cure=f"one of {', '.join(PARTS)}")
        object.__setattr__(self, "sites", self.sites if isinstance(self.sites, str) else sites)

    @classmethod
    def deep_cache(cls, interval: int = 3, branch: int = 0) -> InheritFeatures:
        """DeepCache (Ma et al., 2023, arXiv 2312.00858), for UNets with two layers per block.

        Args:
            interval: every how many calls everything is computed.
            branch: the up layer whose entry is inherited, counted from the output, three to a block; the larger, the
                more is computed at every call.
        """
        block, layer = divmod(branch, 3)
        return cls(f"up_blocks.{-1 - block}.resnets.{-1 - layer}", Uniform(interval), part="entry")

    def run(self, graph: Graph) -> Findings:
        paths = graph.matching(self.sites)
        for path in paths:
            for other in (*paths, *graph.sites):
                if path.startswith(f"{other}."):
                    raise EditError(f"the site {path} is within the site {other}", where=path, cure="name one of them")
        edits = []
        for path in paths:
            values = self._values(graph, graph.region(path))
            names = [path if i == 0 else f"{path}[{i}]" for i in range(len(values))]
            before = graph.step_macs()
            for name, value in zip(names, values, strict=True):
                graph.inherit(value, name, self.schedule)
            after = graph.step_macs(names)
            if after == before:
                raise EditError(
                    "inheriting this leaves nothing out: all that it is computed from serves something else as well",
                    where=path, cure="another site",
                )  # fmt: skip
            edits.append(f"{path} is inherited: {after / before:.1%} of the multiply-accumulates are left without it")
        return Findings(edits=tuple(edits))

    def _values(self, graph: Graph, region: Region) -> tuple[fx.Node, ...]:
        if self.part == "entry":
            entry = region.main_input
            if entry is None or entry.target is not torch.cat:
                raise EditError(
                    "no skip is concatenated to its input", where=region.path, cure="a resnet of an up block"
                )
            parts: Any = entry.args[0]
            return (parts[0],)
        if self.part != "value" and region.branch is not None:
            return (region.branch,)
        if self.part == "branch":
            raise EditError("it has no residual branch", where=region.path, cure="part='value'")
        return region.outputs
