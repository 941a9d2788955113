"""The protocol of sources: rows of clean latents, and of the conditions that the UNet is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from ...runtime.digest import hash_text


@dataclass(frozen=True)
class Samples:
    """Rows of a source.

    Args:
        latents: clean latents, (B, C, H, W), scaled as the UNet expects them.
        noisy: noised latents (B, C, H, W) where the source has its own, as on a teacher's trajectory; otherwise noise
            is added to `latents`.
        timesteps: the timesteps of `noisy`, (B,).
        conditions: the inputs of the UNet that describe the latents rather than a caption, as SDXL's sizes of an image;
            they replace those of the caption, which may be that of another row, or empty.
        target: the latents (B, C, H, W) that a call of the student should arrive at, as a point of a teacher's path.
        target_alphas: the cumulative products of 1 - beta at `target`, (B,).
        following: the next recorded point of the path, (B, C, H, W).
        following_timesteps: the timesteps of `following`, (B,).
    Example:
        `Samples(latents[rows])`
    """

    latents: Tensor
    noisy: Tensor | None = None
    timesteps: Tensor | None = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    target: Tensor | None = None
    target_alphas: Tensor | None = None
    following: Tensor | None = None
    following_timesteps: Tensor | None = None


@dataclass(frozen=True)
class Contents:
    """The contents of a source: the recipe of its rows, and a hash of every row.

    A resumed run has the same recipe. Rows of files may be repaired or taken away between two starts, and a run goes on
    with the others; the rows of other data stay as they are.

    Args:
        recipe: all that rows are made with, such as the VAE and the resolution, as text or hashes by name.
        rows: the hashes of the rows, in order.
        repairable: whether rows may be changed between two starts of a run.
        folders: the folders that are read, which a run must not write to.
        cache: the folder that encoded rows are kept in.
    """

    recipe: Mapping[str, str]
    rows: Sequence[str]
    repairable: bool = True
    folders: tuple[Path, ...] = ()
    cache: Path | None = None

    def fingerprint(self) -> str:
        """Return the hash of all of it."""
        return hash_text(*(f"{name}: {value}" for name, value in self.recipe.items()), "rows", *self.rows)


@runtime_checkable
class Source(Protocol):
    """Data that are read by row, so that the rows of a step follow from its number.

    Example:
        ```python
        class Files(Source):
            def __len__(self): return len(self.paths)
            def samples(self, rows, generators): return Samples(torch.stack([load(self.paths[row]) for row in rows]))
            def conditions(self, rows): return {"encoder_hidden_states": ...}
            def fingerprint(self): return hash_of(self.paths)
        ```
    """

    def __len__(self) -> int:
        """Return the number of rows."""

    def samples(self, rows: Sequence[int], generators: Sequence[np.random.Generator]) -> Samples:
        """Return rows.

        Args:
            rows: the numbers of the rows, (B,).
            generators: the generators of the random numbers of each row, for crops, flips or a sample of the VAE's
                distribution.
        """

    def conditions(self, rows: Sequence[int | None]) -> dict[str, Tensor]:
        """Return the conditioning inputs of the UNet for rows, by the names that `graph.inputs` has for them.

        Args:
            rows: the numbers of the rows; None asks for the conditions of an empty caption.
        """

    def fingerprint(self) -> str:
        """Return text that changes with the data, by which a resumed run recognises them.

        A source whose rows may be repaired or taken away between two starts of a run has an attribute `contents` as
        well, of type `Contents`.
        """
