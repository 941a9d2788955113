"""Operators: what torch translates, what is translated here, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import torch

from sdgraph import errors
from sdgraph.exporters.onnx import export, parity, translate
from sdgraph.exporters.onnx.simplify import simplify

from .exports import Exported

pytestmark = pytest.mark.slow


class Calls(torch.nn.Module):
    def __init__(self, code: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.code = code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(x)


def test_operators_that_passes_may_bring() -> None:
    def program(code: Callable[[torch.Tensor], torch.Tensor]) -> torch.export.ExportedProgram:
        made = torch.export.export(Calls(code), (torch.rand(4, 3),))
        simplify(made.graph)
        return made

    decomposed = translate.translate(program(torch.special.entr), 20)
    assert "entr" not in {node.op_type for node in decomposed.graph}
    with pytest.raises(errors.ExportError, match=r"No ONNX function found for .*rrelu"):
        translate.translate(program(torch.nn.functional.rrelu), 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
@pytest.mark.parametrize("include_self", [True, False])
def test_what_torch_translates_wrongly_or_not_at_all(dtype: torch.dtype, include_self: bool) -> None:
    """Means that are scattered, which became the last value; sorts, for which everything was decomposed."""
    place = torch.tensor([[0, 2, 2, 0, 2]])
    own, source = (torch.tensor(values).to(dtype) for values in ([[7.0, 5, -3]], [[2.0, -9, 4, 4, 8]]))

    class Codes(torch.nn.Module):
        def forward(self, own: torch.Tensor, place: torch.Tensor, source: torch.Tensor) -> Any:
            mean = own.scatter_reduce(1, place, source, "mean", include_self=include_self)
            total = own.scatter_add(1, place, source)
            order = source.argsort(1, descending=True)  # -9 4 4: the first 4 comes first
            values, back = torch.sort(order, dim=1, stable=True)
            return mean, total, order, values, back, (source > 3).argsort(dim=1, stable=True)

    program = torch.export.export(Codes(), (own, place, source))
    simplify(program.graph)
    model = translate.translate(program, 20)
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    given = {value.name: tensor.numpy() for value, tensor in zip(model.graph.inputs, (own, place, source), strict=True)}
    for mine, theirs in zip(session.run(None, given), Codes()(own, place, source), strict=True):
        torch.testing.assert_close(torch.from_numpy(mine), theirs)


def test_what_onnx_runtime_cannot_run_is_said(
    exported: Callable[..., Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("MLFloat16 data type is not supported")

    monkeypatch.setattr("sdgraph.exporters.ort.sessions.run", fail)
    with pytest.raises(errors.ExportError, match=r"cannot run it: MLFloat16"):
        export(exported("sd15").unet, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_says_that_a_sort_decides_by_rounding(exported: Callable[..., Exported]) -> None:
    report = exported("sd15").report
    beyond = replace(report, comparisons=(replace(report.comparisons[0], bound=0.0),))
    with pytest.raises(errors.ParityError, match="3 operators choose by values"):
        parity.require(beyond, choosing=3)
    with pytest.raises(errors.ParityError, match=r"else report it$"):
        parity.require(beyond)
