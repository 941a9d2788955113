"""`PruneToBudget`: take the regions out of a UNet that cost least for a budget."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from sdgraph import Contract, Graph, Pass, Redundancy, analyse_unet
from sdgraph.errors import SpecError
from sdgraph.options import Bounds, Budget, Neighbours, Seed, Text

from .prune_blocks import PruneBlocks

log = logging.getLogger("sdgraph")


@dataclass(frozen=True)
class PruneToBudget(Pass):
    """Remove the regions that change the output least for budgets of time, multiply-accumulates and parameters.

    An analysis says what each removal changes and saves, and integer programming chooses among them. The pass that runs
    and that is recorded is a plain `PruneBlocks` with the chosen paths, so that a saved UNet, its recipe and what is
    exported need no analysis. Macs and parameters of the pruned UNet meet their budgets, with everything counted that
    nothing reads any more. Seconds are predicted from the analysis.

    Without an analysis the pass measures output errors on random inputs, which is a guess, and says so in the log and
    in its report. A UNet that is pruned already takes the analysis of the whole one; shares are still those of the
    whole UNet, and the report names how many regions are gone.

    Args:
        time: the seconds of a call that may be left, as a share of those of the whole UNet.
        macs: the multiply-accumulates of a call that may be left, as a share.
        parameters: the parameters that may be left, as a share.
        analysis: what `sdgraph.analyse` found, or the path of the file that it was saved to; None measures on random
            inputs.
        criterion: the cost of a removal: the "error" of the output, or the learned "gate" of an analysis with gates.
        neighbours: N and M: of M layers that follow each other in a block at most N are removed; None for no limit.
        tuned: whether the weights may be others than those that were analysed, as after a tuning.
        levels: the levels of the regions that are measured on random inputs.
        seed: the seed of the random inputs.
    Raises:
        SpecError: no budget, or one that no choice meets, and the error names the least possible shares; the analysis
            is of another UNet, or has no times.
        SavedError: the file of the analysis is missing or damaged.
        ExtraError: scipy is not installed.
    Example:
        `sdgraph.apply(unet, "PruneToBudget(macs=0.7, analysis='analysis.json')")`
    Source:
        See `sdgraph.Redundancy.cheapest`.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    has_text: ClassVar[bool] = False  # an analysis in memory has none; the pass that is recorded does
    chooses: ClassVar[bool] = True
    time: Budget | None = None
    macs: Budget | None = None
    parameters: Budget | None = None
    analysis: Redundancy | Text | Path | None = None
    criterion: Literal["error", "gate"] = "error"
    neighbours: Neighbours | None = (2, 3)
    tuned: bool = False
    levels: Annotated[tuple[Literal["block", "layer", "unit"], ...], Bounds(length=1)] = ("block", "layer")
    seed: Seed = 0

    def __post_init__(self) -> None:
        if isinstance(self.analysis, Path):
            object.__setattr__(self, "analysis", str(self.analysis))  # which has a text
        if self.time is None and self.macs is None and self.parameters is None:
            raise SpecError("there is no budget", where="PruneToBudget", hint="time=0.7, macs=0.7 or parameters=0.7")

    def __str__(self) -> str:
        if isinstance(self.analysis, Redundancy):  # its numbers would fill pages
            return str(replace(self, analysis=f"<of {self.analysis.model[:8]}>"))
        given = [f for f in fields(self) if f.init and getattr(self, f.name) != f.default]
        return f"PruneToBudget({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    def choose(self, graph: Graph) -> tuple[Pass, tuple[str, ...]]:
        notes = []
        if self.analysis is None:
            found = analyse_unet(graph, levels=self.levels, seed=self.seed, nominal=self.time is not None)
            notes.append("measured on random inputs: an analysis of generations, sdgraph.analyse, chooses better")
            log.warning("PruneToBudget: %s", notes[0])
        else:
            found = self.analysis if isinstance(self.analysis, Redundancy) else Redundancy.load(self.analysis)
        choice = found.cheapest(
            time=self.time, macs=self.macs, parameters=self.parameters,
            criterion=self.criterion, neighbours=self.neighbours, unet=graph, tuned=self.tuned,
        )  # fmt: skip
        if not choice.paths:
            raise SpecError(
                "the UNet meets the budget as it is",
                where=str(self),
                hint="leave the pass out, or lower the budget",
            )
        if choice.gone:
            notes.append(f"left out: {len(choice.gone)} regions that were removed before, such as {choice.gone[0]}")
        left = ", ".join(f"{share:.3f} of the {name}" for name, share in choice.left.items())
        return PruneBlocks(choice.paths), (*notes, f"chosen by {self}; left: {left}; error {choice.error:.2e}")

    def run(self, graph: Graph) -> None:
        self.choose(graph)[0].run(graph)

    def stages(self, graph: Graph) -> Sequence[Pass]:
        return self.choose(graph)[0].stages(graph)
