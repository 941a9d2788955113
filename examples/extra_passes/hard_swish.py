"""`HardSwish`: a cheaper activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from sdgraph import Contract, Example, NoMatch, Rewrite


@dataclass(frozen=True)
class HardSwish(Rewrite):
    """Replace SiLU on feature maps by hardswish, x·relu6(x + 3)/6.

    SiLU of the time embedding stays, for it costs nothing, and all layers depend on it.

    Source:
        Howard et al., "Searching for MobileNetV3", 2019, arXiv 1905.02244.
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
            raise NoMatch("the value is not a feature map")

    def replace(self, x: Any) -> Any:
        return F.hardswish(x)
