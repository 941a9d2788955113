"""The costs of calls: measured here, or read from the figures of another machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import ScheduleError, SpecError
from sdgraph.passes import InheritFeatures
from sdgraph.plan_search.costs import seconds_here, seconds_of

from ..models import CROSS


def test_calls_are_timed_here(
    traced: Callable[[str], tuple[object, GraphUNet]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts arithmetic: a call that reuses sites costs as much less as it computes less."""
    unet = sdgraph.apply(traced("sd15")[1], InheritFeatures.deep_cache(), verify=False)
    flat = {
        "sample": torch.randn(2, 4, 32, 32),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(2, 7, CROSS),
    }
    graph, sites = unet.graph.at(B=2, H=32, W=32, L=7), frozenset(unet.graph.sites)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        monkeypatch.setattr("time.perf_counter", counter.get_total_flops)
        cost = seconds_here({"": unet}, flat)
        assert cost("", frozenset()) == 2 * graph.macs
        assert cost("", sites) == 2 * graph.call_macs(sites)


def figures(**change: object) -> dict[str, object]:
    return {
        "format": 1,
        "variants": {"variant_0.onnx": 2.0, "branch.onnx": 0.25},
        "reused": {"variant_0.onnx": [], "branch.onnx": ["b", "a"]},
        **change,
    }


def test_seconds_of_a_bundle(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(figures()))
    cost = seconds_of(path)
    assert cost(frozenset()) == 2
    assert cost(frozenset({"a", "b"})) == 0.25
    with pytest.raises(ScheduleError, match=r"no time of a call without a\n(.*\n)*.*export the candidates"):
        cost(frozenset({"a"}))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps(figures(reused={})),
        json.dumps(figures(variants=[1])),
        json.dumps(figures(format=2)),
        json.dumps({"variants": {}}),
    ],
)
def test_files_that_are_no_figures(text: str, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"has no times of calls(.*\n)*.*bench"):
        seconds_of(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no file"):
        seconds_of(tmp_path / "nothing.json")
