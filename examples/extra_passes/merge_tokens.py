"""`MergeTokens`: self-attention over fewer tokens, which the graph chooses by their similarity at every call."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from sdgraph import Contract, Graph, Pass
from sdgraph.errors import EditError
from sdgraph.options import Bounds


@dataclass(frozen=True)
class MergeTokens(Pass):
    """Merge similar tokens before the self-attention on the largest maps, and copy its output back to all of them.

    The token at the top left of every 2x2 square of the map is a target. The other tokens that are most similar to a
    target, by cosine, are averaged with it. The pass holds for every batch, height and width.

    Args:
        ratio: the share of the tokens that are merged into others, above 0 and at most 0.5. Every map has at least
            that share of tokens that are no targets.
    Raises:
        SpecError: the ratio is out of range.
        EditError: the UNet has no self-attention.
    Source:
        Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461, and for diffusion models Bolya
        and Hoffman, "Token Merging for Fast Stable Diffusion", 2023, arXiv 2303.17604.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    ratio: Annotated[float, Bounds(gt=0, le=0.5)] = 0.5

    def run(self, graph: Graph) -> None:
        regions = [graph.region(path) for path in graph.paths() if path.endswith(".attn1")]
        regions = [region for region in regions if len(region.inputs) == 1]  # others attend to the text as well
        if not regions:
            raise EditError("there is no self-attention", where="MergeTokens", hint="leave the pass out")
        most_tokens = max(region.inputs[0].meta["val"].shape[1] for region in regions)
        largest = [region for region in regions if region.inputs[0].meta["val"].shape[1] == most_tokens]
        for region in largest:
            (tokens,) = region.inputs  # (B, H·W, C)
            image = graph.region(region.path.partition(".transformer_blocks.")[0]).main_input  # (B, C, H, W)
            merged, places = graph.insert(self.merge, tokens, image, path=region.path)
            graph.insert_after(region.output, unmerge, places)
            for node in region.nodes:
                node.replace_input_with(tokens, merged)

    def merge(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Merge tokens (B, H·W, C) of an image (B, C, H, W).

        Returns:
            The M remaining tokens, (B, M, C), and the place of every token among them, (B, H·W).
        """
        share = Fraction(self.ratio).limit_denominator(1000)
        B, N, C = tokens.shape
        merged_count = N * share.numerator // share.denominator
        H, W = image.shape[2:]

        def targets(x: Tensor) -> Tensor:  # (B, H·W, C) to (B, ceil(H/2)·ceil(W/2), C)
            return x.reshape(B, H, W, x.shape[2])[:, ::2, ::2].flatten(1, 2)

        unit = tokens / tokens.norm(dim=-1, keepdim=True)
        similarity, target = (unit @ targets(unit).transpose(1, 2)).max(dim=-1)  # (B, H·W) both
        rows, columns = torch.arange(H, device=tokens.device), torch.arange(W, device=tokens.device)
        is_target = (rows[:, None] % 2 + columns % 2 == 0).flatten()
        similarity = similarity.masked_fill(is_target, -2.0)  # less than any cosine, so that targets remain

        rank = similarity.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        is_merged = rank < merged_count
        places = rank - merged_count
        target_places = targets(places[..., None])[..., 0].gather(1, target)
        places = torch.where(is_merged, target_places, places)

        index = places[..., None].expand(-1, -1, C)
        remaining = tokens.new_zeros(B, N - merged_count, C)
        return remaining.scatter_reduce(1, index, tokens, "mean", include_self=False), places


def unmerge(merged: Tensor, places: Tensor) -> Tensor:
    """Return for every token the value at its place: (B, M, C) to (B, H·W, C)."""
    return merged.gather(1, places[..., None].expand(-1, -1, merged.shape[2]))
