"""Processes that work for another one, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import torch


def begin(threads: int) -> None:
    """Prepare a process that was spawned for work. It ends with the process that has started it, however that ends.

    The terminal sends SIGINT to all processes, and the parent handles it.

    Args:
        threads: of PyTorch in this process.
    """
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
