"""Captions without images, beside the captions that rows have, as a source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import TuningError
from ...options import checked
from ..digest import hash_text
from .base import Contents, Samples, Source
from .captions import Captions, as_texts


class MoreCaptions:
    """A source, and captions of which there are no images, for `random_conditioning=True`.

    Very noisy latents are given a caption that is drawn from these and from those of the rows, and the student learns
    what the teacher predicts for it. These captions may name things that no image of the source shows.

    Args:
        source: the rows.
        captions: the captions.
        pipe: the pipeline of the teacher; its text encoder encodes the captions of every batch.
    Raises:
        TuningError: there are no captions, or the source has captions without images already.
    Example:
        `MoreCaptions(Images("photos", pipe), ["a purple triangle"], pipe)`
    Source:
        Kim et al., "Random Conditioning with Distillation for Data-Efficient Diffusion Model Compression", 2025.
    """

    @checked(TuningError)
    def __init__(self, source: Source, captions: str | Iterable[str], pipe: Any) -> None:
        self._source, self._texts = source, as_texts(captions, "captions")
        if isinstance(source, MoreCaptions):
            raise TuningError(
                "the source has captions without images already", where="source", hint="pass all captions at once"
            )
        self._encode = Captions(pipe)
        self._encode.tell_of_cut(self._texts)
        encoded = hash_text(*self._encode.recipe.values())
        self._recipe = {"captions without images": hash_text(*self._texts), "their text encoder": encoded}

    def __len__(self) -> int:
        return len(self._source)

    @property
    def captions(self) -> int:
        """The number of all captions. The first ones, as many as there are rows, are those of the rows."""
        return len(self) + len(self._texts)

    def samples(self, rows: Sequence[int], generators: Sequence[np.random.Generator]) -> Samples:
        return self._source.samples(rows, generators)

    def conditions(self, rows: Sequence[int | None]) -> dict[str, Tensor]:
        # A caption without an image takes what is no text, as SDXL's sizes are, from some row.
        known = self._source.conditions([row if row is None else row % len(self) for row in rows])
        more = {place: row - len(self) for place, row in enumerate(rows) if row is not None and row >= len(self)}
        if not more:
            return known
        encoded = self._encode([self._texts[number] for number in more.values()])
        return known | {
            name: known[name].index_copy(0, torch.tensor([*more]), encoded[name].float()) for name in encoded
        }

    @property
    def contents(self) -> Contents | None:
        """The contents of the source, where it has some; these captions are part of the recipe."""
        inner: Contents | None = getattr(self._source, "contents", None)
        return inner and replace(inner, recipe={**inner.recipe, **self._recipe})

    def fingerprint(self) -> str:
        return hash_text(self._source.fingerprint(), *self._recipe.values())
