"""The flat inputs of a graph: their names, shapes and kinds, and where they sit in the call of a UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Dim = int | str


@dataclass(frozen=True)
class Input:
    """A flat tensor of a call.

    Args:
        name: its name in the graph and in exported models.
        place: its place in the diffusers call: `(argument,)`, `(argument, key)` or `(argument, index, ...)`.
        shape: an entry for every dimension, a number or an expression in the call's sizes. None for a residual of a
            ControlNet or adapter, which has the shape of the value that it is added to.
        kind: "float" (the model's dtype), "index" (integer), "time" (numbers of any dtype; scalars are accepted), or
            "mask" (numbers of any dtype, or booleans).
        optional: a call may leave it out.
        broadcast: the batch dimension may be 1 whatever the batch is.
        fitting: it is ignored in a call where it has another shape, as diffusers ignores tensors of a T2I-Adapter
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
        """Whether pipelines pass the same tensor to every call of a generation."""
        return self.place[0] in CONDITIONING


CONDITIONING = (
    "encoder_hidden_states",
    "class_labels",
    "timestep_cond",
    "added_cond_kwargs",
    "encoder_attention_mask",
)


def example_of(spec: Input, sizes: Mapping[str, int], dtype: torch.dtype) -> torch.Tensor | None:
    """Return a value of an input on the meta device; None for a residual, whose shape is not known yet.

    Args:
        sizes: the sizes of the call by symbol.
        dtype: the dtype of the model.
    """
    if spec.shape is None:
        return None
    shape = [d if isinstance(d, int) else sizes[d] for d in spec.shape]
    return torch.empty(shape, device="meta", dtype=dtype if spec.kind in ("float", "mask") else torch.int64)


def random_value(
    spec: Input, shape: Sequence[int], generator: torch.Generator, config: Mapping[str, Any]
) -> torch.Tensor:
    """Return random numbers for an input, float32 or int64, on the CPU.

    Args:
        shape: the shape of the value.
        generator: the generator of the random numbers.
        config: the configuration of the source UNet, which has the number of classes.
    """
    if spec.kind == "float":
        return torch.randn(shape, generator=generator)
    if spec.kind == "mask":
        kept = (torch.rand(shape, generator=generator) < 0.7).float()
        return kept.index_fill(-1, torch.tensor([0]), 1.0)  # something is left to attend to
    classes = config.get("num_class_embeds") if spec.kind == "index" else None
    return torch.randint(0, classes or 1000, shape, generator=generator)
