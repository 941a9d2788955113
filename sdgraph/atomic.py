"""Files that are written whole or not at all, by one process at a time, apart from what is read; hashes of files."""

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

LOCK = "lock"  # of a directory that is being written, in it
OWNED, OWNER = ".lock", ".owner"  # the lock of a directory that a process writes to for long, and which process that is
_locks: dict[Path, FileLock] = {}  # of this process, so that what it owns it may own again, deeper down


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


@contextmanager
def owned(folder: Path, error: type[SdgraphError], where: str) -> Iterator[None]:
    """A context in which one thread of one process writes to a directory; it is created if necessary.

    The lock ends with the process, however that ends. Entering it again in the same thread is fine.

    Args:
        folder: the directory.
        error: the class of the error.
        where: the argument that named it, for the error.
    Raises:
        error: another process or thread is in it, or nothing can be written there.
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
    except OSError:  # it has just begun, or is about to end
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
    """Refuse to write to what is read.

    Args:
        output: the file or directory to write.
        inputs: files and directories that are read, with what they are.
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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
