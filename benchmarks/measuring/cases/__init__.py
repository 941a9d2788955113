"""The cases of `benchmarks/overhead.py`, a module each: its measurement (`run`), its table (`table`), and its sizes.

A module is a case by its name in `KINDS`. `run(settings, *sizes)` returns the figures for the JSON file, and
`table(cases)` makes a Markdown table of all cases of the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from ..tables import QUICK as SMOKE_TEST
from . import apply, attention, bookkeeping, deploy, experts, export, forward, inherit, layers, memory, prune, watch
from .settings import Settings

KINDS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        forward,
        apply,
        prune,
        inherit,
        experts,
        layers,
        attention,
        export,
        deploy,
        memory,
        watch,
        bookkeeping,
    )
}
ALL = tuple(f"{kind}/{size}" for kind, module in KINDS.items() for size in module.SIZES)
QUICK = tuple(f"{kind}/{size}" for kind, module in KINDS.items() for size in module.QUICK)


@torch.no_grad()
def run(case: str, settings: Settings) -> dict[str, Any]:
    """Return the figures of a case, `KIND/...`."""
    kind, *sizes = case.split("/")
    return {"case": case, **KINDS[kind].run(settings, *sizes)}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the conditions of a result, and a table for each kind of case."""
    settings = result["settings"]
    malloc = "".join(f", `{name}={value}`" for name, value in result.get("malloc", {}).items())
    conditions = (
        f"{result['device']}, {result['cores']} cores, {result['threads']} threads, {settings['dtype']}, batch "
        f"{settings['batch']}{malloc}; torch {result['torch']}, diffusers {result['diffusers']}, sdgraph "
        f"{result['sdgraph']} ({result['commit']}); {result['date'][:10]}."
    )
    kinds: dict[str, list[dict[str, Any]]] = {}
    for case in result["cases"]:
        kinds.setdefault(case["case"].partition("/")[0], []).append(case)
    found = {"conditions": f"{conditions} {SMOKE_TEST}" if settings["quick"] else conditions}
    return found | {kind: KINDS[kind].table(cases) for kind, cases in kinds.items()}
