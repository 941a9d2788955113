"""Captions as the conditions that a pipeline calls its UNet with, and captions without images as a source."""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import TuningError
from ...options import checked
from ...runtime.digest import hash_model, hash_text, hash_tokenizer
from .base import Contents, Samples, Source

log = logging.getLogger("sdgraph")


class Captions:
    """Encodes captions as a pipeline of Stable Diffusion or SDXL does.

    `empty` has the conditions of a caption that is left out, without the first dimension, as the pipeline passes them
    for guidance; `recipe` names all that captions are encoded with, by hashes.

    Args:
        pipe: the pipeline.
    Raises:
        TuningError: the pipeline has no text encoder, or its UNet needs other conditions than captions.
    """

    def __init__(self, pipe: Any) -> None:
        name = type(pipe).__name__
        encoders = [part for part in ("text_encoder", "text_encoder_2") if getattr(pipe, part, None) is not None]
        if not encoders:
            raise TuningError(f"{name} has no text encoder", where="pipe", hint="load the whole pipeline")
        if pipe.unet.config.get("time_cond_proj_dim"):
            raise TuningError(
                f"the UNet of {name} is called with an embedding of the guidance scale, which no source provides",
                where="pipe.unet.config.time_cond_proj_dim",
                hint="tune the UNet that it was distilled from, or pass tensors: sdgraph.tuning.Tensors",
            )
        self._pipe = pipe
        tokenizers = [getattr(pipe, part, None) for part in ("tokenizer", "tokenizer_2")]
        self.recipe = {
            "kind of pipeline": name,
            "text encoder": hash_text(*(hash_model(getattr(pipe, encoder)) for encoder in encoders)),
            "tokenizer": hash_text(*(hash_tokenizer(one) for one in tokenizers if one is not None)),
        }
        if "force_zeros_for_empty_prompt" in pipe.config:
            zeros = pipe.config.force_zeros_for_empty_prompt
            self.recipe["empty caption"] = "zeros" if zeros else "encoded"
        self.empty = {key: value[0] for key, value in self._encoded([""], guided=True).items()}

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditions of captions by the names of the UNet's inputs, (B, ...) each."""
        return self._encoded(texts, guided=False)

    def tell_of_cut(self, texts: Sequence[str]) -> None:
        """Say in the log how many captions are empty, and how many are too long, so that their ends are unread."""
        tokenizer = getattr(self._pipe, "tokenizer", None) or self._pipe.tokenizer_2
        tokens = tokenizer([*texts], verbose=False)["input_ids"]
        cut = [text for text, ids in zip(texts, tokens, strict=True) if len(ids) > tokenizer.model_max_length]
        if cut:
            log.warning(
                "of %d captions %d are longer than the %d tokens that the text encoder reads, and their ends are left "
                "out, as of %r", len(texts), len(cut), tokenizer.model_max_length, cut[0],
            )  # fmt: skip
        if empty := sum(not text.strip() for text in texts):
            log.warning("of %d captions %d are empty", len(texts), empty)

    @torch.no_grad()
    def _encoded(self, texts: Sequence[str], guided: bool) -> dict[str, Tensor]:
        encoded = self._pipe.encode_prompt(
            prompt=list(texts),
            device=self._pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        if len(encoded) not in (2, 4):
            raise TuningError(
                f"{type(self._pipe).__name__} encodes a prompt as {len(encoded)} tensors",
                where="pipe.encode_prompt",
                hint="covered are the pipelines of Stable Diffusion and SDXL; or pass tensors: sdgraph.tuning.Tensors",
            )
        names = ("encoder_hidden_states", "text_embeds")[: len(encoded) // 2]
        return {name: encoded[2 * i + guided].cpu() for i, name in enumerate(names)}  # pairs: the caption, none


class MoreCaptions(Source):
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


def as_texts(texts: str | Iterable[str], where: str) -> list[str]:
    """Return a text or several as a list.

    Args:
        texts: the texts.
        where: the argument that they are.
    Raises:
        TuningError: there are none, or some are no text that can be encoded.
    """
    found = [texts] if isinstance(texts, str) else list(texts)
    if not found or not all(isinstance(text, str) for text in found):
        raise TuningError(f"there are no {where}, or some are no text", where=where, hint="pass texts")
    for text in found:
        if re.search("[\ud800-\udfff]", text):
            raise TuningError(f"half a character is in {text!r}", where=where, hint="write it whole, or leave it out")
    return found


def keys_of(prompts: Sequence[str]) -> list[str]:
    """Return the keys under which what the teacher generates from prompts is kept.

    Args:
        prompts: the prompts. One that occurs twice has two keys.
    """
    seen: collections.Counter[str] = collections.Counter()
    keys = []
    for prompt in prompts:
        keys.append(hash_text(prompt, str(seen[prompt])))
        seen[prompt] += 1
    return keys


def time_ids(original: tuple[int, int], corner: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Return SDXL's condition on sizes (6,): the original size, the corner of the crop, and the size of the target, as
    height and width, or top and left, in pixels."""
    return torch.tensor([*original, *corner, *target], dtype=torch.float32)


def with_empty(
    rows: Sequence[int | None], known: Mapping[str, Tensor], empty: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the conditions of rows, (B, ...) each.

    Args:
        rows: the numbers of the rows, None where the caption is left out.
        known: the conditions of the rows that are not None, in order.
        empty: the conditions of an empty caption, without the first dimension.
    """
    places = [sum(r is not None for r in rows[:i]) for i in range(len(rows))]
    return {
        name: torch.stack(
            [value if row is None else known[name][place] for row, place in zip(rows, places, strict=True)]
        ).float()
        for name, value in empty.items()
    }
