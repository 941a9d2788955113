"""The table of contents of an exported directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from sdgraph.inheritance.cache import always
from sdgraph.inheritance.plan import Plan
from sdgraph.schedules import SamplingRun
from sdgraph.untrusted import read_config, require_folder
from sdgraph.views.format import format_count, format_macs, format_names, format_ranges, format_table
from sdgraph.views.timetable import supposition

from .manifest import AGAIN, CONFIG, DATA, FIRST, MODEL, REPORT, ExportedVariant, Manifest
from .manifest_file import check_files, read_manifest
from .untrusted import check_model


def contents(directory: Path, calls: Any = 50, verify: bool = True) -> str:
    """Return the tables of the graphs, the sites, the inputs and the files.

    Args:
        directory: the exported directory.
        calls: the number of calls of the generation that is shown, their timesteps or a scheduler, see
            `sdgraph.Graph.timetable`.
        verify: whether to compare the files with their hashes.
    Raises:
        SavedError: a file is missing or damaged.
        ScheduleError: a schedule does not fit the calls.
    """
    require_folder(directory, exported=True)
    read_config(directory / CONFIG, AGAIN)
    manifest = read_manifest(directory)
    if verify:
        check_files(manifest, directory, manifest.files)
    first = manifest.variants[0]
    lines = [
        f"{directory}: {manifest.dtype}, opset {manifest.opset}, written by sdgraph {manifest.version}",
        f"passes: {', '.join(manifest.recipe) or 'none'}",
        *([f"8 bits: {manifest.quantization}"] if manifest.quantization else []),
        f"{manifest.target}, {manifest.layout}; " + ", ".join(f"{n} {v}" for n, v in manifest.versions.items()),
        "",
    ]
    run = SamplingRun.of(calls)
    plan = Plan.of(run, always(BundleCosts(manifest)))
    served: dict[ExportedVariant, list[int]] = {}
    for number, possible in enumerate(plan.calls):
        for variant in dict.fromkeys(manifest.variant_for(reused)[0] for reused in possible):
            served.setdefault(variant, []).append(number)
    last = f"of {len(plan.calls)} calls"
    rows: list[tuple[str, ...]] = [("graph", "nodes", "MACs", "share", "reads", "writes", last)]
    for variant in manifest.variants:
        check_model(directory / variant.file, manifest.files)
        nodes = len(onnx.load(directory / variant.file, load_external_data=False).graph.node)
        figures = (
            format_macs(variant.macs),
            f"{variant.macs / first.macs:.1%}",
            str(len(variant.reads)),
            str(len(variant.writes)),
        )
        rows.append((variant.file, str(nodes), *figures, format_ranges(served.get(variant, [])) or "-"))
    lines.append(format_table(rows))
    if plan.least:
        fastest, slowest = (len(plan.calls) * first.macs / total for total in (plan.least, plan.most))
        span = f"at most {fastest:.2f}" if fastest == slowest else f"{slowest:.2f} to {fastest:.2f}"
        drift = "" if fastest == slowest else ", as features drift"
        lines.append(f"{span} times as fast as computing everything{drift}")
        lines.append(f"supposed: {supposition(run.supposed(), run.timesteps is None)}")
    if first.file == FIRST:
        lines.append(f"{MODEL} is {FIRST} with one output, for other tools")
    schedules: dict[tuple[str, str], list[str]] = {}
    for value in manifest.values:
        otherwise = (
            "bypassed" if value.bypassed else f"forecast {value.forecast}" if value.forecast else "the last value"
        )
        schedules.setdefault((value.schedule, otherwise), []).append(value.site)
    if schedules:
        rows = [("site", "computed at", "otherwise")]
        rows += [(format_names(sites), schedule, otherwise) for (schedule, otherwise), sites in schedules.items()]
        lines += ["", format_table(rows)]
    rows = [("input", "shape", "dtype")]
    for spec in manifest.model_inputs:
        dtype = str(manifest.dtype_of(spec)).removeprefix("torch.")
        rows.append((spec.name, ", ".join(map(str, spec.shape or ())), dtype))
    lines += ["", format_table(rows), ""]
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != REPORT}
    lines.append(f"{format_count(sum(sizes.values()))}B, of which {format_count(sizes.get(DATA, 0))}B weights")
    return "\n".join(lines)


class BundleCosts:
    """The backend that plans the calls of a bundle: outputs are multiply-accumulates; sizes in bytes are not known.

    Args:
        manifest: the manifest of the bundle.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.sites, self._manifest = manifest.sites, manifest

    def compute(self, inputs: None, reused: frozenset[str], read: object) -> tuple[int, dict[str, int]]:
        """Return the multiply-accumulates of a call, and the sites that it computes."""
        variant, _ = self._manifest.variant_for(reused)
        return variant.macs, dict.fromkeys(variant.writes, 0)
