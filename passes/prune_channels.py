"""`PruneChannels`: cut channels of resnets, heads of attentions, and features of feed-forward layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np

from sdgraph import Contract, Findings, Graph, Importance, Pass, Widths, WidthTimes
from sdgraph.errors import SpecError
from sdgraph.options import Bounds, Budget, Count, Index, Paths

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
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
    each share of the budgets that they save, as in a knapsack. The choice is recorded, and used again on loading.

    Args:
        parameters: the parameters that may be left, as a share of those of the UNet.
        macs: the multiply-accumulates of a call that may be left, as a share.
        time: the seconds of a call that may be left, as a share; needs `times`.
        importance: "magnitude", the squared L2 norm of all weights that a slice has, relative to the slices of its
            width that are not smaller; or what was measured, such as `Importance.taylor(pipe, prompts)`.
        times: the measured times of regions by their width, `WidthTimes.measure(unet)` or `WidthTimes.load(path)`.
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
    time: Budget | None = None
    importance: Literal["magnitude"] | Importance = "magnitude"
    times: WidthTimes | None = None
    where: Paths = INNER
    multiple: Count = 8
    keep: Mapping[str, Numbers] | None = None

    def __post_init__(self) -> None:
        if (self.time is None) != (self.times is None):
            missing = "times" if self.times is None else "time"
            hint = "PruneChannels(time=0.7, times=WidthTimes.measure(unet))"
            raise SpecError(f"{self} has no {missing}", where=missing, hint=hint)
        if bool(self.keep) == bool(self.budgets):
            hint = "name a budget, as in PruneChannels(parameters=0.7), or the slices to keep"
            raise SpecError(f"{self} names {'both a budget and' if self.keep else 'no budget and no'} slices to keep",
                            where="PruneChannels", hint=hint)  # fmt: skip

    @property
    def budgets(self) -> dict[str, float]:
        """The shares that may be left, by what they are shares of."""
        named = {name: getattr(self, name) for name in ("parameters", "macs", "time")}
        return {name: share for name, share in named.items() if share is not None}

    def run(self, graph: Graph) -> Findings:
        widths = graph.widths()
        kept: dict[str, Sequence[int]] = dict(self.keep or {})
        if not kept:
            chosen = graph.decide("slices that are kept, in hexadecimal", self._chosen, graph, widths)
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

    def _chosen(self, graph: Graph, widths: Widths) -> dict[str, str]:
        """Return the slices to keep of each width that is cut, as bits of a hexadecimal number."""
        names = widths.matching(self.where)
        importance = Importance.magnitude(graph) if self.importance == "magnitude" else self.importance
        scores = {name: importance.of(name, widths[name].slices) for name in names}
        choice = _Choice(widths, scores, self.multiple, self.budgets, self.times)
        choice.run()
        return {
            name: f"{sum(1 << int(number) for number in slices):x}"
            for name, slices in choice.slices().items()
            if len(slices) < widths[name].slices
        }


class _Choice:
    """The choice of the slices to cut.

    Args:
        widths: the widths.
        scores: the importance of every slice, by the path of the width.
        multiple: the number that the channels which are left are a multiple of.
        budgets: the shares that may be left.
        times: the seconds of regions, for a budget of time.
    """

    def __init__(
        self,
        widths: Widths,
        scores: Mapping[str, Sequence[float]],
        multiple: int,
        budgets: Mapping[str, float],
        times: WidthTimes | None,
    ) -> None:
        self._widths, self._budgets, self._times = widths, budgets, times
        self._order = {name: np.argsort(each, kind="stable") for name, each in scores.items()}
        self._kept = {name: widths[name].slices for name in scores}
        whole = dict(zip(("parameters", "macs"), map(float, widths.size({})), strict=True))
        self._whole = whole | ({"time": times.whole} if times is not None else {})
        # Of each width: the numbers of slices that may be left, and the importance lost and the seconds saved by them.
        self._counts = {name: _counts(widths[name].slices, widths[name].channels, multiple) for name in scores}
        self._lost = {name: self._sums(name, each) for name, each in scores.items()}
        self._seconds = {name: self._saved_seconds(name) for name in scores}
        self._slopes = {name: self._slope(name) for name in scores}
        self._left = dict.fromkeys(budgets, 1.0)

    def run(self) -> None:
        """Cut slices until all budgets are met.

        Raises:
            SpecError: a budget is below the least possible.
        """
        self._check_possible()
        overlapping = self._overlapping()
        steps = {name: self._step(name) for name in self._kept}
        while missed := self._missed():
            name = min(steps, key=lambda name: steps[name][0])
            before, self._kept[name] = self._kept[name], steps[name][1]
            for budget in self._budgets:
                self._left[budget] -= self._saved(name, before, budget, [self._kept[name]])[0]
            for other in overlapping[name]:
                self._slopes[other] = self._slope(other)
            for other in self._kept if self._missed() != missed else (name, *overlapping[name]):
                steps[other] = self._step(other)

    def slices(self) -> dict[str, list[int]]:
        """Return the numbers of the slices that are kept, by the path of the width."""
        return {name: sorted(self._order[name][len(self._order[name]) - left :]) for name, left in self._kept.items()}

    def _missed(self) -> list[str]:
        return [budget for budget, share in self._budgets.items() if self._left[budget] > share + 1e-9]

    def _check_possible(self) -> None:
        narrowest = {name: counts[-1] for name, counts in self._counts.items() if counts}
        sizes = dict(zip(("parameters", "macs"), self._widths.size(narrowest), strict=True))
        least = {name: size / self._whole[name] for name, size in sizes.items()}
        least["time"] = 1 - sum(max(self._seconds[name][counts], default=0.0) for name, counts in self._counts.items())
        for name, share in self._budgets.items():
            if least[name] > share:
                raise SpecError(
                    f"{name}={share} is less than {math.ceil(least[name] * 1000) / 1000}, the least that is possible",
                    where="PruneChannels",
                    hint="raise it, name more in `where`, or lower `multiple`; PruneBlocks removes whole blocks",
                )

    def _sums(self, name: str, scores: Sequence[float]) -> Array:
        """Return the importance that is lost by the number of slices that are left."""
        lost: Array = np.concatenate([[0.0], np.cumsum(np.sort(np.asarray(scores, dtype=np.float64)))])
        return lost[::-1]

    def _saved_seconds(self, name: str) -> Array:
        """Return the seconds that are saved by the number of slices that are left, as a share of the whole UNet's."""
        slices = self._widths[name].slices
        if self._times is None:
            return np.zeros(slices + 1)
        seconds = np.array([self._times.seconds(name, max(left, 1)) for left in range(slices + 1)])
        saved: Array = (seconds[-1] - seconds) / self._times.whole
        return saved

    def _slope(self, name: str) -> dict[str, float]:
        """Return the shares of parameters and multiply-accumulates that a slice saves now."""
        now, fewer = (self._widths.size({**self._kept, name: self._kept[name] - less}) for less in (0, 1))
        return {
            budget: (a - b) / self._whole[budget]
            for budget, a, b in zip(("parameters", "macs"), now, fewer, strict=True)
        }

    def _saved(self, name: str, now: int, budget: str, left: Sequence[int]) -> Array:
        """Return the shares of a budget that are saved by leaving fewer slices than now."""
        if budget == "time":
            return np.asarray(self._seconds[name][left] - self._seconds[name][now])
        return (now - np.asarray(left)) * self._slopes[name][budget]

    def _step(self, name: str) -> tuple[float, int]:
        """Return the next cut of a width: the importance lost per share of the budgets saved, and what is left.

        A cut may be of several slices at once, where time is saved only by these.
        """
        now = self._kept[name]
        left = [count for count in self._counts[name] if count < now]
        if not left:
            return math.inf, now
        saved: Array = np.sum(
            [self._saved(name, now, budget, left) / (1 - self._budgets[budget]) for budget in self._missed()], axis=0
        )
        lost = self._lost[name][left] - self._lost[name][now]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(saved > 0, lost / saved, math.inf)
        best = int(ratios.argmin())
        return float(ratios[best]), left[best]

    def _overlapping(self) -> dict[str, list[str]]:
        """Return the other widths of the layers of each width, by its path."""
        paths = {name: {end.path for end in self._widths[name].ends} for name in self._kept}
        return {
            name: [other for other in paths if other != name and not paths[name].isdisjoint(paths[other])]
            for name in paths
        }


def _counts(slices: int, channels: int, multiple: int) -> list[int]:
    """Return the numbers of slices that may be left of a width, the largest first."""
    step = math.lcm(channels, multiple) // channels
    return [count for count in range(slices - 1, 0, -1) if count % step == 0]
