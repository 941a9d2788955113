"""The exported model against eager: the calls compared, the bounds, the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from sdgraph.errors import ParityError
from sdgraph.views.format import format_table

FORMAT = 1  # of the file of a report
# Largest difference allowed, as (atol, rtol) with rtol of the largest eager value. fp32 differs by the order of
# summation only, about 1e-6; fp16 rounds to 1e-3 at each of hundreds of operations, in different places; bf16 has three
# bits fewer.
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.float16: (1e-3, 2e-2), torch.bfloat16: (8e-3, 1e-1)}


@dataclass(frozen=True)
class Comparison:
    """The comparison of an exported model with eager PyTorch at one call.

    Args:
        model: the file.
        shapes: the shapes of the inputs, by name.
        largest: largest absolute value of the eager output that is the furthest off, by its bound.
        difference: largest absolute difference of that one.
        bound: the largest difference that is allowed.
        provider: the provider of ONNX Runtime that ran the model.
        precision: the dtype that it computed in.
    """

    model: str
    shapes: dict[str, tuple[int, ...]]
    largest: float
    difference: float
    bound: float
    provider: str = "CPUExecutionProvider"
    precision: str = "float32"

    @property
    def holds(self) -> bool:
        return self.difference <= self.bound  # not so for nan


@dataclass(frozen=True)
class Quantization:
    """The quantisation of a bundle, as the report of an export has it.

    Args:
        strategy: the `Quantize` as text.
        layers: the number of layers by mode, "static", "dynamic" and "float", in the variant that computes everything.
        psnr: the mean PSNR of the final latents of the held-out prompts to those of float, in dB.
        worst: the lowest of them, in dB.
        prompts: the number of held-out prompts.
    """

    strategy: str
    layers: dict[str, int] = field(default_factory=dict)
    psnr: float = math.nan
    worst: float = math.nan
    prompts: int = 0

    def __str__(self) -> str:
        layers = ", ".join(f"{count} layers {mode}" for mode, count in self.layers.items())
        quality = f"{self.psnr:.1f} dB to float, {self.worst:.1f} at worst, on {self.prompts} held-out prompts"
        return f"8 bits: {self.strategy}\n{layers}; {quality}"


@dataclass(frozen=True)
class ExportReport:
    """The files of an export, and their comparison with eager. It prints as a table; `as_dict()` is plain data.

    Args:
        nodes: the number of operators in each ONNX graph, by file.
        weight_bytes: the bytes of the UNet's parameters.
        file_bytes: the bytes of the models, their weights, configuration and manifest on disk.
        comparisons: the comparisons, one per model and shape.
        seconds: the wall time of each stage, in seconds.
        fused: the number of places at which each lowering applied.
        quantization: the layers in 8 bits and their quality; None for models in float.
    """

    nodes: dict[str, int]
    weight_bytes: int
    file_bytes: int
    comparisons: tuple[Comparison, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    quantization: Quantization | None = None

    def __str__(self) -> str:
        rows = [("model", "nodes", "sample", "on", "largest |eager|", "difference", "bound", "")]
        for c in self.comparisons:
            size = "x".join(map(str, c.shapes["sample"]))
            verdict = "ok" if c.holds else "OUT OF BOUNDS"
            figures = (f"{c.largest:.3g}", f"{c.difference:.3g}", f"{c.bound:.3g}")
            on = f"{c.provider} in {c.precision}"
            rows.append((c.model, str(self.nodes[c.model]), size, on, *figures, verdict))
        took = ", ".join(f"{stage} {s:.1f} s" for stage, s in self.seconds.items())
        size = f"{self.file_bytes / 1e6:.1f} MB for {self.weight_bytes / 1e6:.1f} MB of weights"
        fused = [", ".join(f"{name} {count}" for name, count in self.fused.items())] if self.fused else []
        bits = [] if self.quantization is None else [str(self.quantization)]
        return "\n".join([format_table(rows), *fused, *bits, size, took])

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain data."""
        return asdict(self)

    def json(self) -> str:
        """Return the report as JSON."""
        return json.dumps({"format": FORMAT, **self.as_dict()}, indent=2) + "\n"


def compare(
    model: str,
    eager: Sequence[torch.Tensor],
    exported: Sequence[torch.Tensor],
    call: Mapping[str, torch.Tensor],
    atol: float,
    rtol: float,
    on: tuple[str, str],
) -> Comparison:
    """The largest distance of the outputs of an exported model from those of eager PyTorch.

    Args:
        on: the provider of ONNX Runtime and its precision.
    """
    shapes = {name: tuple(value.shape) for name, value in call.items()}
    comparisons = []
    for mine, other in zip(eager, exported, strict=True):
        largest = float(mine.abs().max())
        same = mine.shape == other.shape
        difference = float((mine.cpu().double() - other.cpu().double()).abs().max()) if same else float("nan")
        comparisons.append(Comparison(model, shapes, largest, difference, atol + rtol * largest, *on))
    worst = max(comparisons, key=lambda comparison: comparison.difference - comparison.bound)
    return next((comparison for comparison in comparisons if not comparison.holds), worst)


def require(report: ExportReport, choosing: int = 0) -> None:
    """Refuse a report that is out of bounds.

    Args:
        choosing: how many operators choose by values, such as a sort.
    Raises:
        ParityError: with the table.
    """
    for comparison in report.comparisons:
        if not comparison.largest < float("inf"):
            raise ParityError(
                "the UNet itself gives values that are not finite on random inputs",
                where=f"shapes {comparison.shapes}",
                hint="in float16 it overflows: export it in float32",
            )
        if not comparison.holds:
            sorts = f"; {choosing} operators choose by values, as a sort does: where two nearly agree, rounding decides"
            raise ParityError(
                f"the exported model is out of bounds against eager\n{report}",
                where=f"{comparison.model} at {comparison.shapes}, {comparison.provider} in {comparison.precision}",
                hint="nothing was written; pass atol= and rtol= if this difference is acceptable, else report it"
                + sorts * bool(choosing),
            )
