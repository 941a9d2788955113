"""The graphs of a bundle share one file of weights, and one file may hold them all."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import sdgraph
from sdgraph.exporters.onnx import export

from ..models import ONE_LEVEL, answer, build, call_of
from .exports import Exported, opened

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_other_tools_run_the_graph_that_computes_everything(pipe: Any, exported: Callable[[str], Exported]) -> None:
    """It has one output, and its weights are those of the others."""
    _, directory, _ = exported("deep cache")
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
    call = call_of(pipe.unet, L=77)
    feeds = {name: call[name].numpy() for name in ("sample", "encoder_hidden_states")}
    assert [output.name for output in session.get_outputs()] == ["out_sample"]
    found = session.run(None, feeds | {"timestep": np.array([500.0], np.float32)})[0]
    expected = answer(pipe.unet, {**call, "timestep": 500})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_the_weights_are_there_once(exported: Callable[[str], Exported]) -> None:
    unet, directory, _ = exported("deep cache")
    said = json.loads((directory / "sdgraph.json").read_text())
    assert [each["file"] for each in said["variants"]] == ["variant_0.onnx", "variant_1.onnx", "variant_2.onnx"]
    size = sum(p.numel() * p.element_size() for p in unet.parameters())
    assert (directory / "model.onnx.data").stat().st_size <= 1.02 * size
    places = []
    for model in said["variants"]:
        graph = onnx.load(directory / model["file"], load_external_data=False).graph
        assert {each.name for each in graph.input} >= {f"reused.{site}" for site in model["reads"]}
        assert [each.name for each in graph.output] == ["out_sample", *(f"computed.{s}" for s in model["writes"])]
        places.append({t.name: {e.key: e.value for e in t.external_data}.get("offset") for t in graph.initializer})
    whole, inherit, hoisted = places
    shared = {name for name in inherit if inherit[name] is not None and name in whole}
    assert shared
    assert all(inherit[name] == whole[name] for name in shared)
    assert len(inherit) < len(hoisted) < len(whole)


@pytest.fixture(scope="module")
def in_one_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """An export in one file by passes, which all providers share."""

    @functools.cache
    def of(passes: str) -> Exported:
        unet = sdgraph.apply(build(**ONE_LEVEL), passes, verify=False)
        folder = tmp_path_factory.mktemp("export") / "single"
        return Exported(unet, folder, export(unet, folder, layout="single", calls=4, progress=False))

    return of


@pytest.mark.parametrize("passes", ["InheritFeatures.deep_cache(2)", "HoistInvariants, InheritFeatures.deep_cache(3)"])
def test_all_kinds_of_calls_in_one_file(passes: str, provider: str, in_one_file: Callable[[str], Exported]) -> None:
    unet, folder, report = in_one_file(passes)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".onnx", ".data"}
    assert len({each.model for each in report.comparisons}) == (2 if passes.startswith("Inherit") else 3)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(folder / "model.onnx"))
    assert [node.op_type for node in model.graph.node] == ["Constant", "Equal", "If"]
    running = opened(folder, provider)
    assert running.manifest.sites == unet.graph.sites
    for size in ({}, {"B": 1, "H": 13, "W": 10}):
        call = call_of(unet, L=77, **size)
        for step in range(4):
            now = {**call, "timestep": 900 - step}
            torch.testing.assert_close(answer(running, now), answer(unet, now), rtol=1e-4, atol=1e-5)
