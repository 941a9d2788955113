"""`InheritFeatures`: let calls of a generation take over features from earlier ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import fx

from sdgraph import Chain, Contract, Findings, Graph, Pass, Region
from sdgraph.errors import EditError
from sdgraph.forecasts import DAMPING, Forecast, Order, Polynomial
from sdgraph.options import Bounds, Count, Index, Number, Paths, Text
from sdgraph.schedules import Explicit, Gate, Range, Schedule, Uniform, Warm

EVERY_OTHER = Uniform(2)
INNER = "{down_blocks.-2,down_blocks.-1,mid_block,up_blocks.0,up_blocks.1}"
LEVELS = {"block": "", "layer": ".{resnets,attentions}.*", "unit": ".{resnets.*,**.attn1,**.attn2,**.ff}"}


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
        forecast: what an inherited value is: the last one (0), the line (1) or parabola (2) through the last ones, or a
            forecast of `sdgraph.forecasts`, such as `Polynomial(1, damping=0.5)`.
    Raises:
        PathError: a site that is not in the graph.
        PreconditionError: a site within another one.
        EditError: a site without such a part, or whose inheritance leaves nothing out.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    sites: Paths = ()
    schedule: Schedule = EVERY_OTHER
    part: Literal["auto", "branch", "value", "entry"] = "auto"
    forecast: Order | Forecast = 0

    @classmethod
    def deep_cache(cls, interval: Count = 3, branch: Index = 0) -> InheritFeatures:
        """DeepCache (Ma et al., 2023, arXiv 2312.00858), for UNets with two layers per block.

        Args:
            interval: the number of calls from one computation of everything to the next.
            branch: the up layer whose entry is inherited, counted from the output, three to a block; the larger, the
                more is computed at every call.
        Returns:
            The pass.
        """
        block, layer = divmod(branch, 3)
        return cls(f"up_blocks.{-1 - block}.resnets.{-1 - layer}", Uniform(interval), part="entry")

    @classmethod
    def damped(
        cls, interval: Count | Schedule = 2, branch: Index = 0, damping: Annotated[float, DAMPING] = 0.5
    ) -> InheritFeatures:
        """Return DeepCache's site with a damped forecast, for 15 to 30 steps of a multistep solver.

        Args:
            interval: the number of calls from one computation of everything to the next; or the schedule of the calls
                that compute everything, such as `Drift(0.1)`.
            branch: the up layer whose entry is inherited, as in `deep_cache`.
            damping: the share of the line through the last two refreshes: 0 repeats the last one, 1 is the line.
        """
        schedule = interval if isinstance(interval, Schedule) else Uniform(interval)
        return replace(cls.deep_cache(branch=branch), schedule=schedule, forecast=Polynomial(1, damping))

    @classmethod
    def faster_diffusion(
        cls, key_calls: tuple[Index, ...] = (0, 1, 2, 3, 5, 10, 15, 25, 35), of: Count | None = None
    ) -> InheritFeatures:
        """Faster Diffusion (Li et al., 2023, arXiv 2312.09608): skips and mid block are those of the last key call.

        The published calls are for 50. Neither the noise that its code adds to the latents nor its joining of calls
        into batches is a matter of the UNet.

        Args:
            key_calls: the numbers of the calls that compute everything, counted from 0.
            of: the number of calls that a generation must have; None allows any.
        Returns:
            The pass.
        """
        return cls("{conv_in,down_blocks.*,mid_block}", Explicit(key_calls, of), part="value")

    @classmethod
    def t_gate(cls, gate: Annotated[int, Bounds(ge=2)] = 10, interval: Count = 5, warm_up: Index = 2) -> Chain:
        """T-GATE (Zhang et al., 2024, arXiv 2404.02747): cross-attention stops at a call, self-attention begins there.

        Published for 25 calls. Guidance goes on after the gate, and each half of the batch keeps its own features;
        the published pipeline keeps their mean there and leaves guidance out.

        Args:
            gate: calls with cross-attention.
            interval: the number of calls from one computation of self-attention to the next, before the gate.
            warm_up: the first calls that compute everything; so does the one after them.
        Returns:
            The passes, as one.
        """
        before = Warm(Uniform(interval), first=warm_up + 1)
        return Chain(
            (cls("**.attn2", Gate(gate - 1)), cls("**.attn1", Gate(gate - 1, before=before, after=Uniform(1))))
        )

    @classmethod
    def attention_broadcast(
        cls,
        interval: Count = 2,
        cross_interval: Count = 5,
        between: tuple[Number, Number] = (100, 800),
        cross_between: tuple[Number, Number] = (100, 900),
    ) -> Chain:
        """Pyramid attention broadcast (Zhao et al., 2024, arXiv 2408.12588): attention at every n-th call, within a
        range of timesteps; self-attention (`attn1`) and cross-attention (`attn2`) each have theirs.

        Args:
            interval: the number of calls from one self-attention to the next.
            cross_interval: the number of calls from one cross-attention to the next.
            between: the lower and the higher timestep of reused self-attention, both excluded.
            cross_between: the lower and the higher timestep of reused cross-attention, both excluded.
        Returns:
            The passes, as one.
        """
        return Chain(
            (
                cls("**.attn1", Range(*between, within=Uniform(interval))),
                cls("**.attn2", Range(*cross_between, within=Uniform(cross_interval))),
            )
        )

    @classmethod
    def at_level(
        cls, level: Literal["block", "layer", "unit"], schedule: Schedule = EVERY_OTHER, within: Text = INNER
    ) -> InheritFeatures:
        """Blocks, layers (each resnet and attention) or units (each resnet, attn1, attn2 and feed-forward): the three
        levels of A-SDM's feature inheritance. Layers and units inherit their residual branches.

        Args:
            level: "block", "layer" or "unit".
            schedule: the calls at which the features are computed.
            within: the path or pattern of the blocks; by default the two innermost stages of each side and the middle.
        Returns:
            The pass.
        """
        return cls(within + LEVELS[level], schedule)

    def _sites_lie_apart(self, graph: Graph) -> list[str]:
        """No site lies within another one, or within one that is inherited already.

        Name one of them.
        """
        inherited = [name for name, site in graph.sites.items() if not site.bypassed]
        paths = graph.matching(self.sites)
        return [
            f"{path} in {other}" for path in paths for other in (*paths, *inherited) if path.startswith(f"{other}.")
        ]

    preconditions = (_sites_lie_apart,)

    def run(self, graph: Graph) -> Findings:
        notes = []
        for path in graph.matching(self.sites):
            values = self._values(graph, graph.region(path))
            names = [path if i == 0 else f"{path}[{i}]" for i in range(len(values))]
            before = graph.call_macs()
            for name, value in zip(names, values, strict=True):
                # the entry is the layer's, though another one made it
                graph.inherit(value, name, self.schedule, self.forecast, path if self.part == "entry" else "")
            after = graph.call_macs(names)
            if after == before:
                raise EditError(
                    "inheriting this leaves nothing out: all that it is computed from serves something else as well",
                    where=path, hint="another site",
                )  # fmt: skip
            notes.append(f"{path} is inherited: {after / before:.1%} of the multiply-accumulates are left without it")
        return Findings(notes=tuple(notes))

    def _values(self, graph: Graph, region: Region) -> tuple[fx.Node, ...]:
        if self.part == "entry":
            entry = region.main_input
            if entry is None or entry.target is not torch.cat:
                raise EditError(
                    "no skip is concatenated to its input", where=region.path, hint="a resnet of an up block"
                )
            parts: Any = entry.args[0]
            return (parts[0],)
        if self.part != "value" and region.branch is not None:
            return (region.branch,)
        if self.part == "branch":
            raise EditError("it has no residual branch", where=region.path, hint="part='value'")
        return region.outputs
