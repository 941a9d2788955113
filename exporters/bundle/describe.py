"""The description of a UNet that is to be exported: its manifest, before any file is written."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from typing import Any, cast

import torch

from sdgraph import Graph, GraphUNet
from sdgraph.errors import ExportError
from sdgraph.forecasts import Order, Polynomial
from sdgraph.ir.sites import Site
from sdgraph.ir.sites import sites as site_nodes
from sdgraph.ir.variants import per_call
from sdgraph.views.timetable import GraphCosts, Timetable

from .manifest import MODEL, Dtype, ExportedVariant, Layout, Manifest, Target, Value, named


def describe(
    unet: GraphUNet,
    given: frozenset[str],
    target: str,
    layout: str,
    opset: int,
    calls: Any,
    member: str = "",
    timetable: Timetable | None = None,
) -> Manifest:
    """Return the manifest of a UNet, still without files.

    Args:
        unet: the traced UNet.
        given: the names of the optional inputs that the variants are to have.
        target: "portable" or "cuda", see `Manifest`.
        layout: "variants" or "single", see `Manifest`; a UNet with one variant has "variants".
        opset: the version of the ONNX operators.
        calls: the generations to serve, which decide the variants, see `sdgraph.Graph.timetable`.
        member: the name of the UNet in a switch; "" for a UNet alone.
        timetable: the timetable of the switch, which decides the variants of a member.
    Raises:
        ExportError: a size or an inherited value cannot be described.
        ScheduleError: a schedule does not fit `calls`.
    """
    graph = unet.graph.copy()
    graph.follow_weights()
    if any(node.target is per_call for node in graph.nodes):
        _require_one_timestep(graph)
    inputs = graph.resolved_inputs()
    for spec in inputs:
        if "?" in (spec.shape or ()):
            what = f"a size of {spec.name} is not a known expression of the call's sizes"
            raise ExportError(what, where=f"input {spec.name}", hint="a pass has caused this; please report it")
    variants = _variants(graph, graph.timetable(calls) if timetable is None else timetable, member)
    return Manifest(
        target=cast(Target, target),
        layout=cast(Layout, layout if len(variants) > 1 else "variants"),
        dtype=cast(Dtype, str(unet.dtype).removeprefix("torch.")),
        opset=opset,
        inputs=inputs,
        given=tuple(i.name for i in inputs if i.shape is not None and (not i.optional or i.name in given)),
        output=graph.dims.expressions(graph.output.meta["val"], graph.output.meta["probe"]),
        variants=variants,
        values=tuple(_value(graph, name, site, unet.dtype) for name, site in graph.sites.items()),
        guards=graph.guards,
        recipe=tuple(map(str, graph.passes)),
        member=member,
        versions={name: importlib.metadata.version(name) for name in ("torch", "diffusers", "onnx", "onnxscript")},
    )


def _require_one_timestep(graph: Graph) -> None:
    """Give the graph one timestep for all samples of a call: the form of models of which a part depends on the timestep
    alone."""
    graph.inputs = tuple(replace(i, shape=(1,), broadcast=False) if i.name == "timestep" else i for i in graph.inputs)
    timestep = graph.input("timestep")
    for key in ("val", "probe"):
        timestep.meta[key] = timestep.meta[key].new_empty(1)
    graph.propagate(anew=True)


def _variants(graph: Graph, timetable: Timetable, member: str) -> tuple[ExportedVariant, ...]:
    """Return the variants that the calls need. The first computes all sites, as the first call of a generation does."""
    if not graph.sites:
        return (ExportedVariant(named(member, MODEL), macs=graph.macs),)
    costs = GraphCosts(graph)
    variants = []
    may_go = {name for name, site in graph.sites.items() if site.bypassed}
    wanted = [frozenset((*one.reads, *one.bypassed)) for one in timetable.variants if one.member == member]
    for number, reused in enumerate(dict.fromkeys((frozenset[str](), *wanted))):
        planned = costs.variant(reused)
        kept = tuple(site for site in planned.computed if site not in may_go)
        computed = tuple(site for site in planned.computed if site in may_go)
        name = named(member, f"variant_{number}.onnx")
        variants.append(ExportedVariant(name, planned.reads, kept, planned.macs, planned.bypassed, computed))
    return tuple(variants)


def _value(graph: Graph, name: str, site: Site, dtype: torch.dtype) -> Value:
    node = site_nodes(graph.fx)[name]
    shape = graph.dims.expressions(node.meta["val"], node.meta["probe"])
    if "?" in shape or node.meta["val"].dtype != dtype:
        raise ExportError(
            f"what is inherited has shape {shape} and dtype {node.meta['val'].dtype}, which is not covered",
            where=name,
            hint="choose another site",
        )
    order = cast(Order, site.forecast.memory - 1)
    forecast = order if order <= 2 and site.forecast == Polynomial(order) else str(site.forecast)
    return Value(name, str(site.schedule), forecast, shape, site.invariant, site.bypassed)
