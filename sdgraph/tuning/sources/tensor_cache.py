"""Rows of tensors that are computed once and kept in a folder by their contents, in chunks that appear whole."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ...errors import TuningError
from ...progress import Bar
from ...runtime.digest import hash_text, is_hash
from ...text import json_object

RECORD, FILES = "kept.json", "files.json"  # the recipe of the rows, and the hashes of files that were read for them
FORMAT = "1"  # of the folder
KEYS = "keys"  # of the rows of a chunk, in its header
LOCK = ".lock"  # of the folder, and the ending of those of chunks
OPEN = 64  # chunks that are mapped into memory at a time
GIGABYTE = 10**9


class TensorCache:
    """Rows of named tensors in a folder, found by their contents. Filling it again goes on where it stopped.

    A row is known by a key, which changes with all that it is computed from. So rows may be added, changed and taken
    away, and all others are found again; several sets of rows with the same recipe may share a folder.

    Args:
        folder: the folder, which is created if necessary.
        recipe: all that rows are made with, by name, as text; rows of another recipe are refused.
        keys: the keys of the rows, in order. Equal keys are one row.
        size: rows per chunk. A process that is killed loses the chunk that it is computing.
        limit: the largest size of all rows, in bytes.
    Raises:
        TuningError: the folder holds rows of another recipe, or other files.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, str], keys: Sequence[str], size: int, limit: int) -> None:
        self.folder, self._keys, self._size, self._limit = folder, keys, size, limit
        self._recipe = recipe
        self._places: dict[str, tuple[Path, int]] = {}
        self._open = functools.lru_cache(OPEN)(_opened)

    def fill(self, compute: Callable[[Sequence[int]], dict[str, Tensor]], title: str) -> None:
        """Compute the rows that are missing. Several processes may do so at a time, and share the work.

        Args:
            compute: returns the tensors of rows, by name, (rows, ...) each.
            title: the title of the progress bar.
        Raises:
            TuningError: the rows would take more than the limit or than the disk has; or nothing can be written.
        """
        begin(self.folder, self._recipe)
        self._find()
        missing = list({key: row for row, key in enumerate(self._keys) if key not in self._places}.values())
        chunks = [missing[i : i + self._size] for i in range(0, len(missing), self._size)]
        with Bar(total=len(chunks), desc=title, unit="batch", disable=not chunks) as bar:
            for wait in (False, True):  # first unclaimed chunks, then chunks whose writer has died
                for number, rows in enumerate(chunks):
                    path = self._path(rows)
                    with contextlib.suppress(Timeout), _alone(path.with_suffix(LOCK), wait):
                        if not path.exists():
                            self._write(rows, compute(rows), len(missing), len(missing) - number * self._size)
                            bar.update()
        self._find()

    def rows(self, rows: Sequence[int], *names: str) -> dict[str, Tensor]:
        """Return tensors of rows, (B, ...) each.

        Args:
            rows: the numbers of the rows.
            names: which tensors; by default all.
        Raises:
            TuningError: a file is damaged or missing.
        """
        found: dict[str, list[Tensor]] = {}
        for row in rows:
            path, place = self._place(row)
            with self._reading(path):
                chunk = self._open(path)
                for name in names or chunk.keys():
                    found.setdefault(name, []).append(chunk.get_slice(name)[place])
        return {name: torch.stack(values) for name, values in found.items()}

    def _place(self, row: int) -> tuple[Path, int]:
        if self._keys[row] not in self._places:
            self._find()
        if self._keys[row] not in self._places:
            raise TuningError(
                f"the encoded data of row {row} are gone", where=str(self.folder), hint="the same command makes them"
            )
        return self._places[self._keys[row]]

    def _find(self) -> None:
        """Find the rows of the folder, those of other processes among them."""
        known = {path for path, _ in self._places.values()}
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            if path not in known:
                with self._reading(path):
                    keys = _opened(path).metadata()[KEYS].split()
                self._places |= {key: (path, place) for place, key in enumerate(keys)}

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise TuningError(
                f"a file of encoded data cannot be read: {error}",
                where=str(path),
                hint="delete it; the same command makes it again",
            ) from error

    def _write(self, rows: Sequence[int], tensors: Mapping[str, Tensor], missing: int, left: int) -> None:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._check_space(sum(tensor.nbytes for tensor in contiguous.values()) / len(rows), missing, left)
        keys = {KEYS: " ".join(self._keys[row] for row in rows)}
        _replace(self._path(rows), lambda new: safetensors.torch.save_file(contiguous, new, keys))

    def _check_space(self, row: float, missing: int, left: int) -> None:
        """Refuse rows before the first of them is written.

        Args:
            row: the size of a row in bytes, which is that of all.
            missing: the number of rows that are to be written.
            left: the number of them that are not yet.
        """
        count, free = len(self._places) + missing, shutil.disk_usage(self.folder).free
        whole, others = row * count, len(self._places.keys() - set(self._keys))
        if whole > self._limit:
            unread = f"; {others} of them are of other data, which a new folder would not hold" if others else ""
            raise TuningError(
                f"{count} rows take {whole / GIGABYTE:.3g} GB, and the limit is {self._limit / GIGABYTE:.3g} GB",
                where=str(self.folder),
                hint=f"raise cache_limit to {int(whole) + 1} bytes, or pass fewer rows{unread}",
            )
        if row * left > free:
            raise TuningError(
                f"the rows take {whole / GIGABYTE:.3g} GB, and the disk has {free / GIGABYTE:.3g} GB left",
                where=str(self.folder),
                hint="free space, or name a folder on another disk",
            )

    def _path(self, rows: Sequence[int]) -> Path:
        return self.folder / f"rows-{hash_text(*(self._keys[row] for row in rows))}.safetensors"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _open=functools.lru_cache(OPEN)(_opened))


