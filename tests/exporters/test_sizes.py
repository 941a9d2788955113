"""Numbers from the sizes of a call are the same in eager code, in its graph and in ONNX Runtime, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import torch
from torch import fx

import sdgraph
from sdgraph.errors import TraceError
from sdgraph.exporters.onnx import translate

COMPUTED: dict[str, Callable[[Any], Any]] = {
    "h + 1": lambda h: h + 1,
    "200 - h": lambda h: 200 - h,
    "h // 2": lambda h: h // 2,
    "-(-h // 2)": lambda h: -(-h // 2),
    "h // -2": lambda h: h // -2,
    "(3 - h) // 2": lambda h: (3 - h) // 2,
    "h % 3": lambda h: h % 3,
    "(3 - h) % 5": lambda h: (3 - h) % 5,
    "h ** 2": lambda h: h**2,
    "h << 1": lambda h: h << 1,
    "h >> 1": lambda h: h >> 1,
    "4096 >> h // 64": lambda h: 4096 >> (h // 64),
    "1 << h // 32": lambda h: 1 << (h // 32),
    "h & 7": lambda h: h & 7,
    "~h": lambda h: ~h,
    "divmod": lambda h: sum(divmod(h, 5)),
    "divmod by": lambda h: sum(divmod(200, h)),
    "h // 64": lambda h: h // 64,  # the same at both sizes of a trace
    "h // h": lambda h: h // h,
    "h / 2": lambda h: h / 2,
    "sym_max": lambda h: torch.sym_max(h, 8),
}
REFUSED: dict[str, Callable[[Any], Any]] = {
    "h | 1": lambda h: h | 1,
    "h ^ 1": lambda h: h ^ 1,
    "h & 5": lambda h: h & 5,
    "h << -1": lambda h: h << -1,
    "ceil": lambda h: math.ceil(h / 2),
    "sqrt": math.sqrt,
    "isqrt": math.isqrt,
    "round": lambda h: round(h / 2),
    "int": lambda h: int(h / 2),
    "float": float,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_sizes(name: str) -> None:
    def code(x: torch.Tensor) -> torch.Tensor:
        return x * COMPUTED[name](x.shape[2])

    graph = sdgraph.trace_code(code, x=("B", 4, "H", "W"))
    module = fx.GraphModule(graph.weights, graph.fx)
    model = translate.translate(translate.capture(module, {"x": torch.randn(2, 4, 9, 7)}, graph.inputs), 20)
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    for height in (6, 16, 33, 130):
        x = torch.randn(3, 4, height, 5)
        assert torch.equal(module(x), code(x))
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert torch.allclose(torch.from_numpy(found), code(x))


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_computes_from_sizes(name: str) -> None:
    with pytest.raises(TraceError):
        sdgraph.trace_code(lambda x: x * REFUSED[name](x.shape[2]), x=("B", 4, "H", "W"))
