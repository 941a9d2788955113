"""Measurements of a search, kept in a folder."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..atomic import written
from ..errors import SavedError
from ..text import json_object
from .final_latents import Array


class Measurements:
    """What was measured, so that a stopped search continues and a search for another budget reuses it.

    Args:
        folder: the folder that keeps it; None keeps it in memory.
        key: what all of it depends on.
    Raises:
        SavedError: a file there is damaged.
    """

    def __init__(self, folder: Path | None, key: bytes) -> None:
        self._path = None if folder is None else folder / f"{hashlib.sha256(key).hexdigest()[:20]}.json"
        self._known: dict[str, list[float]] = {}
        if self._path is not None and self._path.exists():
            self._known = json_object(self._path, SavedError, hint="delete it; the same command measures again")

    def numbers(self, kind: str, subject: str, measure: Callable[[], Array]) -> Array:
        """Return the numbers of a kind that a subject has, and measure them if they are not known."""
        name = f"{kind}: {subject}"
        if name not in self._known:
            self._known[name] = [float(number) for number in measure()]
            if self._path is not None:
                self._write(self._path, json.dumps(self._known, indent=0).encode())
        return np.array(self._known[name])

    def latents(self, name: str, measure: Callable[[], Tensor]) -> Tensor:
        """Return latents of a name, and generate them if they are not known."""
        if self._path is None:
            return measure()
        path = self._path.with_name(f"{self._path.stem}-{name}.npy")
        if not path.exists():
            content = io.BytesIO()
            np.save(content, measure().float().cpu().numpy())
            self._write(path, content.getvalue())
        return torch.from_numpy(np.load(path))

    def subjects(self, kind: str) -> Iterator[str]:
        """Yield the subjects of which numbers of a kind are known."""
        for name in tuple(self._known):
            if name.startswith(f"{kind}: "):
                yield name.removeprefix(f"{kind}: ")

    def _write(self, path: Path, data: bytes) -> None:
        with written(path) as file:
            file.write_bytes(data)
