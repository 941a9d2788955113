"""Directories and files that are there whole or not at all, and hashes of files."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import SdgraphError

LOCK = "lock"  # of a directory that is being written, in it


@contextmanager
def appearing(
    target: str | os.PathLike[str], check: Callable[[Path], None], error: type[SdgraphError]
) -> Iterator[Path]:
    """A new directory that takes the place of `target` when the block ends, and is gone if it fails.

    Args:
        target: the directory, or where it will be; its parents are made at the end too.
        check: raises if what is at `target` may not be replaced; asked first and last.
        error: what is raised where nothing can be written.
    Raises:
        error: see there.
        OSError: writing fails later; what was there stays.
    """
    target = Path(os.path.abspath(target))
    beside = nearest_folder(target)
    _clear(target, beside)
    check(target)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=beside))
    except OSError as refusal:
        hint = "choose a directory that you may write to"
        raise error(f"cannot write there: {refusal.strerror}", where=str(beside), hint=hint) from refusal
    new, old = folder / "new", folder / "old"
    ours = FileLock(folder / LOCK)
    try:
        ours.acquire()
        new.mkdir()  # unlike a temporary directory's, its mode follows the umask
        yield new
        check(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        ours.release()
        shutil.rmtree(folder, ignore_errors=True)


def _clear(target: Path, beside: Path) -> None:
    """Remove what killed processes left of `target`, whose locks nobody holds; what one had put away comes back."""
    for folder in beside.glob(f".{glob.escape(target.name)}-*"):
        if not re.fullmatch(r"[a-z0-9_]{8}", folder.name[len(target.name) + 2 :]) or not (folder / LOCK).is_file():
            continue
        with contextlib.suppress(Timeout, OSError), FileLock(folder / LOCK, timeout=0):  # else it is being written
            if (folder / "old").exists() and not target.exists():
                (folder / "old").rename(target)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def written(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file that takes the place of `target` when the block ends, and is gone if it fails.

    Args:
        target: the file; its folders are made at the end too.
    """
    target = Path(os.path.abspath(target))
    unfinished = nearest_folder(target) / f".{target.stem}-{secrets.token_hex(4)}{target.suffix}"
    try:
        yield unfinished
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def nearest_folder(target: Path) -> Path:
    """Return the folder that a file or folder is in, or the nearest above that exists."""
    return next(parent for parent in Path(os.path.abspath(target)).parents if parent.exists())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
