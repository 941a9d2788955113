"""The tracer: what it makes of ordinary PyTorch code, what it refuses, and that it disturbs nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import sdgraph
from sdgraph.compiler.numerics import run
from sdgraph.errors import TraceError
from sdgraph.ir.guards import check_call

from ..models import (
    answer,
    build,
    call_of,
    same,
    trace,
)


def test_other_threads_go_on_while_one_traces() -> None:
    unet, other = build(), build(seed=1)
    call = call_of(other)
    expected = answer(other, call)
    stop, failures = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            try:
                assert torch.equal(answer(other, call), expected)
                assert isinstance(torch.arange(3), torch.Tensor)
            except BaseException as error:  # reported by the main thread
                failures.append(error)
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        graphs = [sdgraph.trace(unet) for _ in range(2)]
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert all(same(unet, sdgraph.GraphUNet(graph)) for graph in graphs)


@pytest.mark.slow
def test_two_threads_trace_at_once() -> None:
    untouched = nn.Module.__call__, nn.Module.__getattr__, torch.arange
    unets, graphs = [build(seed=seed) for seed in range(2)], {}

    def work(i: int) -> None:
        graphs[i] = trace(unets[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(unets[i], graphs[i]) for i in range(2))
    assert untouched == (nn.Module.__call__, nn.Module.__getattr__, torch.arange)


def test_a_failed_trace_leaves_nothing_behind() -> None:
    untouched = nn.Module.__call__, nn.Module.__getattr__, torch.arange
    with pytest.raises(TraceError):
        sdgraph.trace_code(lambda x: 1 / 0, x=("B", 3))
    assert untouched == (nn.Module.__call__, nn.Module.__getattr__, torch.arange)


def checked(graph: sdgraph.Graph, **values: torch.Tensor) -> torch.Tensor:
    check_call(graph.resolved_inputs(), graph.guards, values, torch.float32)
    return run(graph, values)


def _edited(x: torch.Tensor) -> torch.Tensor:
    made = x * 2
    made[:, 0] = 0
    made[..., 1:3, -1] = made[..., :2, 0] + 1
    made[made.shape[0] // 2 :, 1] = made[made.shape[0] // 2 :, 1] * 3
    return made


def test_edits_in_place_of_what_the_code_made_itself() -> None:
    graph = sdgraph.trace_code(_edited, x=("B", 3, "H", "W"))
    for shape in ((1, 3, 8, 9), (4, 3, 5, 5)):
        x = torch.randn(shape)
        assert torch.equal(checked(graph, x=x), _edited(x))


def _view_used_later(x: torch.Tensor) -> torch.Tensor:
    made = x * 2
    view = made[:, 1:]
    made[:, 1] = 0
    return view + 1


def _edited_through_a_view(x: torch.Tensor) -> torch.Tensor:
    made = x * 2
    made.view(-1)[0] = 0
    return made


def _added_through_a_view(x: torch.Tensor) -> torch.Tensor:
    made = x * 2
    view = made[:, 1:]
    view += 1
    return made


def _in_place(x: torch.Tensor) -> torch.Tensor:
    x[:, 0] = 0
    return x


def _iterated(x: torch.Tensor) -> torch.Tensor:
    return sum(x)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (lambda x: x * 2 if x.shape[2] > 70 else x, "takes another branch at other sizes"),
        (lambda x: x * int(x.shape[2]), "a size of the call is used as a plain number"),
        (lambda x: x * float(x.shape[2]), "a size of the call is used as a plain number"),
        (lambda x: torch.cat([x for _ in range(x.shape[2])]), "a size of the call is used as a plain number"),
        (lambda x: x.mul_(2), "edits a tensor in place"),
        (_in_place, "edited in place"),
        (_view_used_later, "shares memory with one edited in place"),
        (_edited_through_a_view, "shares memory with one edited in place"),
        (_added_through_a_view, "shares memory with one edited in place"),
        (lambda x: nn.functional.relu_(x), "in place"),
        (lambda x: nn.functional.silu(x, inplace=True), "in place"),
        (lambda x: torch.add(x, 1, out=x), "in place"),
        (lambda x: x * 2 if x.sum() > 0 else x, "branches on the values"),
        (lambda x: x * x.sum().item(), "values of a tensor"),
        (lambda x: x[x > 0], "depends on the values"),
        (_iterated, "iterated over"),
        (lambda x: x * 2 if x.dtype == torch.float32 else x, "in another dtype"),
        (lambda x: x * 2 if x.dtype == torch.bfloat16 else x, "in another dtype"),
        (lambda x: x + 1 / 0, "ZeroDivisionError"),
    ],
)
def test_code_that_no_graph_can_hold_is_refused(code: Any, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        sdgraph.trace_code(code, x=("B", 3, "H", "W"))


class Branching(nn.Module):
    def __init__(self, code: Any) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.forward = code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("code", [lambda x: x * int(x.shape[2]), lambda x: x + 1 / 0])
def test_a_refusal_names_the_module_path(code: Any) -> None:
    with pytest.raises(TraceError, match=r"where: inner"):
        sdgraph.trace_code(Branching(code), x=("B", 3, "H", "W"))


def test_tracing_works_in_inference_mode() -> None:
    with torch.inference_mode():
        unet = build()
        graph = trace(unet)
        assert same(unet, graph)
        with pytest.raises(TraceError, match="in place"):
            sdgraph.trace_code(lambda x: nn.functional.relu_(x), x=("B", 3))
