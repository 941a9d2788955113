"""`apply`: trace, run passes, hand back a UNet."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

import torch
from diffusers import UNet2DConditionModel

from ..compiler.numerics import generations, largest_difference, run
from ..compiler.passes import Pass, as_passes
from ..compiler.report import Report
from ..compiler.runner import check_order, run_pass
from ..contract import Contract
from ..errors import ContractError, SourceError
from ..frontend.call import unflatten
from ..frontend.capture import trace, undisturbed
from ..graph import Graph
from ..ir.read_only import read_only
from ..options import checked
from ..progress import Bar
from .unet import GraphUNet

log = logging.getLogger("sdgraph")


@checked(SourceError)
def apply(
    unet: Annotated[UNet2DConditionModel | GraphUNet | Graph, Any],
    passes: Annotated[str | Pass | Iterable[str | Pass], Any] = (),
    *,
    verify: bool = True,
    inputs: Collection[str] = (),
    processors: Collection[type] = (),
    progress: bool = False,
) -> GraphUNet:
    """Trace a UNet, run passes over its graph, and return a module that takes the UNet's place.

    Args:
        unet: a diffusers UNet, or the result of an earlier `apply` or `trace`. It is not changed.
        passes: passes, or text specs such as `"PruneBlocks('bk-sdm-base')"`, in order.
        verify: check numbers as well as structure: the trace against the source, and every pass against its contract.
        inputs: see `trace`.
        processors: see `trace`.
        progress: show a progress bar over the passes.
    Returns:
        a `GraphUNet`; its `report` says what each pass did.
    Raises:
        SdgraphError: a subclass by cause; nothing is half done.
    Example:
        `pipe.unet = sdgraph.apply(pipe.unet, "CleanUp, InheritFeatures.damped(2)")`
    """
    with undisturbed("apply"):
        chosen = as_passes(passes)
        if isinstance(unet, GraphUNet):
            unet.check_unaltered()
            graph, notes, done = unet.graph.copy(), unet.report.notes, unet.report.passes
            graph.follow_weights()
        elif isinstance(unet, Graph):
            graph, notes, done = unet.copy(), (), ()
        else:
            graph, notes, done = trace(unet, inputs=inputs, processors=processors), (), ()
            if verify:
                notes = (_check_trace(unet, graph),)
        check_order(graph.passes, chosen)
        reports = list(done)
        for one in Bar(chosen, desc="passes", unit="pass", disable=not progress):
            graph, report = run_pass(one, graph, verify)
            log.info("%s: %d -> %d nodes in %.2f s", one, report.before.nodes, report.after.nodes, report.seconds)
            reports.append(report)
        return GraphUNet(graph, Report(tuple(reports), notes))


def _check_trace(unet: UNet2DConditionModel, graph: Graph) -> str:
    """Compare a trace with its source at two sizes, with the optional inputs and without."""
    noises, figures = [], []
    for generation in generations(graph):
        flat = _whole_lists(generation[0], graph)
        expected, actual = _answer(unet, graph, flat), run(graph, flat)
        if Contract.EXACT.holds(expected, actual):
            continue
        noise = largest_difference(expected, _answer(unet, graph, flat))
        figure = largest_difference(expected, actual)
        if not figure <= 4 * noise:  # some GPU kernels do not repeat; then their own noise is the bound
            raise ContractError(
                f"the trace differs from the UNet by {figure:.3g}",
                where=f"trace, called with {', '.join(f'{n} {tuple(v.shape)}' for n, v in flat.items())}",
                hint="this is a defect of sdgraph or state inside the UNet; please report it with the config",
            )
        noises.append(noise)
        figures.append(figure)
    if figures:
        return f"trace: within {max(figures):.3g} of the source, whose own noise is {max(noises):.3g}"
    return "trace: bit for bit equal to the source"


def _whole_lists(flat: Mapping[str, torch.Tensor], graph: Graph) -> dict[str, torch.Tensor]:
    """Leave out residuals of which not all are there: some have sizes that are not known as expressions."""
    parts: dict[str, list[str]] = {}
    for spec in graph.inputs:
        if spec.optional:
            controls = spec.place[0] in ("down_block_additional_residuals", "mid_block_additional_residual")
            parts.setdefault("controls" if controls else str(spec.place[0]), []).append(spec.name)
    missing = {name for names in parts.values() if not flat.keys() >= set(names) for name in names}
    return {name: value for name, value in flat.items() if name not in missing}


def _answer(unet: UNet2DConditionModel, graph: Graph, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), read_only(graph.tensors(), _edits_itself):
        return unet(**unflatten(flat, graph.inputs), return_dict=False)[0]  # type: ignore[no-any-return]


def _edits_itself(name: str) -> SourceError:
    return SourceError("the code of the UNet edits this weight when it is called", where=name, hint="call unet.eval()")
