"""The processes of a run: the one that owns its folder, the signals that end it, and the workers that end with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..atomic import owned
from ..errors import TuningError
from ..extra import imported


def alone(output_dir: Path) -> contextlib.AbstractContextManager[None]:
    """Return a context in which no other run writes to a folder; the processes of one run share it.

    Args:
        output_dir: the folder, which is created if necessary.
    Raises:
        TuningError: another run is writing there; the error names its process.
    """
    process = imported("accelerate", "tuning").PartialState(cpu=not torch.accelerator.is_available())
    return owned(output_dir, TuningError, "output_dir") if process.is_main_process else contextlib.nullcontext()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the process by an exception, as SIGINT does, if nothing else handles it.

    The exit status is then 143, as that of a process that the signal has ended.
    """

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()  # others may not handle signals
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def begin_worker(threads: int) -> None:
    """Prepare a spawned process for work. It ends with the process that has started it, however that ends.

    The terminal sends SIGINT to all processes, and the parent handles it.

    Args:
        threads: the number of PyTorch's threads in this process.
    """
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
