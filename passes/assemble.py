"""`Assemble`: regions with the weights that they have in another UNet, such as blocks that were trained apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdgraph import Contract, Findings, Graph, GraphUNet, Pass
from sdgraph.errors import EditError
from sdgraph.options import Paths, Text


@dataclass(frozen=True)
class Assemble(Pass):
    """Take the weights of regions from a saved UNet, in which the regions are the same but for these weights.

    So parts that were trained apart, in separate runs or on separate machines, become one model. Passes that change the
    parts come before it, as they did in the UNet to take from. The folder is read when the pass is applied, and not
    when the result is loaded again, whose own file has the weights. `sdgraph.Graph.take_weights` does the same from a
    graph in memory.

    Args:
        regions: paths or patterns of regions.
        source: the folder of the UNet to take from, of `GraphUNet.save_pretrained` or the `unet` of a tuning run.
    Raises:
        SpecError: no regions or no folder are named.
        SavedError: the folder holds no saved UNet.
        PathError: there is no such region in one of the UNets.
        EditError: a region is not the same in both UNets, or has these weights already.
        ShapeError: the weights differ in more than their values.
    Example:
        ```python
        stages = [Assemble(("down_blocks.0", "up_blocks.3"), "stage-1/unet"), Assemble("mid_block", "stage-2/unet")]
        sdgraph.apply(unet, [PruneBlocks("bk-sdm-base"), *stages])
        ```
    Source:
        Ni et al., "Deep Incubation: Training Large Models by Divide-and-Conquering", 2023; A-SDM, model assembly.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    may_change_nothing: ClassVar[bool] = True  # on loading; an edit without effect is refused below
    regions: Paths = ()
    source: Text = ""

    def run(self, graph: Graph) -> Findings:
        regions = graph.decide(f"weights from {self.source}", self._take, graph)
        return Findings(notes=tuple(f"{path} has its weights from {self.source}" for path in regions))

    def _take(self, graph: Graph) -> list[str]:
        unet = GraphUNet.from_pretrained(self.source).to(graph.device, graph.dtype)
        before = {name: parameter.detach() for name, parameter in graph.parameters().items()}
        graph.take_weights(self.regions, unet.graph)
        if all(before[name].equal(parameter) for name, parameter in graph.parameters().items()):
            raise EditError(
                f"{self.source} has the weights that are there already",
                where=str(self.regions),
                hint="name the folder of the trained UNet",
            )
        return graph.matching(self.regions)
