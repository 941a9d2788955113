"""Search: what it predicts is what happens, it beats schedules that were not searched, and it can be stopped."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

import sdgraph
from sdgraph.errors import ScheduleError, SourceError, SpecError
from sdgraph.passes import CleanUp, HoistInvariants, InheritFeatures
from sdgraph.search import _costs, _path, _total

OPTIONS: dict[str, Any] = {"num_inference_steps": 6, "progress": False, "reach": 6}
CANDIDATES = (InheritFeatures("up_blocks.2.{resnets,attentions}.*"), InheritFeatures("up_blocks.3.attentions.*"))


def test_the_path_is_the_best_choice() -> None:
    """Against all choices of refreshes there are."""
    rng = np.random.default_rng(0)
    costs = _costs(rng.random(7), rng.random((7, 7)))
    every = [(0, *rest) for count in range(7) for rest in combinations(range(1, 7), count)]
    for price in (0.0, 0.3, 1.0, 10.0):
        best = min(every, key=lambda refreshes: _total(costs, refreshes) + price * len(refreshes))
        assert _path(costs, price) == best


def test_a_budget_is_met_and_the_error_foreseen(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    own = pipe.unet
    found = sdgraph.search(pipe, CANDIDATES, ["a red circle"], budget=0.85, folder=tmp_path, **OPTIONS)
    assert pipe.unet is own
    unet = sdgraph.apply(own, found.passes)
    assert unet.graph.timetable(6).macs == found.timetable.macs <= 0.85 * 6 * unet.graph.macs
    assert 0.1 < found.measured / found.predicted < 10  # added up call by call, to first order
    assert sdgraph.parse(found.as_dict()["passes"]) == (found.passes,)
    # what was measured is kept: a tighter budget runs nothing but the reference and the result
    kept = sorted((file.name, file.stat().st_mtime_ns) for file in tmp_path.iterdir())
    tighter = sdgraph.search(pipe, CANDIDATES, ["a red circle"], budget=0.8, folder=tmp_path, **OPTIONS)
    assert kept == sorted((file.name, file.stat().st_mtime_ns) for file in tmp_path.iterdir())
    assert tighter.timetable.macs < found.timetable.macs
    assert tighter.predicted > found.predicted


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"budget": 0.01}, ScheduleError, "a budget of 0.01 is not to be had: these candidates leave 0.[0-9]+"),
        ({"budget": 1.5}, SpecError, "the budget is 1.5"),
        ({"candidates": ()}, SpecError, "no candidates"),
        ({"candidates": (CleanUp(),)}, SpecError, "has no sites"),
        ({"candidates": (HoistInvariants(),)}, SpecError, "has no sites to give a schedule"),
        ({"output_type": "pil"}, SpecError, "output_type is not yours"),
        ({"pipe": object()}, SourceError, "object has no UNet"),
    ],
)
def test_what_cannot_be_searched(
    pipe: StableDiffusionPipeline, change: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    given = {"pipe": pipe, "candidates": CANDIDATES[:1], "prompts": ["a red circle"], "budget": 0.9, **change}
    with pytest.raises(error, match=complaint):
        sdgraph.search(**given, **{**OPTIONS, "num_inference_steps": 2})
