"""A chain of small prunings, each taught by the student before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from ..compiler.passes import Pass, as_passes
from ..errors import TuningError
from ..options import Count, Text, checked
from ..runtime.apply import apply
from ..runtime.unet import GraphUNet
from .checks import check_output
from .report import TuningReport
from .sources import Source, as_source
from .tune import alone, tune


@checked(TuningError)
def chain(
    teacher: GraphUNet | UNet2DConditionModel,
    passes: Sequence[Pass | str],
    data: Source | Iterable[Mapping[str, Tensor]],
    *,
    steps: Count | None = None,
    out: Text | Path,
    **options: Any,
) -> tuple[GraphUNet, tuple[TuningReport, ...]]:
    """Apply passes one after the other, and tune after each of them; the result of a link teaches the next.

    Args:
        teacher: the first teacher.
        passes: the passes of the links, in order.
        data: see `sdgraph.tune`.
        steps: the number of optimizer steps of every link; or else `num_train_epochs` says how long a link is.
        out: the folder of the runs: `link-1/`, `link-2/`, ...
        options: further arguments of `sdgraph.tune`.
    Returns:
        The last student, and the logs of all links.
    Raises:
        TuningError: there are no passes.
    Example:
        `chain(unet, ["PruneBlocks('mid_block')", "PruneBlocks('bk-sdm-base')"], data, **options)`
    Source:
        Fang et al., "TinyFusion", 2025: a student of a student recovers better than one that was cut at once.
    """
    if not passes:
        raise TuningError("a chain has no passes", where="passes", hint="pass at least one")
    source = as_source(data)
    check_output(Path(out), [teacher], source)
    links = [as_passes(link) for link in passes]
    last = apply(teacher, (), verify=False)
    apply(last, [one for link in links for one in link], verify=False)  # what cannot be applied is refused at once
    reports = []
    with alone(Path(out)):
        for number, link in enumerate(links, 1):
            student = apply(last, link, verify=False)
            last, report = tune(student, last, source, steps=steps, out=Path(out) / f"link-{number}", **options)
            reports.append(report)
    return last, tuple(reports)
