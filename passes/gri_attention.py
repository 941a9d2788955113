"""`GRIAttention`: global-regional interactive attention in the place of self-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sdgraph import Contract, Findings, Graph, NearMiss, Pass
from sdgraph.errors import SpecError
from sdgraph.options import Bounds, Count, Index


@dataclass(frozen=True)
class GRIAttention(Pass):
    """Replace self-attention by attention to the query's own window and to the pooled rest of the map.

    A query attends, in one softmax, to the keys of its window (regional) and to the mean keys of all cells outside of
    it (global). The logarithm of the cell's size is added to the logit of a cell, so that every position counts once.
    The source's weights are used as they are. With `pool=1`, or a window as large as the map, it is full attention.

    Args:
        window: the side of a window, in tokens.
        pool: the side of a cell, in tokens; it divides the window.
        levels: the resolutions at which attention is replaced; 0 is that of the latents, 1 half of it.
        shift: the offset of the windows in every second layer, in tokens, so that their borders differ: a multiple of
            `pool`, less than `window`.
        variant: "joint" is described above. "gated" adds a parameter of every head, `<path>.interaction.balance`, to
            the logits of the cells. This sums the results of the window and of the cells with the gates
            σ(n - f - balance) and σ(f - n + balance), where n and f are the logarithms of their sums of exponentials.
            The parameter is 0 initially, where both variants are the same, and training changes it.
    Raises:
        SpecError: the sizes do not fit together.
        PreconditionError: there is no self-attention at a level.
    Source:
        A-SDM names global-regional interactive attention. This form of it is ours, because the bodies of its papers
        were not available.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    window: Count = 16
    pool: Count = 4
    levels: Annotated[tuple[Index, ...], Bounds(length=1)] = (0,)
    shift: Index = 0
    variant: Literal["joint", "gated"] = "joint"

    def __post_init__(self) -> None:
        if self.window % self.pool or self.shift % self.pool or self.shift >= self.window:
            raise SpecError(
                f"window {self.window}, pool {self.pool} and shift {self.shift} do not go together",
                where="GRIAttention",
                hint="pool divides window and shift, and shift is less than window",
            )

    def _levels_have_self_attention(self, graph: Graph) -> list[str]:
        """There is self-attention at every level that is named.

        Name a level that has some.
        """
        known = sorted({level for _, _, level in self_attentions(graph)})
        return [f"level {level}, where there is some at {known}" for level in self.levels if level not in known]

    preconditions = (_levels_have_self_attention,)

    def run(self, graph: Graph) -> Findings:
        notes: list[str] = []
        misses: list[NearMiss] = []
        device = next(graph.weights.parameters()).device
        for attention, tokens, level in self_attentions(graph):
            path = graph.module_path(attention)
            if level not in self.levels:
                continue
            height, width = tokens.meta["val"].shape[-2:]
            if self.pool > 1 and self.window >= max(height, width):
                misses.append(NearMiss(path, f"a window of {self.window} holds the whole map of {height}x{width}"))
                continue
            before = graph.call_macs()
            shift = self.shift if len(notes) % 2 else 0
            module = GlobalRegional(attention, self.window, self.pool, shift, self.variant, device)
            graph.replace(attention, module, *attention.args[:3], tokens, path=f"{path}.interaction")
            notes.append(f"{path}: {graph.call_macs() / before:.1%} of the multiply-accumulates are left")
        return Findings(tuple(misses), tuple(notes))


class GlobalRegional(nn.Module):
    """The module that replaces a fused attention.

    Args:
        attention: the node of the attention, whose first argument has heads in its second dimension.
        window, pool, shift, variant: see `GRIAttention`.
        device: the device of its parameter, if it has one.
    """

    def __init__(
        self, attention: fx.Node, window: int, pool: int, shift: int, variant: str, device: torch.device
    ) -> None:
        super().__init__()
        queries: Any = attention.args[0]
        self.sizes = window, pool, shift
        self.scale: Any = attention.kwargs.get("scale")
        like = queries.meta["val"]
        balance = torch.zeros(like.shape[1], dtype=like.dtype, device=device)
        self.balance = nn.Parameter(balance) if variant == "gated" else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        height, width = tokens.shape[2], tokens.shape[3]
        return attend(q, k, v, height, width, *self.sizes, scale=self.scale, balance=self.balance)


