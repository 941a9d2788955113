"""`HardSwish`: a cheaper activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from sdgraph import Contract, Example, NoMatch, Rewrite


@dataclass(frozen=True)
class HardSwish(Rewrite):
    """x·relu6(x + 3)/6 for SiLU: Howard et al., "Searching for MobileNetV3", 2019, arXiv 1905.02244.

    Only that of maps: the few of the time embedding cost nothing, and all layers read their results.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    examples: ClassVar[tuple[Example, ...]] = (
        Example(lambda x: F.silu(x), {"x": ("B", 8, "H", "W")}),
        Example(nn.Sequential(nn.SiLU()), {"x": ("B", 8, "H", "W")}),
        Example(lambda x: F.silu(x), {"x": ("B", 8)}, changes=False),
    )

    def pattern(self, x: Any) -> Any:
        return F.silu(x)

    def check(self, x: Any) -> None:
        if x.meta["val"].ndim != 4:
            raise NoMatch("it is no map")

    def replace(self, x: Any) -> Any:
        return F.hardswish(x)
