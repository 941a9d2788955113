"""A pass of your own: cheaper self-attention in ten lines.

The cost of self-attention grows with the square of the number of tokens, and at the outer levels of a UNet neighbouring
tokens are nearly equal. So all tokens remain queries, but only every n-th token remains a key and a value. This follows
Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images", 2024, arXiv 2402.13573, who
choose the keys from a grid.

    python examples/custom_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import scaled_dot_product_attention

import sdgraph
from sdgraph import Contract, Example, NoMatch, Rewrite


@dataclass(frozen=True)
class SubsampleKeys(Rewrite):
    """Keep only every n-th key and value of self-attentions over many tokens.

    The pass is APPROXIMATE. It needs no training, but look at your images before you deploy it.

    Args:
        every: n. Tokens are ordered by rows, so 2 keeps every other column of the map.
        at_least: the number of tokens below which a self-attention stays as it is.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    every: int = 2
    at_least: int = 4096

    def pattern(self, q: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(q, k, v)

    def check(self, q: Any, k: Any, v: Any) -> None:
        queries, keys = q.meta["val"].shape[-2], k.meta["val"].shape[-2]
        if queries != keys:
            raise NoMatch(f"{queries} queries attend to {keys} keys, so this is no self-attention")
        if keys < self.at_least:
            raise NoMatch(f"{keys} tokens are fewer than {self.at_least}")

    def replace(self, q: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(q, k[:, :, :: self.every], v[:, :, :: self.every])

    # Code that the pass changes, and code that it must not change; `sdgraph.testing.check(SubsampleKeys())` runs both.
    examples: ClassVar[tuple[Example, ...]] = (
        Example(lambda x: attention(x, x), {"x": ("B", 1, 4096, 8)}),
        Example(lambda x: attention(x, x), {"x": ("B", 1, 1024, 8)}, changes=False),
        Example(lambda x, text: attention(x, text), {"x": ("B", 1, 4096, 8), "text": ("B", 1, "L", 8)}, changes=False),
    )


def attention(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Call attention as diffusers does."""
    return scaled_dot_product_attention(x, context, context)


def main() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=64,
    ).eval()

    # Passes are objects or text, as in a configuration file. Yours combine with those of sdgraph.
    result = sdgraph.apply(unet, "CleanUp, SubsampleKeys(4)")

    print(result.report)
    report = result.report.passes[-1]
    print("\nchanged", *report.edits, sep="\n  ")
    print("\nnot changed", *(f"{miss.where}: {miss.reason}" for miss in report.near_misses), sep="\n  ")
    print(f"\n{result.graph.text(within='down_blocks.0.attentions.0.transformer_blocks.0.attn1')}")


if __name__ == "__main__":
    main()
