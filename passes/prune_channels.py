"""`PruneChannels`: cut channels of resnets, heads of attentions, and features of feed-forward layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch

from sdgraph import Contract, Findings, Graph, Pass, Widths
from sdgraph.errors import SpecError
from sdgraph.options import Bounds, Count, Index, Paths

Budget = Annotated[float, Bounds(gt=0, le=1)]
Numbers = Annotated[tuple[Index, ...], Bounds(length=1)]
INNER = "**.{resnets.*,attn1,attn2,ff}"


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Pass):
    """Make the UNet narrower: cut groups of channels inside resnets, heads of attentions, and feed-forward features.

    The channels that are cut together are derived from the graph; `print(graph.widths())` lists them. A resnet loses
    whole groups of its second norm, so that the statistics of the other groups stay as they are. The values between the
    blocks keep their channels. The result equals, within rounding, the UNet with zeros in place of what was cut. It
    needs tuning afterwards.

    The slices that cost least are cut until all budgets are met: again and again those with the least importance for
    each share of the budgets that they save. The choice is recorded, and used again on loading.

    Args:
        parameters: the parameters that may be left, as a share of those of the UNet.
        macs: the multiply-accumulates of a call that may be left, as a share.
        importance: "magnitude" is the squared L2 norm of all weights that a slice has, relative to the slices of its
            width that are not smaller.
        where: paths or patterns of widths, see `sdgraph.Widths.matching`; by default those inside resnets, attentions
            and feed-forward layers.
        multiple: the number that the channels which are left in each width are a multiple of, because kernels are fast
            for these.
        keep: the numbers of the slices to keep by the path of the width, in place of a budget.
    Raises:
        SpecError: there is neither a budget nor `keep`, or both; or a budget is below the least possible, which the
            error names.
        PathError: there is no such width, or it cannot be cut.
        EditError: slices to keep are not there.
    Example:
        `sdgraph.apply(unet, PruneChannels(macs=0.7))`
    Source:
        The parts that are cut are those of Ganjdanesh et al., "Not All Prompts Are Made Equal" (APTP), 2024. Magnitudes
        are compared between layers as in Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning" (LAMP),
        2021.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    parameters: Budget | None = None
    macs: Budget | None = None
    importance: Literal["magnitude"] = "magnitude"
    where: Paths = INNER
    multiple: Count = 8
    keep: Mapping[str, Numbers] | None = None

    def __post_init__(self) -> None:
        if bool(self.keep) == bool(self.budgets):
            hint = "name a budget, as in PruneChannels(parameters=0.7), or the slices to keep"
            raise SpecError(f"{self} names {'both a budget and' if self.keep else 'no budget and no'} slices to keep",
                            where="PruneChannels", hint=hint)  # fmt: skip

    @property
    def budgets(self) -> dict[str, float]:
        """The shares that may be left, by what they are shares of."""
        named = {name: getattr(self, name) for name in ("parameters", "macs")}
        return {name: share for name, share in named.items() if share is not None}

    def run(self, graph: Graph) -> Findings:
        widths = graph.widths()
        kept: dict[str, Sequence[int]] = dict(self.keep or {})
        if not kept:
            chosen = graph.decide("slices that are kept, in hexadecimal", self._chosen, widths)
            kept = {path: [i for i in range(int(bits, 16).bit_length()) if int(bits, 16) >> i & 1]
                    for path, bits in chosen.items()}  # fmt: skip
        graph.narrow(kept)
        counts: dict[str, list[int]] = {}
        for path, slices in kept.items():
            count = counts.setdefault(widths[path].kind, [0, 0])
            count[0] += len(slices)
            count[1] += widths[path].slices
        cut = ", ".join(f"{left} of {whole} {kind}" for kind, (left, whole) in counts.items())
        return Findings(notes=(f"of {len(kept)} widths {cut} are left",))

    def _chosen(self, widths: Widths) -> dict[str, str]:
        """Return the slices to keep of each width that is cut, as bits of a hexadecimal number."""
        names = widths.matching(self.where)
        scores = {name: _magnitudes(widths, name) for name in names}
        choice = _Choice(widths, scores, self.multiple, self.budgets)
        choice.run()
        kept = {name: sorted(choice.order[name][widths[name].slices - count :]) for name, count in choice.kept.items()}
        return {
            name: f"{sum(1 << number for number in slices):x}"
            for name, slices in kept.items()
            if len(slices) < widths[name].slices
        }


