"""Decisions of the traced code by sizes of the call become guards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

import sdgraph
from sdgraph.compiler.numerics import run
from sdgraph.errors import CallError, TraceError
from sdgraph.ir.guards import check_call

from ..models import (
    answer,
    build,
    call_of,
    same,
    trace,
)


def checked(graph: sdgraph.Graph, **values: torch.Tensor) -> torch.Tensor:
    check_call(graph.resolved_inputs(), graph.guards, values, torch.float32)
    return run(graph, values)


def test_a_decision_on_a_size_becomes_a_guard() -> None:
    def code(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[1] > 1000 else x + 1

    graph = sdgraph.trace_code(code, x=("B", "L"))
    (guard,) = graph.guards
    assert (guard.condition, guard.outcome) == ("L > 1000", False)
    assert "test_guards.py" in guard.where
    x = torch.randn(2, 1000)
    assert torch.equal(checked(graph, x=x), code(x))
    with pytest.raises(CallError, match=r"L > 1000 is False; here L=1001\n.*test_guards.py"):
        checked(graph, x=torch.randn(2, 1001))


def test_guards_on_what_is_computed_from_sizes() -> None:
    def code(x: torch.Tensor) -> torch.Tensor:
        side = x.shape[2] * x.shape[3]
        return x * 2 if side + 1 >= 100000 else x

    graph = sdgraph.trace_code(code, x=("B", 3, "H", "W"))
    assert torch.equal(checked(graph, x=torch.ones(1, 3, 9, 9)), torch.ones(1, 3, 9, 9))
    with pytest.raises(CallError, match="H=400, W=250"):
        checked(graph, x=torch.ones(1, 3, 400, 250))


class Sizing(AttnProcessor):
    """A processor that does something else for long sequences."""

    limit = 10**6

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        scale = 2 if hidden_states.shape[1] > self.limit else 1
        return super().__call__(attn, hidden_states * scale, *args, **kwargs)


def test_a_processor_that_branches_on_size_is_guarded_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = build()
    unet.set_attn_processor(Sizing())
    graph = trace(unet, processors=(Sizing,))
    assert same(unet, graph, H=9)
    with pytest.raises(CallError, match=r"H\*W > 1000000 is False; here H=1001, W=1000"):
        answer(graph, call_of(unet, B=1, H=1001, W=1000))
    monkeypatch.setattr(Sizing, "limit", 100)
    with pytest.raises(TraceError, match=r"takes another branch.*\n.*attn1"):
        sdgraph.trace(unet, processors=(Sizing,))
