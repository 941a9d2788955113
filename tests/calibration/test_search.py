"""Search: what it predicts is what happens, it beats schedules that were not searched, and it can be stopped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import sdgraph
from sdgraph.calibration.replay import ReplayUNet, distances
from sdgraph.calibration.search import SearchResult, _best, _errors, _joint, _share, _stretches
from sdgraph.errors import ScheduleError, SourceError, SpecError
from sdgraph.passes import CleanUp, HoistInvariants, InheritFeatures
from sdgraph.schedules import Explicit

from ..models import build

CACHE = InheritFeatures.deep_cache()
OPTIONS: dict[str, Any] = {"num_inference_steps": 6, "progress": False, "reach": 6}
CANDIDATES = (InheritFeatures("up_blocks.2.{resnets,attentions}.*"), InheritFeatures("up_blocks.3.attentions.*"))


@pytest.mark.parametrize("reach", [3, 7])
@pytest.mark.parametrize("memory", [1, 2, 3])
def test_the_paths_are_the_best_choices(memory: int, reach: int) -> None:
    """Against all choices of refreshes there are, for each number of them."""
    rng = np.random.default_rng(0)
    stretches = _stretches(7, reach, memory)
    errors = {state: rng.random(len(ends)) for state, ends in stretches.items()}
    found = _best(stretches, errors, 7)
    for count in range(1, 8):
        every = [(0, *rest) for rest in combinations(range(1, 7), count - 1)]
        every = [one for one in every if all(b - a <= reach for a, b in pairwise((*one, 7)))]
        assert (count in found) == bool(every)
        if every:
            best = min(every, key=lambda one: sum(_errors(errors, one, 7)))
            assert found[count] == (pytest.approx(sum(_errors(errors, best, 7))), best)


def test_groups_share_a_budget() -> None:
    """Against all pairs of numbers of refreshes; the first group costs three times as much."""
    choices = [{n: (a / n, (0,) * n) for n in range(1, 9)} for a in (3.0, 1.0)]

    def macs(counts: Sequence[int]) -> int:
        return 3 * counts[0] + counts[1]

    for most in (4, 9, 20, 32):
        a, b = _share(choices, macs, most)
        assert macs((a, b)) <= most
        least = min(3 / i + 1 / j for i in range(1, 9) for j in range(1, 9) if macs((i, j)) <= most)
        assert 3 / a + 1 / b <= 1.1 * least


@pytest.mark.slow
def test_an_error_is_followed_to_the_end(pipe: StableDiffusionPipeline) -> None:
    """A stretch that is inherited leaves what a generation with that schedule leaves, forecasts and all."""
    one = InheritFeatures(CANDIDATES[0].sites, forecast=1)
    inheriting = sdgraph.apply(pipe.unet, one, verify=False)

    def generate(unet: sdgraph.GraphUNet) -> torch.Tensor:
        own, pipe.unet = pipe.unet, unet
        try:
            generator = torch.Generator().manual_seed(0)
            return pipe("a red circle", generator=generator, num_inference_steps=6, output_type="latent").images
        finally:
            pipe.unet = own

    rehearsal = ReplayUNet(inheriting.graph.copy(), generate)
    with torch.no_grad():
        assert torch.equal(rehearsal.final, generate(pipe.unet))
    sites = frozenset(inheriting.graph.sites)
    found = rehearsal.errors((0, 1), sites, 6, 6)
    schedule = Explicit((0, 1))
    there = sdgraph.apply(pipe.unet, InheritFeatures(one.sites, schedule, forecast=1), verify=False)
    assert len(found) == 5
    assert found[0] == 0  # the latents that come of the refresh itself
    assert found[-1] == pytest.approx(distances(generate(there), rehearsal.final, 1))
    again = rehearsal.errors((0, 1), sites, 4, 6)  # computing all from call 4 on
    assert (again[:3] == found[:3]).all()
    assert 0 < again[-1] < found[-1]
    assert (rehearsal.errors((0, 1), sites, 4, 4) == found[:3]).all()


@pytest.mark.slow
def test_a_budget_is_met_and_the_error_foreseen(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    own = pipe.unet
    found = sdgraph.search(pipe, CANDIDATES, ["a red circle"], budget=0.85, folder=tmp_path, **OPTIONS)
    assert pipe.unet is own
    unet = sdgraph.apply(own, found.passes)
    assert unet.graph.timetable(6).macs == found.timetable.macs <= 0.85 * 6 * unet.graph.macs
    assert 0.2 < found.measured / found.predicted < 5  # added up stretch by stretch, to first order
    assert found.prompts == 1
    assert sdgraph.parse(found.as_dict()["passes"]) == (found.passes,)
    # what was measured is kept: a tighter budget runs nothing but the reference and the result
    kept = sorted((file.name, file.stat().st_mtime_ns) for file in tmp_path.iterdir())
    tighter = sdgraph.search(pipe, CANDIDATES, ["a red circle"], budget=0.8, folder=tmp_path, **OPTIONS)
    assert kept == sorted((file.name, file.stat().st_mtime_ns) for file in tmp_path.iterdir())
    assert tighter.timetable.macs < found.timetable.macs
    assert tighter.predicted > found.predicted


def test_errors_of_stretches_add_up_as_they_are_somewhat_alike() -> None:
    rng = np.random.default_rng(0)
    errors = rng.random((5, 3))
    joint = _joint(errors)
    assert (errors.sum(0) < joint).all()  # as if they had nothing to do with each other
    assert (joint < np.sqrt(errors).sum(0) ** 2).all()  # as if they were the same
    assert _joint(errors[:1]) == pytest.approx(errors[0])  # a single one is what it was measured to be
    assert _joint(np.full((4, 1), 0.01)) == pytest.approx(0.01 * 4**1.5)


@pytest.mark.parametrize(
    ("predicted", "measured", "told"),
    [
        (0.06, 0.76, "what was measured is 13 times what was predicted (prompts: 2)"),
        (0.76, 0.06, "what was measured is 1/13 of what was predicted"),
        (0.5, 0.9, ""),
        (1e-300, 1e-300, ""),
    ],
)
def test_a_prediction_that_is_off_is_warned_of(predicted: float, measured: float, told: str) -> None:
    timetable = sdgraph.apply(build(), CACHE).graph.timetable(6)
    found = SearchResult(sdgraph.Chain((CACHE,)), timetable, predicted, measured, 2)
    assert told in found.warning
    assert bool(told) == bool(found.warning) == ("warning:" in str(found)) == (found.as_dict()["warning"] is not None)
    assert ("more prompts, 16 to 32" in " ".join(str(found).split())) == bool(told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        (
            {"budget": 0.01},
            ScheduleError,
            "no schedule meets a budget of 0.01: these candidates need at least 0.[0-9]+",
        ),
        ({"budget": 1.5}, SpecError, "the budget is 1.5"),
        ({"candidates": ()}, SpecError, "no candidates"),
        ({"candidates": (CleanUp(),)}, SpecError, "has no sites"),
        ({"candidates": (HoistInvariants(),)}, SpecError, "has no sites to give a schedule"),
        ({"output_type": "pil"}, SpecError, "search sets output_type itself"),
        ({"pipe": object()}, SourceError, "object has no UNet"),
    ],
)
def test_what_cannot_be_searched(
    pipe: StableDiffusionPipeline, change: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    given = {"pipe": pipe, "candidates": CANDIDATES[:1], "prompts": ["a red circle"], "budget": 0.9, **change}
    with pytest.raises(error, match=complaint):
        sdgraph.search(**given, **{**OPTIONS, "num_inference_steps": 2})