def _magnitudes(widths: Widths, name: str) -> list[float]:
    """Return the squared L2 norms of the slices of a width, each relative to those that are not smaller."""
    with torch.no_grad():
        squares: Any = sum(part.float().square().sum(1) for part in widths.parts(name))
    order = squares.argsort()
    rest = squares[order].flip(0).cumsum(0).flip(0)
    return torch.empty_like(squares).index_copy(0, order, squares[order] / rest.clamp_min(1e-30)).tolist()


class _Choice:
    """The choice of the slices to cut.

    Args:
        widths: the widths.
        scores: the importance of every slice, by the path of the width.
        multiple: the number that the channels which are left are a multiple of.
        budgets: the shares that may be left.
    """

    def __init__(
        self, widths: Widths, scores: Mapping[str, Sequence[float]], multiple: int, budgets: Mapping[str, float]
    ) -> None:
        self._widths, self._budgets = widths, budgets
        self.order = {name: np.argsort(each, kind="stable").tolist() for name, each in scores.items()}
        self._lost = {
            name: np.concatenate([[0.0], np.cumsum(np.sort(np.asarray(each, dtype=np.float64)))])
            for name, each in scores.items()
        }  # by the number of slices that are cut
        self._counts = {name: _counts(widths[name].slices, widths[name].channels, multiple) for name in scores}
        self.kept = {name: widths[name].slices for name in scores}
        self._whole = dict(zip(("parameters", "macs"), widths.size({}), strict=True))

    def run(self) -> None:
        """Cut slices until all budgets are met.

        Raises:
            SpecError: a budget is below the least possible.
        """
        least = self._left({name: counts[-1] for name, counts in self._counts.items()})
        for name, share in self._budgets.items():
            if least[name] > share:
                raise SpecError(
                    f"{name}={share} is less than {math.ceil(least[name] * 1000) / 1000}, the least that is possible",
                    where="PruneChannels",
                    hint="raise the budget, widen `where`, or lower `multiple`; PruneBlocks removes whole blocks",
                )
        steps = {name: self._step(name) for name in self.kept}
        left = self._left(self.kept)
        while any(left[name] > share for name, share in self._budgets.items()):
            name = min((name for name in steps if steps[name] is not None), key=lambda name: steps[name][0])  # type: ignore[index]
            self.kept[name] = steps[name][1]  # type: ignore[index]
            met = {budget: left[budget] <= share for budget, share in self._budgets.items()}
            left = self._left(self.kept)
            changed = any(met[budget] != (left[budget] <= share) for budget, share in self._budgets.items())
            for other in self.kept if changed else (name,):
                steps[other] = self._step(other)

    def _left(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Return the shares that are left."""
        sizes = dict(zip(("parameters", "macs"), self._widths.size(kept), strict=True))
        return {name: sizes[name] / self._whole[name] for name in self._budgets}

    def _step(self, name: str) -> tuple[float, int] | None:
        """Return the next cut of a width: the importance lost per share of the budgets saved, and what is kept."""
        now, whole = self.kept[name], self._widths[name].slices
        further = [count for count in self._counts[name] if count < now]
        if not further:
            return None
        before = self._left(self.kept)
        best: tuple[float, int] | None = None
        for count in further[:1]:
            after = self._left({**self.kept, name: count})
            saved = sum(
                (before[budget] - after[budget]) / (1 - share + 1e-12)
                for budget, share in self._budgets.items()
                if before[budget] > share
            )
            lost = self._lost[name][whole - count] - self._lost[name][whole - now]
            if saved > 0 and (best is None or lost / saved < best[0]):
                best = float(lost / saved), count
        return best


def _counts(slices: int, channels: int, multiple: int) -> list[int]:
    """Return the numbers of slices that may be left of a width, the largest first."""
    step = math.lcm(channels, multiple) // channels
    return [count for count in range(slices - 1, 0, -1) if count % step == 0]
