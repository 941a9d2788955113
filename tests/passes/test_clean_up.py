"""`CleanUp` on small graphs of every kind of value: what it removes, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sdgraph
from sdgraph import Contract, Rewrite
from sdgraph.compiler.numerics import example, run
from sdgraph.compiler.runner import run_pass
from sdgraph.passes import CleanUp, clean_up
from sdgraph.testing import check

from ..models import answer, build, call_of, statements


class Identities(nn.Module):
    """A size and a pair of tensors through `nn.Identity`."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.identity((x.sin(), x.cos()))
        return (a + b).reshape(self.identity(x.shape[0]), 2, 2)


REMOVED: dict[str, Callable[..., Any]] = {
    "a number times one": lambda x: x.sin() * 1,
    "a number times one point nought": lambda x: 1.0 * x.sin(),
    "a number times true": lambda x: x.sin() * True,
    "a scalar times one": lambda x: x.sum() * 1 + x,
    "an integer times one": lambda x: x.argsort() * 1 + x,
    "a boolean times true": lambda x: (x > 0) * True + x,
    "a number of fixed dtype times one": lambda x: (x.double() * 1).to(x.dtype),
    "a complex number times one": lambda x: (torch.complex(x.float(), x.float()) * 1).real.to(x.dtype),
    "a number by one": lambda x: x.sin() / 1,
    "a complex number by one": lambda x: (torch.complex(x.float(), x.float()) / 1.0).real.to(x.dtype),
    "a cast of integers": lambda x: x.argsort().to(torch.int64) + x,
    "a cast of a boolean": lambda x: (x > 0).to(torch.bool) * x,
}
LEFT_ALONE: dict[str, Callable[..., Any]] = {
    "an integer times one point nought": lambda x: (x.argsort() * 1.0) / 3 + x,
    "an integer of two products": lambda x: (lambda a: a * 1 + a * 1.0 + x)(x.argsort()),
    "a boolean times one": lambda x: ((x > 0) * 1).sum() + x,
    "a number times a complex one": lambda x: (x.float() * (1 + 0j)).real.to(x.dtype),
    "an integer by one": lambda x: x.argsort() / 1 + x,
    "a number by a complex one": lambda x: (x.float() / (1 + 0j)).real.to(x.dtype),
    "a size times one": lambda x: x.reshape(x.shape[0] * 1, 2, 2),
    "a size times one point nought": lambda x: x * (x.shape[0] * 1.0),
    "a size by one": lambda x: x * (x.shape[0] / 1),
    "a strided view times one": lambda x: (x[:, ::2] * 1).view(-1),
    "an expanded view times one": lambda x: (x[:, None].expand(-1, 3, -1) * 1).view(-1),
    "a strided view by one": lambda x: (x[:, ::2] / 1.0).view(-1),
    "a tensor of ones, which broadcasts": lambda x: x.sin() * torch.ones(3, 1, 4),
    "a cast and back": lambda x: x.sin().to(torch.bfloat16).to(x.dtype),
    "a cast that copies": lambda x: x.sin().to(x.dtype, copy=True),
    "identities of what is no tensor": Identities(),
}


def test_what_computes_nothing_is_removed() -> None:
    before = sdgraph.trace_code(lambda x: (x.sin() * 1).to(x.dtype) / 1.0 + 0, x=("B", 4))
    assert statements(before) == [
        "e0 = sin(x)",
        "e1 = mul(e0, 1)",
        "e2 = to(e1, x.dtype)",
        "e3 = div(e2, 1.0)",
        "e4 = add(e3, 0)",  # which turns -0.0 into 0.0
        "return e4",
    ]
    after, _ = run_pass(CleanUp(), before, verify=True)
    assert statements(after) == ["e0 = sin(x)", "e1 = add(e0, 0)", "return e1"]


@pytest.mark.parametrize("name", [*REMOVED, *LEFT_ALONE])
def test_every_kind_of_value_is_what_it_was(name: str) -> None:
    """Shape, dtype and every bit, in two dtypes of the model; and nothing that would change them is removed."""
    before = sdgraph.trace_code({**REMOVED, **LEFT_ALONE}[name], x=("B", 4))
    after, _ = run_pass(CleanUp(), before, verify=True)
    assert (len(after.nodes) < len(before.nodes)) == (name in REMOVED)
    for dtype in (torch.float32, torch.float16):
        flat = {key: value.to(dtype) for key, value in example(before).items()}
        was, now = run(before, flat), run(after, flat)
        assert was.dtype == now.dtype
        assert torch.equal(was, now)


@pytest.mark.parametrize("one", CleanUp().passes, ids=lambda p: type(p).__name__)
def test_clean_up_s_own_examples(one: Rewrite) -> None:
    assert one.examples
    check(one)


@pytest.mark.slow
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


@pytest.mark.slow
def test_clean_up_leaves_dropout_that_matters() -> None:
    unet = build("sd15", dropout=0.1)
    clean = sdgraph.apply(unet, [CleanUp()])
    assert any(isinstance(m, nn.Dropout) for m in clean.modules())
    misses = [m for child in clean.report.passes for m in child.near_misses]
    assert any("p is 0.1" in m.reason for m in misses)
    assert clean_up.RemoveDropout().contract == Contract.EXACT
