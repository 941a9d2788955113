"""The source never changes, whatever is done to the result, and the result is a module like any other."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sdgraph
from sdgraph.errors import ModeError, TraceError

from ..models import ONE_LEVEL, answer, build, call_of


class State:
    """All that must not change in a source UNet."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.values = unet, copy.deepcopy(unet.state_dict())
        self.outside = self._outside()

    def _outside(self) -> Any:
        tensors = {n: (id(t), t.data_ptr(), t.dtype, t.device, t.requires_grad, t.grad) for n, t in self._named()}
        return tensors, {n: m.training for n, m in self.unet.named_modules()}, dict(self.unet.config)

    def _named(self) -> Any:
        return [*self.unet.named_parameters(), *self.unet.named_buffers()]

    def check(self) -> None:
        assert self.outside == self._outside()
        assert all(torch.equal(self.values[n], t) for n, t in self.unet.state_dict().items())


def step(graph: Any) -> None:
    graph.train()
    optimise(graph)


def optimise(graph: Any) -> None:
    optimizer = torch.optim.AdamW(graph.parameters(), lr=0.1)
    graph(**call_of(graph)).sample.square().mean().backward()
    optimizer.step()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda g: None,
    "cast": lambda g: g.to(torch.bfloat16),
    "half": lambda g: g.half(),
    "double": lambda g: g.double(),
    "channels-last": lambda g: g.to(memory_format=torch.channels_last),
    "meta": lambda g: g.to("meta"),
    "load": lambda g: g.load_state_dict({n: t + 1 for n, t in g.state_dict().items()}),
    "load-assign": lambda g: g.load_state_dict({n: t + 1 for n, t in g.state_dict().items()}, assign=True),
    "train": step,
    "train-without-a-word": optimise,
    "requires-grad": lambda g: g.requires_grad_(True).conv_in.weight.data.zero_(),
    "freeze": lambda g: g.requires_grad_(False),
    "copy": lambda g: copy.deepcopy(g).conv_in.weight.data.zero_(),
    "again": lambda g: step(sdgraph.apply(g)),
}


@pytest.mark.law("Nothing that is done to a result changes its source.")
@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "flags", ["trainable", *(pytest.param(flags, marks=pytest.mark.slow) for flags in ("frozen", "training"))]
)
def test_the_source_never_changes(change: str, flags: str) -> None:
    if change == "train-without-a-word" and flags == "frozen":
        pytest.skip("frozen weights have no gradients")
    unet = build().requires_grad_(flags != "frozen").train(flags == "training")
    state = State(unet)
    graph = sdgraph.apply(unet)
    state.check()
    if change in ("train", "again") and flags == "frozen":
        graph.requires_grad_(True)
    CHANGES[change](graph)
    state.check()


@pytest.mark.law("A step of training a trace is a step of training its source.")
def test_a_step_of_training_is_the_sources() -> None:
    """The result trains: same loss, same gradients, same weights after a step."""
    unet, graph = build(), sdgraph.apply(build())
    for model in (unet, graph):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**call_of(model)).sample.square().mean().backward()
        optimizer.step()
    gradients = {n: p.grad for n, p in unet.named_parameters()}
    assert all(torch.allclose(p.grad, gradients[n], rtol=1e-4, atol=1e-6) for n, p in graph.named_parameters())
    call = call_of(unet)
    assert torch.allclose(answer(unet.eval(), call), answer(graph.eval(), call), rtol=1e-4, atol=1e-5)


def test_loaded_weights_are_used() -> None:
    unet, other = build(), build(seed=9)
    for assign in (False, True):
        graph = sdgraph.apply(unet)
        answer(graph, call_of(unet))  # with a variant already made
        graph.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(answer(other, call_of(other)), answer(graph, call_of(other)))


@pytest.mark.law("Copies are independent.")
@pytest.mark.slow
def test_copies_are_independent() -> None:
    unet = build()
    graph = sdgraph.apply(unet)
    twin, call = copy.deepcopy(graph), call_of(unet)
    expected = answer(unet, call)
    assert torch.equal(expected, answer(twin, call))
    assert str(twin.report) == str(graph.report)
    with torch.no_grad():
        twin.conv_in.weight.zero_()
    assert torch.equal(expected, answer(graph, call))
    assert not torch.equal(expected, answer(twin, call))
    assert copy.deepcopy(graph.to(torch.bfloat16)).dtype is torch.bfloat16


def test_pickling_is_refused() -> None:
    graph = sdgraph.apply(build())
    for verb in (pickle.dumps, lambda g: torch.save(g, "/dev/null")):
        with pytest.raises(ModeError, match="save_pretrained"):
            verb(graph)


def test_the_result_of_apply_can_be_applied_again() -> None:
    unet = build()
    call = call_of(unet)
    again = sdgraph.apply(sdgraph.apply(unet).to(torch.bfloat16))
    assert again.dtype is torch.bfloat16
    unet.to(torch.bfloat16)
    call = call_of(unet)
    assert torch.equal(answer(unet, call), answer(again, call))


@contextlib.contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to half": lambda: torch.autocast("cpu", torch.float16),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "doubles by default": lambda: by_default(torch.float64),
    "meta by default": lambda: torch.device("meta"),
    "plain kernels": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
}


@pytest.mark.parametrize("around", AROUND)
def test_modes_around_apply_change_nothing(around: str) -> None:
    unet = build(**ONE_LEVEL)
    expected, call = answer(unet, call_of(unet)), call_of(unet)
    with AROUND[around]():
        made = sdgraph.apply(unet, "CleanUp")
    assert torch.equal(answer(made, call), expected)


@pytest.mark.parametrize("verb", [sdgraph.trace, sdgraph.apply])
def test_apply_inside_of_what_has_no_numbers(verb: Any) -> None:
    unet = build(**ONE_LEVEL)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(TraceError, match="FakeTensorMode"):
        verb(unet)
    with pytest.raises(TraceError, match=r"torch\.func"):
        torch.func.vmap(lambda x: (verb(unet), x)[1])(torch.ones(2))
