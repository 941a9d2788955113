"""The source is as before, bit for bit, whatever a pass does to the weights that it is given."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import sdgraph
from sdgraph import Chain, Contract, Graph, Pass, Rewrite
from sdgraph.errors import ContractError, SdgraphError, SourceError
from sdgraph.ir.read_only import Memory
from sdgraph.passes import Assemble

from ..models import ONE_LEVEL, build, load_ip_adapter

PATH = "down_blocks.0.resnets.0.conv1"


def conv(graph: Graph) -> nn.Conv2d:
    return graph.module(PATH)  # type: ignore[return-value]


def weight(graph: Graph) -> torch.Tensor:
    return conv(graph).weight


def without_gradients(graph: Graph) -> None:
    with torch.no_grad():
        weight(graph).mul_(2)


def optimizer(graph: Graph) -> None:
    weight(graph).grad = torch.ones_like(weight(graph))
    torch.optim.AdamW([weight(graph)], fused=True).step()


def lists_of_modules(graph: Graph) -> None:
    conv(graph)._reversed_padding_repeated_twice[0] = 7
    conv(graph).padding = (0, 0)
    graph.config["down_block_types"] = ["nothing"]  # type: ignore[index]
    raise RuntimeError


def inserted(graph: Graph) -> None:
    """An operation that would write when the graph runs."""
    with graph.fx.inserting_after(graph.region("conv_in").output):
        read = graph.fx.get_attr(f"{PATH}.bias")
    with graph.fx.inserting_after(read):
        written = graph.fx.call_method("zero_", (read,))
    graph.insert_after(graph.region(PATH).output, lambda x, bias: x + bias[:, None, None], written)


def swallowed(graph: Graph) -> None:
    with contextlib.suppress(Exception):
        weight(graph).data.mul_(2)


WRITES: dict[str, Callable[[Graph], Any]] = {
    "data": lambda g: weight(g).data.mul_(2),
    "no_grad": without_gradients,
    "copy_": lambda g: weight(g).detach().copy_(torch.zeros(())),
    "out": lambda g: torch.mul(weight(g).data, 2, out=weight(g).data),
    "a view": lambda g: weight(g).data.flatten()[3:].view(-1).zero_(),
    "set_": lambda g: weight(g).data.set_(torch.zeros(3)),
    "set the data": lambda g: setattr(weight(g), "data", torch.zeros(3)),
    "resize_": lambda g: weight(g).data.resize_(0),
    "setitem": lambda g: weight(g).data.__setitem__(0, 1.0),
    "numpy": lambda g: np.multiply(a := weight(g).detach().numpy(), 2, out=a),
    "asarray": lambda g: np.asarray(weight(g).detach()).fill(0),
    "numpy and back": lambda g: torch.from_numpy(weight(g).detach().numpy()).zero_(),
    "dlpack": lambda g: np.from_dlpack(weight(g).detach()).__setitem__(0, 1),
    "dlpack of torch": lambda g: torch.from_dlpack(weight(g).detach()).zero_(),
    "storage": lambda g: weight(g).untyped_storage().fill_(0),
    "an old storage": lambda g: weight(g).data.storage().__setitem__(0, 1.0),
    "foreach": lambda g: torch._foreach_mul_([p.data for p in g.parameters().values()], 2.0),
    "initialization": lambda g: nn.init.orthogonal_(weight(g)),
    "optimizer": optimizer,
    "a parameter": lambda g: g.tensor(f"{PATH}.weight").data.mul_(2),
    "all weights": lambda g: [p.data.zero_() for p in g.weights.parameters()],
    "lists of modules": lists_of_modules,
    "a node that writes": inserted,
    "an error that is swallowed": swallowed,
    "image prompts": lambda g: [p.data.zero_() for p in g.source.parameters() if not p.is_meta],
}


@dataclass(frozen=True)
class Writes(Pass):
    contract: ClassVar[Contract] = Contract.EXACT
    may_change_nothing: ClassVar[bool] = True
    how: str = "data"

    def run(self, graph: Graph) -> None:
        WRITES[self.how](graph)


@dataclass(frozen=True)
class WritesBeside(Writes):
    contract: ClassVar[Contract] = Contract.APPROXIMATE


@dataclass(frozen=True)
class WritesWhileRewriting(Rewrite):
    def pattern(self, x: Any, f: nn.Conv2d) -> Any:  # type: ignore[override]
        return f(x)

    def check(self, x: Any, f: nn.Conv2d) -> None:  # type: ignore[override]
        f.weight.data.zero_()

    def replace(self, x: Any, f: nn.Conv2d) -> Any:  # type: ignore[override]
        return f(x)


class State:
    """Values and attributes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values, self.rest = copy.deepcopy(self._values()), copy.deepcopy(self._rest())

    def _values(self) -> dict[str, torch.Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _rest(self) -> Any:
        plain = (bool, int, str, tuple, list)
        modules = {p: {n: v for n, v in vars(m).items() if type(v) in plain} for p, m in self.model.named_modules()}
        return modules, dict(self.model.config)

    def check(self) -> None:
        assert all(torch.equal(value, self.values[name]) for name, value in self._values().items())
        assert self.rest == self._rest()


@pytest.fixture(scope="module")
def source() -> UNet2DConditionModel:
    """With an IP-Adapter of scale 0, whose weights its graph keeps beside. Nothing changes it."""
    unet = build(**ONE_LEVEL)
    unet.register_buffer("table", torch.ones(3))
    return load_ip_adapter(unet, "base", scale=0.0).requires_grad_(False)


@pytest.fixture(scope="module")
def before(source: UNet2DConditionModel) -> State:
    return State(source)


@pytest.fixture(scope="module")
def made(source: UNet2DConditionModel) -> sdgraph.GraphUNet:
    return sdgraph.apply(source)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("kind", [Writes, WritesBeside])
def test_the_source_is_as_before(how: str, kind: type[Writes], before: State, made: sdgraph.GraphUNet) -> None:
    for one in (kind(how=how), Chain((kind(how=how),))):
        with contextlib.suppress(SdgraphError):
            sdgraph.apply(made, [one], verify=kind is Writes)
        before.check()
    State(made).check()


@pytest.mark.law("A pass cannot write to the weights that the source shares.")
@pytest.mark.parametrize("one", [Writes(), Chain((Writes(),)), WritesWhileRewriting()], ids=str)
@pytest.mark.parametrize("verb", [sdgraph.apply, sdgraph.testing.check])
def test_writing_is_refused_with_the_weight_and_the_line(
    one: Pass, verb: Any, source: UNet2DConditionModel, before: State
) -> None:
    with pytest.raises(ContractError, match="edits weights in place") as caught:
        sdgraph.apply(source, [one]) if verb is sdgraph.apply else verb(one, source)
    assert "weight" in caught.value.where
    assert "test_read_only.py:" in str(caught.value)
    before.check()


def test_weights_that_are_taken_are_read_only_too(made: sdgraph.GraphUNet) -> None:
    other = sdgraph.apply(load_ip_adapter(build(**ONE_LEVEL, seed=5), "base", scale=0.0))
    state = State(other)

    @dataclass(frozen=True)
    class TakesAndWrites(Pass):
        def run(self, graph: Graph) -> None:
            graph.take_weights(["conv_in"], other.graph)
            graph.module("conv_in").weight.data.zero_()

    with pytest.raises(ContractError, match="in place"):
        sdgraph.apply(made, [TakesAndWrites()])
    state.check()
    assert Assemble.__name__  # which takes weights so


def test_a_clone_may_be_edited(made: sdgraph.GraphUNet, before: State) -> None:
    @dataclass(frozen=True)
    class Halves(Pass):
        def run(self, graph: Graph) -> None:
            graph.add_tensor(f"{PATH}.weight", nn.Parameter(weight(graph).detach().clone().mul_(0.5)))
            torch.from_numpy(weight(graph).detach().numpy().copy()).zero_()

    halved = sdgraph.apply(made, [Halves()])
    assert torch.equal(halved.get_submodule(PATH).weight, 0.5 * made.get_submodule(PATH).weight)
    before.check()


class Counting(nn.Module):
    """An attention processor that keeps something in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.seen, self.kept = how, 0, [], None
        self.register_buffer("count", torch.zeros(()))
        self.plain = build(**ONE_LEVEL).attn_processors.popitem()[1]

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.how == "number":
            self.calls += 1
        elif self.how == "list":
            self.seen.append(1)
        elif self.how == "tensor":
            self.kept = hidden_states
        elif self.how == "buffer":
            self.count = self.count + 1
        elif self.how == "buffer in place":
            self.count.add_(1)
        return self.plain(attn, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["number", "list", "tensor", "buffer", "buffer in place"])
def test_code_that_keeps_something_is_refused_and_the_source_as_before(how: str) -> None:
    unet = build(**ONE_LEVEL)
    unet.set_attn_processor(Counting(how))
    state = State(unet)
    with pytest.raises((SourceError, sdgraph.errors.TraceError), match=r"between calls|in place"):
        sdgraph.apply(unet, processors=(Counting,))
    state.check()
    assert all(p.kept is None and not p.seen for p in unet.attn_processors.values())


@pytest.mark.parametrize("spans", [[(0, 9), (3, 5)], [(5, 9), (0, 20), (30, 40)], [(0, 4), (8, 12), (2, 10)]])
def test_memory_is_found_wherever_it_overlaps(spans: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdgraph.ir.read_only.span", lambda tensor: tensor)
    memory = Memory(RuntimeError)
    for number, each in enumerate(spans):
        memory.add({str(number): each})  # type: ignore[dict-item]
    for start in range(45):
        for end in range(start + 1, 45):
            overlaps = any(a < end and start < b for a, b in spans)
            assert (memory.name_at(start, end) is not None) == overlaps
