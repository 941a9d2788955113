"""Another UNet in a diffusers pipeline, or no progress bar, for the time being."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
