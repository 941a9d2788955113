"""Directories that are there whole or not at all, and hashes of files."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SdgraphError


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
    check(target)
    beside = next(parent for parent in target.parents if parent.exists())
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=beside))
    except OSError as refusal:
        cure = "choose a directory that you may write to"
        raise error(f"cannot write there: {refusal.strerror}", where=str(beside), cure=cure) from refusal
    new, old = made / "new", made / "old"
    try:
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
        shutil.rmtree(made, ignore_errors=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
