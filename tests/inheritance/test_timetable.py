"""The timetable says what the calls of a generation do and cost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from diffusers import (
    StableDiffusionPipeline,
)

import sdgraph
from sdgraph import Graph
from sdgraph.errors import ScheduleError
from sdgraph.passes import InheritFeatures
from sdgraph.schedules import Uniform, Warm


@pytest.mark.slow
def test_what_a_step_costs(pipe: StableDiffusionPipeline, whole: Graph) -> None:
    unet = sdgraph.apply(whole, InheritFeatures.deep_cache(3, branch=0))
    (site,) = unet.graph.sites
    assert re.search(r"inherited\n  Uniform\(3\): up_blocks.3.resnets.2; without: \d+.\d% of the MACs", str(unet.graph))
    assert unet.graph.step_macs([site]) < 0.15 * unet.graph.macs == 0.15 * unet.graph.step_macs()
    full, partial = (
        unet.variant(frozenset(unet.graph.inputs[i].name for i in range(3)), frozenset(s)) for s in ((), (site,))
    )
    assert len(partial.graph.nodes) < len(full.graph.nodes) / 8
    assert (full.meta["takes"], full.meta["gives"]) == ((), (site,))
    assert (partial.meta["takes"], partial.meta["gives"]) == ((site,), ())


@pytest.mark.slow
def test_a_timetable_says_what_calls_do(
    pipe: StableDiffusionPipeline,
    run: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    whole: Graph,
) -> None:
    unet = sdgraph.apply(whole, [InheritFeatures.deep_cache(3, 1), InheritFeatures("**.attn1", Warm(Uniform(2), 2))])
    table = unet.graph.timetable(8)
    ran: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    variant = unet.variant

    def noted(given: frozenset[str], inherited: frozenset[str] = frozenset()) -> Any:
        made = variant(given, inherited)
        ran.append((made.meta["gives"], made.meta["takes"]))
        return made

    monkeypatch.setattr(unet, "variant", noted)
    run(unet, steps=8)
    planned = {call: (v.refreshed, v.inherited) for v in table.variants for call in v.calls}
    assert ran == [planned[call] for call in range(8)]
    assert table.bound == 8 * unet.graph.macs / table.macs > 1
    assert "8 calls: ■ computed □ inherited · not needed" in str(table)
    assert json.loads(json.dumps(table.as_dict()))["refreshes"]["up_blocks.3.resnets.1"] == [0, 3, 6]
    table.picture(tmp_path / "table.svg")
    assert "up_blocks.3.resnets.1" in (tmp_path / "table.svg").read_text()
    with pytest.raises(ScheduleError, match="without calls"):
        unet.graph.timetable(0)