def begin(folder: Path, recipe: Mapping[str, str]) -> None:
    """Create a folder of rows, or check that it is one.

    Args:
        folder: the folder.
        recipe: all that rows are made with, by name, as text.
    Raises:
        TuningError: the folder holds rows of another recipe, or other files; or nothing can be written there.
    """
    record, recipe = folder / RECORD, {"format": FORMAT, **recipe}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begun = (LOCK, record.with_suffix(".new").name)  # by another process
        others = [path.name for path in folder.iterdir() if path.name not in begun]
    except OSError as error:
        raise _unwritable(folder, error) from error
    if others and not record.exists():
        raise TuningError(
            f"the folder holds other files, such as {others[0]}", where=str(folder), hint="name a new one"
        )
    with FileLock(folder / LOCK):
        if not record.exists():
            _replace(record, lambda new: new.write_text(json.dumps(recipe, indent=1) + "\n"))
    saved = json_object(record, TuningError, hint="delete the folder")
    for name, value in recipe.items():
        if (before := saved.get(name)) != value:
            shown = "" if is_hash(value) else f": {before} then, {value} now"
            raise TuningError(
                f"the folder holds data of another {name}{shown}",
                where=str(folder),
                hint="name another folder, or delete this one to encode anew",
            )


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    new = path.with_suffix(".new")
    try:
        write(new)
        os.replace(new, path)
    except (OSError, safetensors.SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: Exception) -> TuningError:
    reason = getattr(error, "strerror", None) or error
    return TuningError(
        f"encoded data cannot be written: {reason}",
        where=str(folder),
        hint="free space there; the same command goes on with what is written already",
    )


def _opened(path: Path) -> Any:
    return safetensors.safe_open(path, "pt")


@contextlib.contextmanager
def _alone(path: Path, wait: bool) -> Iterator[None]:
    """Return a context that one process at a time is in, by a lock file that is removed afterwards.

    Raises:
        Timeout: another process is in it, and `wait` is False.
    """
    with FileLock(path, blocking=wait):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
