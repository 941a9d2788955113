"""Latents and conditions in memory, as a source."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...errors import TuningError
from ...options import checked
from ...runtime.digest import hash_rows, hash_tensors
from .base import Contents, Samples, Source


class Tensors(Source):
    """Latents and conditions in memory.

    Args:
        latents: clean latents, (N, C, H, W), scaled as the UNet expects them.
        conditions: the other inputs of the UNet by name, (N, ...), such as `encoder_hidden_states`.
        empty: the same for an empty caption, without the first dimension; needed for dropped captions.
    Raises:
        TuningError: there are no rows, their numbers differ, a number is not finite, or `empty` has other names or
            shapes than a row.
    Example:
        `Tensors(latents, {"encoder_hidden_states": embeddings})`
    """

    @checked(TuningError)
    def __init__(
        self, latents: Tensor, conditions: Mapping[str, Tensor], empty: Mapping[str, Tensor] | None = None
    ) -> None:
        # Data are no parameters: what a step computes from them has no gradients with respect to them.
        self._latents = latents.detach()
        self._conditions = {name: tensor.detach() for name, tensor in conditions.items()}
        self._empty = {name: tensor.detach() for name, tensor in (empty or {}).items()}
        if latents.ndim != 4 or not len(latents):
            raise TuningError(
                f"latents have shape {tuple(latents.shape)}",
                where="latents",
                hint="pass at least one row, (N, C, H, W)",
            )
        for name, tensor in {"latents": latents, **self._conditions}.items():
            if tensor.is_complex() or tensor.is_meta or tensor.layout is not torch.strided:
                kind = "complex" if tensor.is_complex() else "without numbers" if tensor.is_meta else "sparse"
                raise TuningError(f"{name} is {kind}", where=name, hint="pass a plain tensor of real numbers")
            if not tensor.ndim or len(tensor) != len(latents):
                raise TuningError(
                    f"{name} has {len(tensor) if tensor.ndim else 'no'} rows and latents has {len(latents)}",
                    where=name,
                    hint="pair the rows",
                )
            wrong = tensor.is_floating_point() and ~torch.isfinite(tensor).flatten(1).all(1)
            if torch.is_tensor(wrong) and wrong.any():
                first = int(wrong.nonzero()[0])
                raise TuningError(
                    f"row {first} of {name} has a value that is not finite", where=name, hint="leave that row out"
                )
        self._check_empty()

    def _check_empty(self) -> None:
        """Refuse conditions of an empty caption that cannot take the place of those of a row."""
        if not self._empty:
            return
        if self._empty.keys() != self._conditions.keys():
            raise TuningError(
                f"empty has {', '.join(self._empty)}, and conditions have {', '.join(self._conditions) or 'nothing'}",
                where="empty",
                hint="name the same inputs in both",
            )
        for name, tensor in self._empty.items():
            if tensor.shape != self._conditions[name].shape[1:]:
                raise TuningError(
                    f"{name} of the empty caption has shape {tuple(tensor.shape)}, and of a row "
                    f"{tuple(self._conditions[name].shape[1:])}",
                    where="empty",
                    hint="encode it as the captions were, and leave out the dimension of the batch",
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise TuningError(f"{name} of the empty caption is not finite", where="empty", hint="encode it anew")

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Tensor]], empty: Mapping[str, Tensor] | None = None) -> Tensors:
        """Return the source of an iterable of rows, which is read once.

        Args:
            rows: dicts of tensors without batch dimension: `latents`, and the other inputs of the UNet by name.
            empty: the conditions of an empty caption, as for `Tensors`.
        Raises:
            TuningError: there are no rows, or they have different names or shapes.
        """
        read = list(rows) if isinstance(rows, Iterable) else []
        fitting = all(isinstance(row, Mapping) and row.keys() == read[0].keys() and "latents" in row for row in read)
        if not read or not fitting:
            raise TuningError(
                "the rows are not dicts with the same names, `latents` among them",
                where="data",
                hint="yield {'latents': (C, H, W), 'encoder_hidden_states': (L, F), ...} for every row",
            )
        try:
            stacked = {name: torch.stack([row[name] for row in read]) for name in read[0]}
        except (RuntimeError, TypeError) as error:
            raise TuningError(
                f"rows have different shapes: {error}", where="data", hint="give them one size"
            ) from error
        return cls(stacked.pop("latents"), stacked, empty)

    def __len__(self) -> int:
        return len(self._latents)

    def samples(self, rows: Sequence[int], generators: Sequence[np.random.Generator]) -> Samples:
        return Samples(self._latents[list(rows)].float())

    def conditions(self, rows: Sequence[int | None]) -> dict[str, Tensor]:
        if None in rows and self._empty.keys() != self._conditions.keys():
            raise TuningError(
                "there are no conditions of an empty caption",
                where="data",
                hint="pass Tensors(..., empty={...}), or proportion_empty_prompts=0",
            )
        return {
            name: torch.stack([self._empty[name] if row is None else tensor[row] for row in rows])
            for name, tensor in self._conditions.items()
        }

    @functools.cached_property
    def contents(self) -> Contents:
        """The hashes of all rows, and of the empty caption. The tensors must stay as they are from now on."""
        empty = hash_tensors(self._empty) if self._empty else "none"
        rows = hash_rows({"latents": self._latents, **self._conditions})
        return Contents({"empty caption": empty}, rows, repairable=False)

    def fingerprint(self) -> str:
        return self.contents.fingerprint()


def as_source(data: Source | Iterable[Mapping[str, Tensor]]) -> Source:
    """Return a source as it is, and an iterable of rows as a source.

    Raises:
        TuningError: the data are neither, or have no rows, or rows that differ in names or shapes.
    """
    if isinstance(data, Source):
        return data
    if not isinstance(data, Iterable) or getattr(data, "ndim", 1) == 0:
        raise TuningError(
            f"data of type {type(data).__name__} are neither a source nor an iterable of rows",
            where="data",
            hint="pass a source of sdgraph.tuning, or dicts of tensors: (dataset[i] for i in range(len(dataset)))",
        )
    return Tensors.of(data)
