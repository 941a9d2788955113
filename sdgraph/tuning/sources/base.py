"""What a source is: rows of clean latents, and of the conditions that the UNet is called with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Rows of a source.

    Args:
        latents: clean latents, (B, C, H, W), scaled as the UNet expects them.
        noisy: noised latents (B, C, H, W) where the source has its own, as on a teacher's trajectory; otherwise noise
            is added to `latents`.
        timesteps: the timesteps (B,) of `noisy`.
    """

    latents: Tensor
    noisy: Tensor | None = None
    timesteps: Tensor | None = None


@runtime_checkable
class Source(Protocol):
    """Data that are read by row, so that what a step reads follows from its number."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def samples(self, rows: Sequence[int], generators: Sequence[np.random.Generator]) -> Samples:
        """Return rows.

        Args:
            rows: the numbers of the rows.
            generators: the random numbers of each row, for crops, flips or a sample of the VAE's distribution.
        """

    def conditions(self, rows: Sequence[int | None]) -> dict[str, Tensor]:
        """Return the conditioning inputs of the UNet for rows, by the names that `graph.inputs` has for them.

        Args:
            rows: the numbers of the rows; None asks for the conditions of an empty caption.
        """

    def fingerprint(self) -> str:
        """Return text that changes with the data, by which a resumed run recognises them."""
