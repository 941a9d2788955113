"""`Bypass`: leave modules out at some calls of a generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdgraph import Contract, Findings, Graph, Pass
from sdgraph.options import Paths
from sdgraph.schedules import Schedule, Uniform

EVERY_OTHER = Uniform(2)


@dataclass(frozen=True)
class Bypass(Pass):
    """Leave modules out at the calls that a schedule does not name: the input of a module replaces its output.

    `Graph.bypass` chooses the value that replaces the output. The first call of a generation always computes the
    modules. No feature is kept between calls, but the number of the call must be known: with a solver that adds random
    numbers, use `sdgraph.attach(pipe)`.

    Args:
        sites: a module path or pattern, or several, see `sdgraph.Graph.matching`.
        schedule: the calls at which they are computed.
    Raises:
        PathError: a site that is not in the graph.
        PreconditionError: a site within another one.
        ShapeError: nothing that goes into a site has the shape of what comes out.
    Example:
        `sdgraph.apply(unet, passes=[Bypass("mid_block", Uniform(2))])`
    Source:
        ALTER (Yang et al., 2025). Its temporal masks of layers are a schedule by timestep, `sdgraph.schedules.Range`.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    sites: Paths = ()
    schedule: Schedule = EVERY_OTHER

    def _sites_lie_apart(self, graph: Graph) -> list[str]:
        """No site lies within another one.

        Name one of them.
        """
        paths = graph.matching(self.sites)
        return [f"{path} in {other}" for path in paths for other in paths if path.startswith(f"{other}.")]

    preconditions = (_sites_lie_apart,)

    def run(self, graph: Graph) -> Findings:
        notes = []
        paths = graph.matching(self.sites)
        for path in reversed(paths):  # the latest first, so that replacing values are those of the source
            names = graph.bypass(path, self.schedule)
            left = graph.call_macs(names) / graph.call_macs()
            notes.append(f"{path} is bypassed: {left:.1%} of the multiply-accumulates are left without it")
        return Findings(notes=tuple(reversed(notes)))
