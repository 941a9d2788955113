"""The flat inputs of a graph: their names, shapes and kinds, and where they sit in the call of a UNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Dim = int | str


@dataclass(frozen=True)
class Input:
    """One flat tensor of a call.

    Args:
        name: its name in the graph and in exported models.
        place: where it sits in the diffusers call: `(argument,)`, `(argument, key)` or `(argument, index, ...)`.
        shape: one entry per dimension: a number, or an expression in the call's sizes. None where the shape is that
            of the value it is added to (ControlNet and adapter residuals), known once traced.
        kind: "float" (the model's dtype), "index" (integer), "time" (numbers of any dtype; scalars are accepted), or
            "mask" (numbers of any dtype, or booleans).
        optional: a call may leave it out.
        broadcast: the batch dimension may be 1 whatever the batch is.
        fitting: it is left out of a call where it has another shape, as diffusers does with what a T2I-Adapter gives
            beyond the down blocks.
    """

    name: str
    place: tuple[str | int, ...]
    shape: tuple[Dim, ...] | None
    kind: str = "float"
    optional: bool = False
    broadcast: bool = False
    fitting: bool = False

    @property
    def conditioning(self) -> bool:
        """Whether pipelines give the same tensor to every call of a generation."""
        return self.place[0] in CONDITIONING


CONDITIONING = (
    "encoder_hidden_states",
    "class_labels",
    "timestep_cond",
    "added_cond_kwargs",
    "encoder_attention_mask",
)


def example_of(spec: Input, sizes: Mapping[str, int], dtype: torch.dtype) -> torch.Tensor | None:
    """A value of an input on the meta device; None for a residual, whose shape is that of what it is added to.

    Args:
        sizes: of the call, by symbol.
        dtype: of the model.
    """
    if spec.shape is None:
        return None
    shape = [d if isinstance(d, int) else sizes[d] for d in spec.shape]
    return torch.empty(shape, device="meta", dtype=dtype if spec.kind in ("float", "mask") else torch.int64)
