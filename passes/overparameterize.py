"""`Overparameterize`: layers with more parameters while they are trained, which `Fold` makes one kernel again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from sdgraph import Contract, Findings, Graph, Pass
from sdgraph.errors import EditError, SpecError
from sdgraph.options import Count, Paths

from .composed import Branches, LowRank, Product

RANK = 8  # of an update of low rank, by default


@dataclass(frozen=True)
class Overparameterize(Pass):
    """Compose the kernels of layers of several parameters, for training.

    The UNet computes what it did before, and can compute nothing that it could not compute before. Only
    the training dynamics differ. Afterwards `Fold` multiplies the parameters, so that they cost nothing at inference.

    Args:
        where: paths or patterns of convolutions and linear layers.
        kind: "product" is the layer between two square matrices over channels, which are the identity initially; of a
            linear layer it is one, on the narrower side. "branches" adds to the layer a pointwise one and its scaled
            input, which are zero initially. "low-rank" adds an update of low rank, zero initially, as LoRA does.
        rank: the rank of such an update, by default 8.
    Raises:
        SpecError: there is no such kind, or it has no rank.
        PathError: there is no such layer.
        EditError: it is no convolution or linear layer with separate weights, or it pads with other than zeros; or it
            has groups and is to have an update of low rank.
    Example:
        ```python
        wide = sdgraph.apply(student, [Overparameterize("up_blocks.**.conv1")])
        tuned, report = sdgraph.tune(wide, teacher, data, scheduler=scheduler, steps=5000, out="tuned")
        plain = sdgraph.apply(tuned, [Fold()]).to_diffusers()
        ```
    Source:
        Products: Guo et al., "ExpandNets", 2020, without wider channels. Branches: Ding et al., "RepVGG", 2021, without
        norms. Updates of low rank: Hu et al., "LoRA", 2021.
    """

    contract: ClassVar[Contract] = Contract.CLOSE
    where: Paths = "**.{conv1,conv2}"
    kind: Literal["product", "branches", "low-rank"] = "product"
    rank: Count | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.kind != "low-rank":
            raise SpecError(f"{self.kind!r} has no rank", where="rank", hint="leave it out, or set kind='low-rank'")

    def run(self, graph: Graph) -> Findings:
        calls = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
        notes = []
        for path in graph.matching(self.where):
            layer = graph.module(path) if path in calls else None
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                kind = type(layer).__name__ if layer is not None else graph.region(path).source_class
                raise EditError(
                    f"{path} is no layer with separate weights, but {kind or 'a part of one'}",
                    where=path,
                    hint="name nn.Conv2d and nn.Linear modules, as in '**.conv1'",
                )
            if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
                raise EditError(f"{path} pads with other than zeros", where=path, hint="leave it out")
            if self.kind == "low-rank" and getattr(layer, "groups", 1) != 1:
                raise EditError(f"{path} has groups", where=path, hint="leave it out, or choose another kind")
            module = self._composed(layer)
            graph.replace(calls[path], module, path=path)
            added = sum(p.numel() for p in module.parameters()) - sum(p.numel() for p in layer.parameters())
            notes.append(f"{path}: {added} more parameters")
        return Findings(notes=tuple(notes))

    def _composed(self, layer: nn.Conv2d | nn.Linear) -> nn.Module:
        if self.kind == "low-rank":
            return LowRank(layer, self.rank or RANK)
        return Product(layer) if self.kind == "product" else Branches(layer)
