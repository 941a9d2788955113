"""Results: the command line, commit and machine that each records, and the files that hold them."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch

import sdgraph
from sdgraph.exporters.engines import processor

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DRAFTS = ROOT / "out" / "bench"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a result: `--out`, `--quick` and `--draft`."""
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results; drafts in out/bench)")
    parser.add_argument("--quick", action="store_true", help="smoke test, whose result is a draft")
    parser.add_argument("--draft", action="store_true", help="allow files that differ from the commit")


def begin(benchmark: str, device: str, draft: bool) -> dict[str, Any]:
    """Return the provenance of a result, before anything is measured.

    Args:
        benchmark: the name of the command in `benchmarks/`.
        device: the device that is measured, "cpu" or "cuda".
        draft: whether a tree that differs from its commit is allowed.
    Returns:
        The command line, the commit, the machine and the versions, as far as they matter to the figures.
    Raises:
        SystemExit: the tree differs from its commit or has none, and the result is no draft.
    """
    at = commit()
    if not draft and (not at or at.endswith("+")):
        raise SystemExit(
            f"{'files differ from the commit' if at else 'this is no git checkout'}, so a result could not be measured "
            "again: commit first, or pass --draft"
        )
    cuda = torch.device(device).type == "cuda"
    malloc = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    settings = [f"{name}={value}" for name, value in malloc.items()]
    return {
        "benchmark": benchmark,
        "command": " ".join([*settings, f"python -m benchmarks.{benchmark}", shlex.join(sys.argv[1:])]).rstrip(),
        "draft": draft,
        "commit": at,
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
        "malloc": malloc,
    }


def place(args: argparse.Namespace, name: str) -> Path:
    """Return the file of a result: `--out`, or the name in benchmarks/results, of drafts in out/bench."""
    chosen: Path | None = args.out
    return chosen or (DRAFTS if args.quick or args.draft else RESULTS) / name


def begun(file: Path, head: dict[str, Any]) -> dict[str, Any]:
    """Return the result that a file holds already, or an empty one.

    Args:
        file: the JSON file.
        head: what all methods of a result have in common.
    Raises:
        SystemExit: the methods of the file were measured otherwise.
    """
    if not file.exists():
        return {**head, "methods": {}}
    result: dict[str, Any] = json.loads(file.read_text())
    other = [f"{name}={result.get(name)}" for name, value in head.items() if result.get(name) != value]
    if other:
        raise SystemExit(f"{file} has methods with other settings, {', '.join(other)}: pass another --out")
    return result


def record(file: Path, result: dict[str, Any]) -> None:
    """Write a result as a whole.

    Args:
        file: the JSON file, whose folder is made.
        result: the provenance of `begin`, and the figures.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(file)


def commits(result: dict[str, Any]) -> list[str]:
    """Return the commits that a result was measured at, each once; a plus marks a tree that differed from it."""
    parts = [result, *(result["methods"].values() if result["benchmark"] in ("tuning", "pruning", "switching") else ())]
    return list(dict.fromkeys(part["commit"] for part in parts if "commit" in part))


def commit() -> str:
    """Return the checkout's commit, with a plus where files other than results differ from it; empty outside of one."""
    git = ["git", "-C", str(ROOT)]
    others = ["--", ".", ":(exclude)benchmarks/results"]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", *others], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.stdout else "")
