"""Rewrites: what matches, what almost does and why, and what takes its place."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sdgraph
from sdgraph import Contract, Example, NoMatch, PassReport, Rewrite
from sdgraph.compiler.runner import run_pass
from sdgraph.errors import ContractError, ModeError, NoChangeError, PassError, ShapeError, SpecError
from sdgraph.testing import check, check_examples

from ..models import answer, build, call_of


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


def replaced(report: PassReport) -> int:
    return sum(edit.kind == "replaced" for edit in report.edits)


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
    assert [edit.kind for edit in report.edits] == ["replaced", "erased"]
    assert any("both factors must be constants" in m.reason for m in report.near_misses)
    assert all(m.where for m in report.near_misses)
    assert after.output.name == "add"


@pytest.mark.slow
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
    assert replaced(sdgraph.apply(unet, [DoubleValues()]).report.passes[0]) == attentions > 0

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


# -- functions and modules, and what a pattern may be -----------------------------------------------------------------


def rewrite(code: Any, to: Any = None, **attributes: Any) -> Rewrite:
    """A rewrite of one pattern, which by default becomes itself plus zero."""
    made = type("Made", (Rewrite,), {"pattern": code, "replace": to or code, **attributes})
    return dataclass(frozen=True)(made)()  # type: ignore[no-any-return]


def test_a_function_matches_the_modules_that_are_nothing_but_a_call_of_it() -> None:
    unet = build("sd15")
    graph = sdgraph.trace(unet)
    calls = [n for n in graph.nodes if n.op == "call_module" and isinstance(graph.module(n.target), nn.SiLU)]
    hard = sdgraph.apply(unet, [rewrite(lambda self, x: F.silu(x), lambda self, x: F.hardswish(x))])
    assert replaced(hard.report.passes[0]) == len(calls) > 5
    assert not any(isinstance(m, nn.SiLU) for m in hard.modules())
    assert hard.graph.region("conv_act").output.target is F.hardswish


@pytest.mark.parametrize(
    ("module", "code", "changes"),
    [
        (nn.GELU(), lambda self, x: F.gelu(x), True),
        (nn.GELU("tanh"), lambda self, x: F.gelu(x), False),
        (nn.GELU("tanh"), lambda self, x: F.gelu(x, approximate="tanh"), True),
        (nn.Softmax(-1), lambda self, x: F.softmax(x, -1), True),
        (nn.Softmax(1), lambda self, x: F.softmax(x, -1), False),
        (nn.Sigmoid(), lambda self, x: torch.sigmoid(x), True),
        (nn.Dropout(0.0).eval(), lambda self, x: F.dropout(x, 0.0, False), False),  # only while it is not trained
        (nn.ReLU(), lambda self, x: F.silu(x), False),
    ],
)
def test_options_of_modules_are_arguments_of_functions(module: nn.Module, code: Any, changes: bool) -> None:
    one = rewrite(code, lambda self, x: x * 1, contract=Contract.APPROXIMATE)
    graph = sdgraph.trace_code(nn.Sequential(module), x=("B", 4))
    if changes:
        assert replaced(run_pass(one, graph, verify=True)[1]) == 1
    else:
        with pytest.raises(NoChangeError):
            run_pass(one, graph, verify=True)


def test_modules_with_weights_are_counted_and_the_cure_is_told() -> None:
    graph = sdgraph.trace(build("sd15"))
    linears = sum(isinstance(m, nn.Linear) for m in graph.weights.modules())
    with pytest.raises(NoChangeError, match=f"{linears} of these: a module nn.Linear, which has weights") as caught:
        run_pass(rewrite(lambda self, x, w, b: F.linear(x, w, b)), graph, verify=False)
    assert "time_embedding.linear_1" in caught.value.where
    assert "annotated nn.Linear" in caught.value.where
    with pytest.raises(NoChangeError, match=r"expected group_norm, found .*norm1, a module nn\.GroupNorm, which"):
        run_pass(rewrite(lambda self, x, w, b: F.silu(F.group_norm(x, 4, w, b))), graph, verify=False)


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        (lambda self, x: (x.sin(), x.cos()), SpecError, "the pattern of Made returns a tuple"),
        (lambda self, x: None, SpecError, "the pattern of Made returns a NoneType"),
        (lambda self, x: x, SpecError, "the pattern of Made returns one of its parameters"),
        (lambda self, x, y: x.sin(), SpecError, "does not use its parameter 'y'"),
        (lambda self, x: x.sin() if x.sum() > 0 else x.cos(), PassError, "symbolically traced variables"),
    ],
)
def test_patterns_that_cannot_be(pattern: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        run_pass(rewrite(pattern), graph_of(lambda x: x.sin()), verify=False)
    assert "Made()" in str(caught.value)


def test_an_error_in_check_or_replace_names_its_line_and_the_node() -> None:
    for method in ("check", "replace"):
        line = 1 + inspect.currentframe().f_lineno  # type: ignore[union-attr]
        one = rewrite(lambda self, x: x.sin(), lambda self, x: x.cos(), **{method: lambda self, x: {}[str(x)]})
        with pytest.raises(PassError, match=r"Made\(\) failed: KeyError") as caught:
            run_pass(one, graph_of(lambda x: (x + 1).sin()), verify=False)
        assert f"test_rewrite.py:{line}, with x = add of the top level" in caught.value.where


@dataclass(frozen=True)
class DropSmall(Rewrite):
    """Replaces convolutions whose weights are small by what went in."""

    by_weights: ClassVar[bool] = True
    below: float = 0.0

    def pattern(self, x: Any, conv: nn.Conv2d) -> Any:
        return conv(x)

    def check(self, x: Any, conv: nn.Conv2d) -> None:
        if conv.in_channels != conv.out_channels or conv.stride != (1, 1):
            raise NoMatch("it changes the shape")
        if (largest := conv.weight.abs().max().item()) >= self.below:
            raise NoMatch(f"its largest weight is {largest:.3f}")

    def replace(self, x: Any, conv: nn.Conv2d) -> Any:
        return x * 1.0


@pytest.mark.slow
def test_a_check_that_reads_weights_is_recorded(tmp_path: Path) -> None:
    unet = build("sd15")
    convs = [m for m in unet.modules() if isinstance(m, nn.Conv2d) and m.stride == (1, 1)]
    largest = sorted(m.weight.abs().max().item() for m in convs if m.in_channels == m.out_channels)
    one = DropSmall(largest[len(largest) // 2])
    made = sdgraph.apply(unet, [one])
    assert replaced(made.report.passes[0]) == len(largest) // 2 > 0
    made.save_pretrained(tmp_path / "unet")
    call = call_of(unet)
    assert torch.equal(answer(sdgraph.GraphUNet.from_pretrained(tmp_path / "unet"), call), answer(made, call))

    @dataclass(frozen=True)
    class Unrecorded(DropSmall):
        by_weights: ClassVar[bool] = False

    with pytest.raises(ModeError, match="needs the numbers of weights") as caught:
        sdgraph.apply(unet, [Unrecorded(one.below)]).save_pretrained(tmp_path / "other")
    assert "test_rewrite.py:" in caught.value.where
    assert "by_weights = True" in caught.value.hint
