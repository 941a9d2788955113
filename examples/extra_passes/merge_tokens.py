"""A pass that works on what the tokens say: self-attention over fewer tokens, the most alike merged into one.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461; for diffusion models Bolya and Hoffman,
"Token Merging for Fast Stable Diffusion", 2023, arXiv 2303.17604. Written with public names only, as yours would be.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from sdgraph import Contract, Findings, Graph, Pass
from sdgraph.errors import EditError, SpecError


@dataclass(frozen=True)
class MergeTokens(Pass):
    """Self-attention on the largest maps works on the mean of tokens that are alike; each token gets the answer of its
    mean.

    The token at the top left of each 2x2 square of the map is a target. Of the others, those that are most like a
    target, by cosine, are merged into it. Nothing depends on the sizes of the call: any batch, height and width.

    Args:
        ratio: share of the tokens that is merged away; above 0, and at most 0.5, which every map has besides targets.
    Raises:
        SpecError: another ratio.
        EditError: the UNet has no self-attention.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 0.5:
            raise SpecError(f"ratio is {self.ratio}", where="MergeTokens", hint="above 0, at most 0.5")

    def run(self, graph: Graph) -> Findings:
        regions = [graph.region(path) for path in graph.paths() if path.endswith(".attn1")]
        regions = [region for region in regions if len(region.inputs) == 1]  # else it attends to the text as well
        if not regions:
            raise EditError("there is no self-attention", where="MergeTokens", hint="leave the pass out")
        most = max(region.inputs[0].meta["val"].shape[1] for region in regions)
        largest = [region for region in regions if region.inputs[0].meta["val"].shape[1] == most]
        for region in largest:
            (tokens,) = region.inputs  # (B, H·W, C)
            image = graph.region(region.path.partition(".transformer_blocks.")[0]).main_input  # (B, C, H, W)
            merged, places = graph.insert(self.merge, tokens, image, path=region.path)
            graph.insert_after(region.output, unmerge, places)
            for node in region.nodes:
                node.replace_input_with(tokens, merged)
        return Findings(tuple(region.path for region in largest))

    def merge(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that are left, (B, M, C), and for each token its place among them, (B, H·W)."""
        share = Fraction(self.ratio).limit_denominator(1000)
        B, N, C = tokens.shape
        gone = N * share.numerator // share.denominator
        H, W = image.shape[2:]

        def targets(x: Tensor) -> Tensor:  # (B, H·W, C) to those of them that are targets, (B, ceil(H/2)·ceil(W/2), C)
            return x.reshape(B, H, W, x.shape[2])[:, ::2, ::2].flatten(1, 2)

        unit = tokens / tokens.norm(dim=-1, keepdim=True)
        alike, target = (unit @ targets(unit).transpose(1, 2)).max(dim=-1)  # (B, H·W) both
        rows, columns = torch.arange(H, device=tokens.device), torch.arange(W, device=tokens.device)
        is_target = (rows[:, None] % 2 + columns % 2 == 0).flatten()
        alike = alike.masked_fill(is_target, -2.0)  # less than any cosine: targets stay

        rank = alike.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # the first `gone` are merged
        places = rank - gone
        into = targets(places[..., None])[..., 0].gather(1, target)
        places = torch.where(rank < gone, into, places)

        index = places[..., None].expand(-1, -1, C)
        left = tokens.new_zeros(B, N - gone, C)
        return left.scatter_reduce(1, index, tokens, "mean", include_self=False), places


def unmerge(merged: Tensor, places: Tensor) -> Tensor:
    """For each token what its place holds: (B, M, C) to (B, H·W, C)."""
    return merged.gather(1, places[..., None].expand(-1, -1, merged.shape[2]))
