"""The table of contents of an exported directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from sdgraph.inheritance.cache import Turn, always
from sdgraph.inheritance.plan import Plan
from sdgraph.inheritance.tracker import GenerationTracker
from sdgraph.schedules import SamplingRun
from sdgraph.untrusted import read_config, require_folder
from sdgraph.views.format import format_count, format_macs, format_names, format_ranges, format_table
from sdgraph.views.timetable import supposition

from .manifest import AGAIN, CONFIG, DATA, REPORT, ExportedVariant, Manifest, SwitchManifest
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
        check_files(manifest, directory)
    members = manifest.members
    first = next(iter(members.values()))
    lines = [f"{directory}: {first.dtype}, opset {first.opset}, written by sdgraph {manifest.version}"]
    run = SamplingRun.of(calls)
    who: tuple[str, ...] = ()
    turns = always(BundleCosts(first))
    if isinstance(manifest, SwitchManifest):
        rota = manifest.rota(GenerationTracker())
        who = rota.schedule.turns(run)
        every = {name: Turn(BundleCosts(one), name, rota.carried) for name, one in members.items()}
        turns = lambda call, timestep, run: every[who[call or 0]]  # noqa: E731
        lines += [f"a switch of several UNets; schedule: {manifest.schedule}"]
        lines += [f"guidance scale of {name}: {scale:g}" for name, scale in manifest.guidance_scale.items()]
    plan = Plan.of(run, turns)
    for name, one in members.items():
        of = f"{name}: " if name else ""
        lines.append(f"{of}passes: {', '.join(one.recipe) or 'none'}")
        lines += [f"{of}8 bits: {one.quantization}"] if one.quantization else []
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    lines += [f"{first.target}, {first.layout}; {versions}", ""]
    if who:
        numbers = {name: [i for i, one in enumerate(who) if one == name] for name in members}
        shown = [(name, format_ranges(at) or "-", str(len(at))) for name, at in numbers.items()]
        lines += [format_table([("UNet", f"computes, of {len(who)} calls", "number"), *shown]), ""]
    lines += _graphs(directory, members, plan, who)
    most = max(one.variants[0].macs for one in members.values())
    if plan.least:
        fastest, slowest = (len(plan.calls) * most / total for total in (plan.least, plan.most))
        span = f"at most {fastest:.2f}" if fastest == slowest else f"{slowest:.2f} to {fastest:.2f}"
        drift = "" if fastest == slowest else ", as features drift"
        lines.append(f"{span} times as fast as computing everything{drift}")
        lines.append(f"supposed: {supposition(run.supposed(), run.timesteps is None)}")
    for one in members.values():
        file = one.variants[0].file
        if one.layout == "variants" and file != one.model:
            lines.append(f"{one.model} is {file} with one output, for other tools")
    lines += [*_sites(members), "", _inputs(first), ""]
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != REPORT}
    lines.append(f"{format_count(sum(sizes.values()))}B, of which {format_count(sizes.get(DATA, 0))}B weights")
    return "\n".join(lines)


def _graphs(directory: Path, members: Mapping[str, Manifest], plan: Plan, who: Sequence[str]) -> Iterator[str]:
    """Yield the table of the graphs, with the calls that each serves."""
    served: dict[tuple[str, ExportedVariant], list[int]] = {}
    for number, possible in enumerate(plan.calls):
        name = who[number] if who else ""
        for variant in dict.fromkeys(members[name].variant_for(reused)[0] for reused in possible):
            served.setdefault((name, variant), []).append(number)
    rows: list[tuple[str, ...]] = [
        ("graph", "nodes", "MACs", "share", "reads", "writes", f"of {len(plan.calls)} calls")
    ]
    most = max(one.variants[0].macs for one in members.values())
    for name, one in members.items():
        for variant in one.variants:
            check_model(directory / variant.file, one.files)
            nodes = len(onnx.load(directory / variant.file, load_external_data=False).graph.node)
            figures = format_macs(variant.macs), f"{variant.macs / most:.1%}"
            sites = str(len(variant.reads)), str(len(variant.writes))
            calls = format_ranges(served.get((name, variant), [])) or "-"
            rows.append((variant.file, str(nodes), *figures, *sites, calls))
    yield format_table(rows)


def _sites(members: Mapping[str, Manifest]) -> Iterator[str]:
    """Yield the table of the sites, if there are any."""
    schedules: dict[tuple[str, str], list[str]] = {}
    for name, one in members.items():
        for value in one.values:
            otherwise = f"forecast {value.forecast}" if value.forecast else "the last value"
            key = value.schedule, "bypassed" if value.bypassed else otherwise
            schedules.setdefault(key, []).append(f"{name}: {value.site}" if name else value.site)
    if schedules:
        rows = [("site", "computed at", "otherwise")]
        rows += [(format_names(sites), schedule, otherwise) for (schedule, otherwise), sites in schedules.items()]
        yield from ("", format_table(rows))


def _inputs(manifest: Manifest) -> str:
    """Return the table of the inputs."""
    rows = [("input", "shape", "dtype")]
    for spec in manifest.model_inputs:
        dtype = str(manifest.dtype_of(spec)).removeprefix("torch.")
        rows.append((spec.name, ", ".join(map(str, spec.shape or ())), dtype))
    return format_table(rows)


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
