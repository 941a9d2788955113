"""Rows of tensors that are computed once and kept in a folder, in chunks that are there whole or not at all."""

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
from ...text import from_json, read_text

RECORD = "kept.json"
LOCK = ".lock"  # of the folder, and the ending of those of chunks
OPEN = 64  # chunks that are mapped into memory at a time
GIGABYTE = 10**9


class Kept:
    """Rows of named tensors in a folder. Filling it again goes on where it stopped.

    Args:
        folder: the folder, which is created if necessary.
        made: what the rows are made of, by name, as text; rows of anything else are refused.
        count: the number of rows.
        size: rows per chunk. A process that is killed loses the chunk that it is computing.
        limit: the largest size of all rows, in bytes.
    Raises:
        TuningError: the folder holds other rows, or other files.
    """

    def __init__(self, folder: Path, made: Mapping[str, str], count: int, size: int, limit: int) -> None:
        self.folder, self._count, self._size, self._limit = folder, count, size, limit
        self._made = {**made, "rows": str(count), "rows per chunk": str(size)}
        self._open = functools.lru_cache(OPEN)(self._opened)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def fill(self, compute: Callable[[range], dict[str, Tensor]], title: str) -> None:
        """Compute the chunks that are missing. Several processes may do so at a time, and share the work.

        Args:
            compute: returns the tensors of rows, by name, (rows, ...) each.
            title: of the progress bar.
        Raises:
            TuningError: the rows would take more than the limit or than the disk has; or nothing can be written.
        """
        with FileLock(self.folder / LOCK):
            self._check_or_begin()
        chunks = [range(i, min(i + self._size, self._count)) for i in range(0, self._count, self._size)]
        missing = [rows for rows in chunks if not self._path(rows[0]).exists()]
        with Bar(total=len(missing), desc=title, unit="batch", disable=not missing) as bar:
            for wait in (False, True):  # first those that no other process is at, then those that others have left
                for rows in missing:
                    path = self._path(rows[0])
                    with contextlib.suppress(Timeout), _alone(path.with_suffix(LOCK), wait):
                        if not path.exists():
                            self._write(rows, compute(rows))
                            bar.update()

    def rows(self, rows: Sequence[int], *names: str) -> dict[str, Tensor]:
        """Return tensors of rows, (B, ...) each.

        Args:
            rows: the numbers of the rows.
            names: which tensors; by default all.
        Raises:
            TuningError: a file is damaged.
        """
        found: dict[str, list[Tensor]] = {}
        for row in rows:
            path = self._path(row)
            try:
                chunk = self._open(path)
                for name in names or chunk.keys():
                    found.setdefault(name, []).append(chunk.get_slice(name)[row % self._size])
            except (OSError, safetensors.SafetensorError) as error:
                raise TuningError(
                    f"a file of encoded data cannot be read: {error}",
                    where=str(path),
                    hint="delete it; the same command makes it again",
                ) from error
        return {name: torch.stack(values) for name, values in found.items()}

    def _check_or_begin(self) -> None:
        record = self.folder / RECORD
        if not record.exists():
            if others := [path.name for path in self.folder.iterdir() if path.name != LOCK]:
                raise TuningError(
                    f"the folder holds other files, such as {others[0]}", where=str(self.folder), hint="name a new one"
                )
            self._replace(record, lambda new: new.write_text(json.dumps(self._made, indent=1) + "\n"))
        try:
            saved = from_json(read_text(record, TuningError, hint="delete the folder"))
        except ValueError as error:
            raise TuningError(f"it cannot be read: {error}", where=str(record), hint="delete the folder") from error
        for name, value in self._made.items():
            if (before := saved.get(name)) != value:
                shown = "" if max(len(str(before)), len(value)) > 32 else f": {before} then, {value} now"
                raise TuningError(
                    f"the folder holds data of another {name}{shown}",
                    where=str(self.folder),
                    hint="name another folder, or delete this one to encode anew",
                )

    def _write(self, rows: range, tensors: Mapping[str, Tensor]) -> None:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._check_space(sum(tensor.nbytes for tensor in contiguous.values()) / len(rows), rows)
        self._replace(self._path(rows[0]), lambda new: safetensors.torch.save_file(contiguous, new))

    def _check_space(self, row: float, rows: range) -> None:
        """Refuse rows of a size in bytes, of which all have the same, before the first of them is written."""
        whole, free = row * self._count, shutil.disk_usage(self.folder).free
        if whole > self._limit:
            raise TuningError(
                f"{self._count} rows take {whole / GIGABYTE:.3g} GB, and the limit is {self._limit / GIGABYTE:.3g} GB",
                where=str(self.folder),
                hint=f"raise cache_limit to {int(whole) + 1} bytes, or pass fewer rows",
            )
        if row * (self._count - rows[0]) > free:
            raise TuningError(
                f"the rows take {whole / GIGABYTE:.3g} GB, and the disk has {free / GIGABYTE:.3g} GB left",
                where=str(self.folder),
                hint="free space, or name a folder on another disk",
            )

    def _replace(self, path: Path, write: Callable[[Path], Any]) -> None:
        new = path.with_suffix(".new")
        try:
            write(new)
            os.replace(new, path)
        except (OSError, safetensors.SafetensorError) as error:
            new.unlink(missing_ok=True)
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> TuningError:
        reason = getattr(error, "strerror", None) or error
        return TuningError(
            f"encoded data cannot be written: {reason}",
            where=str(self.folder),
            hint="free space there; the same command goes on with what is written already",
        )

    def _path(self, row: int) -> Path:
        return self.folder / f"rows-{row // self._size * self._size:08}.safetensors"

    @staticmethod
    def _opened(path: Path) -> Any:
        return safetensors.safe_open(path, "pt")


@contextlib.contextmanager
def _alone(path: Path, wait: bool) -> Iterator[None]:
    """A context that one process at a time is in, by a file that is gone afterwards.

    Raises:
        Timeout: another process is in it, and `wait` is False.
    """
    with FileLock(path, blocking=wait):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
