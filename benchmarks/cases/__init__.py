"""The cases of `overhead.py`, a module each: how it is measured (`run`), how it is printed (`table`), and its sizes.

A module is a case by its name in `KINDS`. `run(settings, *sizes)` returns what goes into the JSON file, and
`table(cases)` makes a Markdown table of all cases of the kind.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from . import apply, attention, deploy, experts, export, forward, inherit, layers, memory, prune, watch
from .settings import Settings

KINDS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (forward, apply, prune, inherit, experts, layers, attention, export, deploy, memory, watch)
}
ALL = tuple(f"{kind}/{size}" for kind, module in KINDS.items() for size in module.SIZES)
QUICK = tuple(f"{kind}/{size}" for kind, module in KINDS.items() for size in module.QUICK)


@torch.no_grad()
def run(case: str, settings: Settings) -> dict[str, Any]:
    """The figures of a case, `KIND/...`."""
    kind, *sizes = case.split("/")
    return {"case": case, **KINDS[kind].run(settings, *sizes)}


def tables(cases: list[dict[str, Any]]) -> list[str]:
    """A table for each kind of case."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        kinds.setdefault(case["case"].partition("/")[0], []).append(case)
    return [KINDS[kind].table(each) for kind, each in kinds.items()]
