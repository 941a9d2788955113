"""Another UNet in a diffusers pipeline, for the time being."""

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
