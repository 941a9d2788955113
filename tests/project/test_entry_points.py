"""Public entry points refuse what they cannot use by an error of ours, whatever it is."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sdgraph
from sdgraph import Graph, GraphUNet, Pass
from sdgraph.errors import EditError, ModeError, PassError, SdgraphError, TraceError, TuningError
from sdgraph.exporters.ort.bench import bench
from sdgraph.schedules import SamplingRun, Uniform

from ..models import ONE_LEVEL, build, call_of

VALUES: tuple[Any, ...] = (
    None, "a", "", b"a", -1, 0, 10**30, 1.5, float("nan"), float("inf"), True, [], {}, (), [None], [-1], [float("nan")],
    ["a"], {"a": 1}, object(), int, torch.zeros(3), torch.tensor(5), torch.zeros(3, device="meta"), np.zeros(3),
    range(3), complex(1), "a\0b",
)  # fmt: skip

SITE = "up_blocks.0.resnets.0"
WITH_GRAPH: dict[str, Callable[[Graph, Any], Any]] = {
    "region": lambda graph, value: graph.region(value),
    "matching": lambda graph, value: graph.matching(value),
    "module": lambda graph, value: graph.module(value),
    "tensor": lambda graph, value: graph.tensor(value),
    "input": lambda graph, value: graph.input(value),
    "text": lambda graph, value: graph.text(value),
    "macs_of": lambda graph, value: graph.macs_of(value),
    "timetable": lambda graph, value: graph.timetable(value),
    "bypass": lambda graph, value: graph.copy().bypass(value),
    "bypass by schedule": lambda graph, value: graph.copy().bypass("conv_in", value),
    "replace": lambda graph, value: graph.copy().replace(value, torch.nn.Identity()),
    "replace by": lambda graph, value: graph.copy().replace("conv_act", value),
    "insert": lambda graph, value: graph.copy().insert(value),
    "insert_after": lambda graph, value: graph.copy().insert_after(value, lambda x: x),
    "add_parameter": lambda graph, value: graph.copy().add_parameter(value, torch.zeros(1)),
    "add_parameter of": lambda graph, value: graph.copy().add_parameter("new", value),
    "add_module": lambda graph, value: graph.copy().add_module(value, torch.nn.Identity()),
    "add_module of": lambda graph, value: graph.copy().add_module("new", value),
    "require": lambda graph, value: graph.copy().require(value),
    "erase": lambda graph, value: graph.copy().erase(value),
    "rewire": lambda graph, value: graph.copy().rewire(value, value),
    "share": lambda graph, value: graph.copy().share(value, "conv_in"),
    "take_weights": lambda graph, value: graph.copy().take_weights("conv_in", value),
    "take_weights of": lambda graph, value: graph.copy().take_weights(value, graph),
    "inherit": lambda graph, value: graph.copy().inherit(value, "site", Uniform(2)),
    "reschedule": lambda graph, value: graph.copy().reschedule(value, Uniform(2)),
    "apply": lambda graph, value: sdgraph.apply(graph, value, verify=False),
}
ALONE: dict[str, Callable[[Any], Any]] = {
    "trace": sdgraph.trace,
    "trace_code": sdgraph.trace_code,
    "shapes of trace_code": lambda value: sdgraph.trace_code(lambda x: x, x=value),
    "apply to": sdgraph.apply,
    "parse": sdgraph.parse,
    "attach": sdgraph.attach,
    "evaluate": lambda value: sdgraph.evaluate(value, "CleanUp", "x"),
    "GraphUNet": GraphUNet,
    "from_pretrained": GraphUNet.from_pretrained,
    "check": sdgraph.testing.check,
    "Chain": sdgraph.Chain,
    "Fixpoint": sdgraph.Fixpoint,
    "attach to": lambda value: sdgraph.attach(SimpleNamespace(unet=value, scheduler=None)),
    "calls of a schedule": lambda value: Uniform(2).calls(SamplingRun.of(value)),
}
OPTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "search": (sdgraph.search, {"pipe": None, "candidates": [], "prompts": ["a"], "budget": 0.5}),
    "fit_forecast": (sdgraph.fit_forecast, {"pipe": None, "inherit": sdgraph.passes.CleanUp(), "prompts": ["a"]}),
    "evaluate": (sdgraph.evaluate, {"before": None, "after": "CleanUp", "prompts": ["a"]}),
    "export": (sdgraph.exporters.onnx.export, {"unet": None, "directory": "no/such"}),
    "export_pipeline": (sdgraph.exporters.onnx.export_pipeline, {"pipe": None, "directory": "no/such"}),
    "open_pipeline": (sdgraph.exporters.ort.open_pipeline, {"directory": "no/such"}),
    "ORTUNet.from_pretrained": (sdgraph.exporters.ort.ORTUNet.from_pretrained, {"directory": "no/such"}),
    "load_pipeline": (sdgraph.exporters.ort.load_pipeline, {"pipeline": "no/such", "unet": None}),
    "compare": (sdgraph.exporters.engines.compare, {"pipeline": "no/such", "leave_out": ["no"]}),
    "bench": (bench, {"unet": None}),
}


@pytest.fixture(scope="module")
def inheriting() -> GraphUNet:
    return sdgraph.apply(build(**ONE_LEVEL), f"InheritFeatures('{SITE}')", verify=False)


def assert_refused_or_accepted(entry: Callable[..., Any], *args: Any) -> None:
    with contextlib.suppress(SdgraphError):  # any other exception is a defect
        entry(*args)


@pytest.mark.parametrize("name", WITH_GRAPH)
def test_methods_of_a_graph(name: str, small: Graph) -> None:
    for value in VALUES:
        assert_refused_or_accepted(WITH_GRAPH[name], small, value)


@pytest.mark.parametrize("name", ALONE)
def test_functions(name: str) -> None:
    for value in VALUES:
        assert_refused_or_accepted(ALONE[name], value)


@pytest.mark.usefixtures("ways_in_this_process")
@pytest.mark.parametrize(
    ("entry", "option"),
    [(entry, name) for entry, (code, _) in OPTIONS.items() for name in inspect.signature(code).parameters],
)
def test_options(entry: str, option: str) -> None:
    """A call that is refused in any case is refused by us, whatever its other arguments are."""
    code, required = OPTIONS[entry]
    for value in VALUES:
        with pytest.raises(SdgraphError):
            code(**{**required, option: value})


@pytest.mark.parametrize("option", ["height", "width", "batch", "tokens", "calls"])
def test_warming_up(option: str, inheriting: GraphUNet) -> None:
    for value in VALUES:
        assert_refused_or_accepted(
            lambda value: inheriting.warm_up(**{"height": 8, "width": 8, "calls": 2, option: value}), value
        )


def test_what_a_graph_attaches_to(inheriting: GraphUNet) -> None:
    with pytest.raises(ModeError, match="no weak references"):
        sdgraph.attach(SimpleNamespace(unet=inheriting, scheduler=None))


def test_what_a_generation_is_expected_to_be(inheriting: GraphUNet) -> None:
    def expect(value: Any) -> None:
        with inheriting.expecting(value):
            pass

    for value in VALUES:
        assert_refused_or_accepted(expect, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timestep", "encoder_hidden_states", "class_labels", "added_cond_kwargs"])
def test_arguments_of_a_call(name: str, inheriting: GraphUNet) -> None:
    for value in VALUES:
        assert_refused_or_accepted(lambda value: inheriting(**{**call_of(inheriting), name: value}), value)


def test_nodes_of_another_graph_are_refused(small: Graph) -> None:
    work, other = small.copy(), small.copy()
    theirs = other.region("conv_in").output
    edits: list[Callable[[], Any]] = [
        lambda: work.rewire(theirs, theirs),
        lambda: work.insert_after(theirs, lambda x: x),
        lambda: work.insert(lambda x: x + 1, theirs),
        lambda: work.inherit(theirs, "site", Uniform(2)),
        lambda: work.erase(theirs),
        lambda: work.share(theirs, "conv_out"),
        lambda: work.bypass(other.region("conv_act")),
    ]
    before = str(other)
    for edit in edits:
        with pytest.raises(EditError, match="a node of another graph"):
            edit()
    assert str(other) == before


@pytest.mark.parametrize("result", [[1], "text", 3, torch.nn.Identity(), True])
def test_what_run_returns(result: Any, small: Graph) -> None:
    @dataclass(frozen=True)
    class Returns(Pass):
        def run(self, graph: Graph) -> Any:
            graph.bypass("conv_act")
            return result

    with pytest.raises(PassError, match=r"(?s)run returned a .*return None, or Findings"):
        sdgraph.apply(small, Returns(), verify=False)


def test_code_that_fails_outside_of_a_pass(small: Graph) -> None:
    with pytest.raises(TraceError, match="failed while being traced: ZeroDivisionError"):
        small.copy().replace("conv_act", lambda x: x / 0 if 1 // 0 else x)


def test_data_in_memory() -> None:
    latents = torch.zeros(3, 4, 8, 8)
    for conditions in (torch.zeros(3), [1], None, {"encoder_hidden_states": 3}, {"x": torch.tensor(1.0)}):
        with pytest.raises(TuningError):
            sdgraph.tuning.Tensors(latents, conditions)  # type: ignore[arg-type]
    given = {"encoder_hidden_states": torch.zeros(3, 5, 24, requires_grad=True)}
    assert not sdgraph.tuning.Tensors(latents, given).conditions([0])["encoder_hidden_states"].requires_grad


@pytest.mark.slow
def test_an_exported_unet_is_neither_copied_nor_pickled(bundle: Path) -> None:
    from sdgraph.exporters.ort.unet import ORTUNet

    unet = ORTUNet.from_pretrained(bundle, provider="CPUExecutionProvider")
    for way in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(ModeError, match=r"(?s)ORTUNet.*from_pretrained"):
            way(unet)  # type: ignore[operator]


@pytest.mark.long
def test_check_exports(small: Graph) -> None:
    @dataclass(frozen=True)
    class Unexportable(Pass):
        contract = sdgraph.Contract.APPROXIMATE

        def run(self, graph: Graph) -> None:
            graph.insert_after(graph.region("conv_in").output, lambda x: x * torch.special.i1e(x))

    unet = GraphUNet(small.copy())
    assert sdgraph.testing.check(sdgraph.passes.PruneBlocks("down_blocks.0.attentions.0"), unet, export=True)
    with pytest.raises(sdgraph.errors.ExportError, match="Unexportable"):
        sdgraph.testing.check(Unexportable(), unet, export=True)
