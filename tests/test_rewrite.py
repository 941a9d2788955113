"""Rewrites: what matches, what almost does and why, and what takes its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sdgraph
from sdgraph import Contract, Example, NoMatch, Rewrite
from sdgraph.errors import ContractError, NoChangeError, ShapeError
from sdgraph.passes import CleanUp, clean_up
from sdgraph.runner import run_pass
from sdgraph.testing import check, check_examples

from .models import answer, build, call_of


@dataclass(frozen=True)
class FuseScales(Rewrite):
    """`x * a * b` with constants is one product."""

    contract: ClassVar[Contract] = Contract.CLOSE
    examples: ClassVar[tuple[Example, ...]] = (
        Example(lambda x: x * 2.0 * 3.0, {"x": ("B", 4)}),
        Example(lambda x: x * 2.0 + 3.0, {"x": ("B", 4)}, changes=False),
    )

    def pattern(self, x: Any, a: Any, b: Any) -> Any:
        return x * a * b

    def check(self, x: Any, a: Any, b: Any) -> None:
        if not isinstance(a, float) or not isinstance(b, float):
            raise NoMatch("both factors must be constants")

    def replace(self, x: Any, a: Any, b: Any) -> Any:
        return x * (a * b)


@dataclass(frozen=True)
class FuseSilu(Rewrite):
    """`x * sigmoid(x)`: one value bound twice."""

    contract: ClassVar[Contract] = Contract.CLOSE

    def pattern(self, x: Any) -> Any:
        return x * torch.sigmoid(x)

    def replace(self, x: Any) -> Any:
        return F.silu(x)


@dataclass(frozen=True)
class NormThenLinear(Rewrite):
    """Two leaf modules, found by class and used again in the replacement."""

    contract: ClassVar[Contract] = Contract.EXACT

    def pattern(self, x: Any, norm: nn.LayerNorm, linear: nn.Linear) -> Any:
        return linear(norm(x))

    def replace(self, x: Any, norm: nn.LayerNorm, linear: nn.Linear) -> Any:
        return F.linear(norm(x), linear.weight, linear.bias)


@dataclass(frozen=True)
class WrongShape(Rewrite):
    def pattern(self, x: Any) -> Any:
        return torch.sigmoid(x)

    def replace(self, x: Any) -> Any:
        return torch.cat([x, x])


def graph_of(code: Any, **shapes: Any) -> sdgraph.Graph:
    return sdgraph.trace_code(code, **(shapes or {"x": ("B", 4)}))


def test_examples_are_run() -> None:
    check(FuseScales())

    @dataclass(frozen=True)
    class Wrong(FuseScales):
        examples = (Example(lambda x: x * 2.0 + 3.0, {"x": ("B", 4)}),)

    with pytest.raises(ContractError, match="example 0 of Wrong should change"):
        check_examples(Wrong())


def test_one_value_bound_twice_and_either_order() -> None:
    for code in (lambda x: x * torch.sigmoid(x), lambda x: torch.sigmoid(x) * x):
        after, _ = run_pass(FuseSilu(), graph_of(code), verify=True)
        assert [n.target for n in after.nodes if n.op == "call_function"] == [F.silu]
    with pytest.raises(NoChangeError, match="x would be both"):
        run_pass(FuseSilu(), graph_of(lambda x, y: x * torch.sigmoid(y), x=("B", 4), y=("B", 4)), verify=True)


def test_near_misses_carry_their_reason() -> None:
    with pytest.raises(NoChangeError, match="is used elsewhere too, by sin"):
        run_pass(FuseSilu(), graph_of(lambda x: (s := torch.sigmoid(x)) * x + s.sin()), verify=False)
    after, report = run_pass(FuseScales(), graph_of(lambda x: (x * 2.0 * 3.0) + (x * x.sum() * 3.0)), verify=True)
    assert len(report.edits) == 1
    assert any("both factors must be constants" in m.reason for m in report.near_misses)
    assert all(m.where for m in report.near_misses)
    assert after.output.name == "add"


def test_defaults_need_not_be_written() -> None:
    """diffusers writes `attn_mask=None, dropout_p=0.0, is_causal=False`; a pattern need not."""

    @dataclass(frozen=True)
    class DoubleValues(Rewrite):
        contract: ClassVar[Contract] = Contract.CLOSE

        def pattern(self, q: Any, k: Any, v: Any) -> Any:
            return F.scaled_dot_product_attention(q, k, v)

        def replace(self, q: Any, k: Any, v: Any) -> Any:
            return F.scaled_dot_product_attention(q, k, v * 2) / 2

    unet = build("sd15")
    attentions = sum(n.target is F.scaled_dot_product_attention for n in sdgraph.trace(unet).nodes)
    assert len(sdgraph.apply(unet, [DoubleValues()]).report.passes[0].edits) == attentions > 0

    causal = graph_of(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), x=("B", 1, "L", 4))
    with pytest.raises(NoChangeError, match="is called with other arguments"):
        run_pass(DoubleValues(), causal, verify=False)


def test_modules_match_by_class_and_keep_their_weights() -> None:
    unet = build("sd15")
    fused = sdgraph.apply(unet, [NormThenLinear()])
    call = call_of(unet)
    assert torch.equal(answer(fused, call), answer(unet, call))
    assert fused.state_dict().keys() == unet.state_dict().keys()
    assert any(n.target is F.linear for n in fused.graph.nodes)


def test_a_replacement_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match="the new value is"):
        run_pass(WrongShape(), graph_of(lambda x: torch.sigmoid(x)), verify=False)


@pytest.mark.parametrize("one", CleanUp().passes, ids=lambda p: type(p).__name__)
def test_clean_up_s_own_examples(one: Rewrite) -> None:
    assert one.examples
    check(one)


@pytest.mark.parametrize("name", ["sd15", "sd21", pytest.param("sdxl", marks=pytest.mark.slow), "lcm"])
def test_clean_up_is_exact_and_final(name: str) -> None:
    unet = build(name)
    clean = sdgraph.apply(unet, [CleanUp()])
    for sizes in ({"B": 2}, {"B": 3, "H": 9, "W": 7, "L": 2}):
        call = call_of(unet, **sizes)
        assert torch.equal(answer(clean, call), answer(unet, call))
    assert len(clean.graph.nodes) < len(sdgraph.trace(unet).nodes)
    again = sdgraph.apply(clean, [CleanUp()])
    assert len(again.graph.nodes) == len(clean.graph.nodes)
    left = {type(m).__name__ for m in clean.modules()}
    assert "Dropout" not in left
    for dtype in (torch.bfloat16, torch.float64):  # a cast that mattered in another dtype is still there
        call = call_of(unet.to(dtype))
        assert torch.equal(answer(clean.to(dtype), call), answer(unet, call))


def test_clean_up_leaves_dropout_that_matters() -> None:
    unet = build("sd15", dropout=0.1)
    clean = sdgraph.apply(unet, [CleanUp()])
    assert any(isinstance(m, nn.Dropout) for m in clean.modules())
    misses = [m for child in clean.report.passes for m in child.near_misses]
    assert any("p is 0.1" in m.reason for m in misses)
    assert clean_up.RemoveDropout().contract == Contract.EXACT