def self_attentions(graph: Graph) -> list[tuple[fx.Node, fx.Node, int]]:
    """Return the fused self-attentions of transformers, with the maps that their tokens come from and their levels."""
    attentions = []
    outer = graph.input("sample").meta["val"].shape[-1]
    for node in graph.nodes:
        if node.target is not F.scaled_dot_product_attention:
            continue
        path = graph.module_path(node)
        transformer, inside, _ = path.partition(".transformer_blocks.")
        queries: Any = node.args[0]
        keys: Any = node.args[1]
        q, k = (argument.meta["val"].shape[-2] for argument in (queries, keys))
        if not path.endswith("attn1") or not inside or q != k or node.kwargs.get("attn_mask") is not None:
            continue
        tokens = graph.region(transformer).main_input
        if tokens is not None and tokens.meta["val"].ndim == 4:
            level = round(torch.log2(torch.tensor(outer / tokens.meta["val"].shape[-1])).item())
            attentions.append((node, tokens, level))
    return attentions


def attend(
    q: Tensor, k: Tensor, v: Tensor, height: Any, width: Any, window: int, pool: int, shift: int = 0,
    scale: float | None = None, balance: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return global-regional attention.

    Args:
        q, k, v: (B, heads, height·width, d), row by row.
        window, pool, shift: see `GRIAttention`.
        scale: the factor of the logits; 1/√d by default.
        balance: (heads,), added to the logits of the cells.
    Returns:
        (B, heads, height·width, d).
    """
    B, heads, N, d = q.shape[0], q.shape[1], q.shape[2], q.shape[3]
    rows, columns = (height + shift + window - 1) // window, (width + shift + window - 1) // window
    below, right = rows * window - height - shift, columns * window - width - shift
    cells = window // pool  # along a window's side

    def windows(x: Tensor) -> Tensor:
        """(..., height, width, d) to (..., rows, columns, window², d), zeros where a window leaves the map."""
        x = F.pad(x, (0, 0, shift, right, shift, below))
        x = x.reshape(-1, rows, window, columns, window, x.shape[-1]).transpose(2, 3)
        return x.reshape(-1, rows * columns, window * window, x.shape[-1])

    def pooled(x: Tensor) -> Tensor:
        """(..., rows·columns, window², d) to the sums over cells (..., rows·columns·cells², d)."""
        x = x.reshape(-1, rows * columns, cells, pool, cells, pool, x.shape[-1]).sum((3, 5))
        return x.reshape(-1, rows * columns * cells * cells, x.shape[-1])

    inside = windows(q.new_ones((1, height, width, 1)))  # (1, windows, window², 1): 1 on the map
    count = pooled(inside)  # (1, all cells, 1)
    q, k, v = (windows(x.reshape(B * heads, height, width, d)) for x in (q, k, v))
    far_k, far_v = (pooled(x) / count.clamp(min=1) for x in (k, v))
    amount = rows * columns
    # the cells of a window lie one after the other, so each window's cells are a diagonal of blocks
    own = torch.eye(amount, dtype=q.dtype, device=q.device).repeat_interleave(cells * cells, 1)
    near_bias = inside.reshape(1, amount, 1, window * window).log()
    far_bias = (count.reshape(1, 1, 1, amount * cells * cells) * (1 - own).reshape(1, amount, 1, -1)).log()
    keys, values = (
        torch.cat([near, far.unsqueeze(1).expand(-1, amount, -1, -1)], 2) for near, far in ((k, far_k), (v, far_v))
    )
    if balance is not None:
        far_bias = far_bias + balance.repeat(B).reshape(B * heads, 1, 1, 1)
        near_bias = near_bias.expand(B * heads, -1, -1, -1)
    bias = torch.cat([near_bias, far_bias], 3)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale)
    out = out.reshape(B * heads, rows, columns, window, window, d).transpose(2, 3)
    out = out.reshape(B * heads, rows * window, columns * window, d)[:, shift : shift + height, shift : shift + width]
    return out.reshape(B, heads, N, d)
