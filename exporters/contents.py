"""What an exported directory holds, for the reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch

from sdgraph.generation import Generation
from sdgraph.schedules import Run
from sdgraph.text import cost, count, several
from sdgraph.timetable import ranges

from .manifest import DATA, REPORT, Manifest, Model, read_config


def contents(directory: Path, calls: int = 50, verify: bool = True) -> str:
    """A table of the graphs, what calls inherit, the inputs and the files.

    Args:
        calls: of the generation whose calls are told, at timesteps evenly spaced.
        verify: compare the files with their hashes.
    Raises:
        SavedError: what is there is not whole.
        ScheduleError: a schedule does not fit the calls.
    """
    read_config(directory)
    manifest = Manifest.read(directory)
    if verify:
        manifest.check_files(directory, manifest.files)
    first = manifest.models[0]
    lines = [
        f"{directory}: {manifest.dtype}, opset {manifest.opset}, written by sdgraph {manifest.version}",
        f"passes: {', '.join(manifest.recipe) or 'none'}",
        f"{manifest.artefact}, {manifest.layout}; " + ", ".join(f"{n} {v}" for n, v in manifest.versions.items()),
        "",
    ]
    served = _calls(manifest, calls)
    rows: list[tuple[str, ...]] = [("graph", "nodes", "MACs", "share", "takes", "gives", f"of {calls} calls")]
    for model in manifest.models:
        nodes = len(onnx.load(directory / model.file, load_external_data=False).graph.node)
        figures = (cost(model.macs), f"{model.macs / first.macs:.1%}", str(len(model.takes)), str(len(model.gives)))
        rows.append((model.file, str(nodes), *figures, ranges(served.get(model, [])) or "-"))
    lines += _table(rows)
    total = sum(model.macs * len(numbers) for model, numbers in served.items())
    lines.append(f"at most {calls * first.macs / total:.2f} times as fast as computing everything")
    schedules: dict[tuple[str, int], list[str]] = {}
    for value in manifest.values:
        schedules.setdefault((value.schedule, value.forecast), []).append(value.site)
    if schedules:
        rows = [("inherited", "schedule", "forecast")]
        rows += [(several(sites), schedule, str(order)) for (schedule, order), sites in schedules.items()]
        lines += ["", *_table(rows)]
    rows = [("input", "shape", "dtype")]
    for spec in manifest.model_inputs:
        dtype = str(manifest.dtype_of(spec)).removeprefix("torch.")
        rows.append((spec.name, ", ".join(map(str, spec.shape or ())), dtype))
    lines += ["", *_table(rows), ""]
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != REPORT}
    lines.append(f"{count(sum(sizes.values()))}B, of which {count(sizes.get(DATA, 0))}B weights")
    return "\n".join(lines)


def _calls(manifest: Manifest, calls: int) -> dict[Model, list[int]]:
    """Which calls each graph serves."""
    timesteps = np.linspace(999, 0, calls).tolist()
    generation = Generation((), (), Run.of(timesteps), 0, timesteps[0])
    found: dict[Model, list[int]] = {}
    for number, timestep in enumerate(timesteps):
        generation.timestep = timestep
        stale = generation.stale(manifest.sites)
        model, _ = manifest.model_for(stale)
        found.setdefault(model, []).append(number)
        generation.keep(dict.fromkeys(model.gives, torch.empty(0)), manifest.sites, stale)
        generation.advance()
    return found


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
