"""Another UNet in a diffusers pipeline, or no progress bar, for the time being; and the arguments of its call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def with_unet(pipe: Any, unet: Any) -> Iterator[None]:
    """A context in which `pipe` has the UNet `unet`; if that is None, the pipeline stays as it is."""
    if unet is None:
        yield
        return
    own, pipe.unet = pipe.unet, unet
    try:
        yield
    finally:
        pipe.unet = own


@contextlib.contextmanager
def without_bar(pipe: Any) -> Iterator[None]:
    """Hide the progress bar of a pipeline, and restore its settings afterwards."""
    settings = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(settings or {}), "disable": True})
    try:
        yield
    finally:
        if settings is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = settings


def per_prompt(call: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the arguments of a pipeline for a list of prompts: a negative prompt holds for each of them.

    Args:
        call: the arguments.
        count: the number of prompts. Diffusers takes a text for one prompt only, and a list for a list.
    """
    return {
        name: [value] * count if name.startswith("negative_prompt") and isinstance(value, str) else value
        for name, value in call.items()
    }
