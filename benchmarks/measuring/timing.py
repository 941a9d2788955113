"""Times and memory of calls and processes."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
from torch import nn


def in_turns(
    calls: Mapping[str, Callable[[], Any]], device: str, seconds: float, at_least: int, at_most: int = 200
) -> dict[str, list[float]]:
    """Return the seconds of each call, one of each per turn.

    Turns run in both directions alternately, so that a drift of the machine's speed falls on all calls alike. The first
    two turns, which warm up, are not kept.

    Args:
        calls: the calls by name.
        device: the device that they run on.
        seconds: the time after which no turn begins, except for the first `at_least`.
        at_least: the least number of turns.
        at_most: the largest number of turns.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    end = float("inf")
    for turn in range(-2, at_most):
        if turn == 0:
            end = time.perf_counter() + seconds
        if turn >= at_least and time.perf_counter() > end:
            break
        for name in order:
            took = timed(calls[name], device)
            if turn >= 0:
                samples[name].append(took)
        order.reverse()
    return samples


def timed(call: Callable[[], Any], device: str) -> float:
    """Return the seconds of one call, including the work that it leaves on the device."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def spent(call: Callable[[], Any], device: str) -> float:
    """Return the seconds of one call: those of this process on a CPU, and those of the clock on another device."""
    if torch.device(device).type != "cpu":
        return timed(call, device)
    start = time.process_time()
    call()
    return time.process_time() - start


def wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def mapped(memory: Any) -> int:
    """Return the bytes of that memory which are pages of files; 0 on systems that do not report it."""
    return int(getattr(memory, "shared", 0))


class Peak:
    """The peak memory of this process while the block runs, sampled, in bytes.

    `total` counts all pages, `own` leaves out those of mapped files, which the system may drop at any time.
    """

    def __enter__(self) -> Peak:
        self.own = self.total = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.02):
            memory = process.memory_info()
            self.total = max(self.total, memory.rss)
            self.own = max(self.own, memory.rss - mapped(memory))


def on_device(device: str) -> int:
    """Return the bytes of tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated(device) if torch.device(device).type == "cuda" else 0


def not_shared(result: nn.Module, source: nn.Module) -> int:
    """Return the bytes of the weights of `result` whose storage is not the source's."""
    held = {t.untyped_storage().data_ptr() for t in (*source.parameters(), *source.buffers())}
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in result.state_dict().values()}
    return sum(size for place, size in own.items() if place not in held)
