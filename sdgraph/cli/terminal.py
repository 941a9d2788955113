"""A command and its terminal: signals that stop it, streams whose readers may leave, and quiet libraries."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

AGAIN = 3.0  # seconds within which another signal is taken for the same one


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Let SIGTERM stop a block as SIGINT does, by a KeyboardInterrupt with the number of the signal.

    A second signal shortly after the first does not stop the removal of unfinished files. A signal that the process was
    started to ignore, as under `nohup`, stays ignored.

    Returns:
        An event that the block sets when it has nothing left to stop; later signals do nothing.
    """
    over = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield over  # only the main thread may handle signals
        return
    first = -AGAIN

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if time.monotonic() - first >= AGAIN and not over.is_set():
            first = time.monotonic()
            raise KeyboardInterrupt(number)

    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield over
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Output(io.TextIOBase):
    """A standard stream whose reader may leave, as `head` does: what is printed from then on is lost, and no error.

    The command goes on, writes its files, and has the exit status that it would have.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        """Send the rest nowhere; Python would try to write what it holds back once more at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def outputs() -> Iterator[None]:
    """Let the readers of standard output and standard error leave during a block."""
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let diffusers and transformers print errors only, because our own messages and bars report the progress.

    Deprecation warnings are silenced too, because they concern developers.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", module=r"(diffusers|transformers|huggingface_hub)\b")
        for library in ("diffusers", "transformers"):
            if importlib.util.find_spec(library) is None:
                continue
            logging = importlib.import_module(f"{library}.utils.logging")
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            if logging.is_progress_bar_enabled():
                stack.callback(logging.enable_progress_bar)
            logging.disable_progress_bar()
        yield
