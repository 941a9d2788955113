"""Atomic creation of files and directories, locks of directories, and file hashes."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import SdgraphError

LOCK = "lock"  # the lock file of a temporary directory, inside it
OWNED, OWNER = ".lock", ".owner"  # the lock file of a directory that a process writes to for long, and the owner's name
_locks: dict[Path, FileLock] = {}  # the locks of this process, which are reentrant


@contextmanager
def appearing(
    target: str | os.PathLike[str], check: Callable[[Path], None], error: type[SdgraphError]
) -> Iterator[Path]:
    """Yield a temporary directory; on success it replaces `target`, on failure it is removed.

    Args:
        target: the path of the directory; missing parents are created at the end.
        check: a function that raises if `target` may not be replaced; called before and after the block.
        error: the class of the error for a target that cannot be written.
    Raises:
        error: the target cannot be written.
        OSError: writing fails later; an existing target is unchanged.
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
    """Clean up after killed writers, whose locks are free, and restore a target that one had moved aside."""
    for folder in beside.glob(f".{glob.escape(target.name)}-*"):
        if not re.fullmatch(r"[a-z0-9_]{8}", folder.name[len(target.name) + 2 :]) or not (folder / LOCK).is_file():
            continue
        with contextlib.suppress(Timeout, OSError), FileLock(folder / LOCK, timeout=0):  # held while it is written
            if (folder / "old").exists() and not target.exists():
                (folder / "old").rename(target)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def written(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary file; on success it replaces `target`, on failure it is removed.

    Args:
        target: the path of the file; missing folders are created at the end.
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


@contextmanager
def owned(folder: Path, error: type[SdgraphError], where: str) -> Iterator[None]:
    """Lock a directory for one thread of one process; it is created if necessary.

    The lock ends with the process, however that ends, and is reentrant.

    Args:
        folder: the directory.
        error: the class of the error.
        where: the argument that named the directory, for the error.
    Raises:
        error: another process or thread holds the lock, or the directory cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locks.setdefault(folder.resolve(), FileLock(folder.resolve() / OWNED))
        lock.acquire(timeout=0)
    except Timeout as taken:
        raise error(
            f"{_owner(folder)} is writing to {folder}",
            where=where,
            hint="wait until it has ended, or end it, or name another folder",
        ) from taken
    except OSError as refusal:
        hint = "choose a directory that you may write to"
        raise error(f"cannot write there: {refusal.strerror or refusal}", where=str(folder), hint=hint) from refusal
    outermost = lock.lock_counter == 1
    try:
        if outermost:
            (folder / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        if outermost:
            (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(folder: Path) -> str:
    try:
        return (folder / OWNER).read_text()
    except OSError:  # the owner has just begun, or is about to end
        return "another process"


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether a path is a folder or lies within it, whatever their names and links. Neither has to exist."""
    own, other = (Path(os.path.realpath(one.expanduser())) for one in (path, folder))
    return any(
        part == other or (part.exists() and other.exists() and part.samefile(other)) for part in (own, *own.parents)
    )


def check_apart(
    output: Path, inputs: Iterable[tuple[str, Path]], error: type[SdgraphError], where: str, around: bool = True
) -> None:
    """Refuse an output that would overwrite an input.

    Args:
        output: the file or directory to write.
        inputs: the files and directories that are read, each with a description.
        error: the class of the error.
        where: the argument that named the output, for the error.
        around: whether to refuse an output that contains an input.
    Raises:
        error: the output is one of the inputs, lies within it, or contains it.
    """
    for name, path in inputs:
        if lies_in(output, path):
            how = "is" if lies_in(path, output) else "lies within"
        elif around and lies_in(path, output):
            how = "contains"
        else:
            continue
        raise error(
            f"{output} {how} {name}, {path}",
            where=where,
            hint="nothing is written to what is read: name a new folder beside it",
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
