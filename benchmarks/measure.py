"""Times, memory, and what they were measured on."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from torch import nn

import sdgraph


def in_turns(
    calls: Mapping[str, Callable[[], Any]], device: str, seconds: float, at_least: int, at_most: int = 200
) -> dict[str, list[float]]:
    """Seconds of each call, one of each per turn.

    Turns run in both directions alternately, so that a drift of the machine's speed falls on all calls alike. The first
    two turns, which warm up, are not kept.

    Args:
        seconds: no turn is begun after this time, except for the first `at_least`.
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
    """Seconds of one call, the work it leaves on the device included."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def spent(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call: of this process on a CPU, which others may share, and by the clock on another device."""
    if torch.device(device).type != "cpu":
        return timed(call, device)
    start = time.process_time()
    call()
    return time.process_time() - start


def wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def resident() -> int:
    """Bytes of memory this process holds."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def mapped(memory: Any) -> int:
    """Bytes of that memory which are pages of files; not told on all systems."""
    return int(getattr(memory, "shared", 0))


class Peak:
    """The most memory of this process while the block runs, sampled; in bytes.

    Args:
        own: without pages of files that are mapped, which the system may drop at any time.
        total: with them.
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
    """Bytes of tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated(device) if torch.device(device).type == "cuda" else 0


def not_shared(result: nn.Module, source: nn.Module) -> int:
    """Bytes of the weights of `result` whose storage is not the source's."""
    held = {t.untyped_storage().data_ptr() for t in (*source.parameters(), *source.buffers())}
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in result.state_dict().values()}
    return sum(size for place, size in own.items() if place not in held)


def circumstances(device: str) -> dict[str, Any]:
    """The machine and the versions, as far as they matter to the figures."""
    cuda = torch.device(device).type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "diffusers": diffusers.__version__,
        "sdgraph": sdgraph.__version__,
        "commit": commit(),
        "malloc": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
    }


def processor() -> str:
    """Model name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with a plus where files differ from it; empty outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.strip() + ("+" if changed else "")
