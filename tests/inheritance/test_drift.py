"""`Drift`: refreshes as often as features drift."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline

import sdgraph
from sdgraph.errors import ScheduleError
from sdgraph.forecasts import Polynomial
from sdgraph.passes import InheritFeatures
from sdgraph.schedules import Drift, Uniform

from ..loops import calls_that_compute


def test_gaps_widen_and_narrow_within_bounds() -> None:
    drift = Drift(0.1, least=1, most=3)
    assert [drift.next_gap(gap, 0.01) for gap in (1, 2, 3)] == [2, 3, 3]
    assert [drift.next_gap(gap, 0.07) for gap in (1, 2, 3)] == [1, 2, 3]
    assert [drift.next_gap(gap, 0.5) for gap in (1, 2, 3)] == [1, 1, 2]
    assert drift.next_gap(3, float("nan")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("bound", "computed"), [(9.0, [0, 1, 3, 6, 9]), (1e-9, list(range(11)))])
def test_calls_that_compute(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], monkeypatch: Any, bound: float, computed: list[int]
) -> None:
    """Every call computes if no drift is borne; if any is, gaps grow to the widest."""
    unet = sdgraph.apply(pipe.unet, replace(InheritFeatures.deep_cache(), schedule=Drift(bound, 1, 3)))
    calls = calls_that_compute(unet, monkeypatch)
    run(unet, steps=11)
    assert [number for number, whole in enumerate(calls) if whole] == computed


@pytest.mark.slow
def test_the_error_is_that_of_the_forecast(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], monkeypatch: Any
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(Drift, "next_gap", lambda self, gap, error: seen.append(error) or gap)
    one, own = replace(InheritFeatures.deep_cache(), schedule=Drift(0.1, least=2)), pipe.unet
    for forecast in (0, 1):
        run(sdgraph.apply(own, replace(one, forecast=forecast)), steps=9)
    repeated, line = seen[:4], seen[4:]
    assert repeated[0] == line[0]  # after one refresh there is no line yet
    assert all(0 < error < 1 for error in seen)
    assert repeated[1:] != line[1:]


@pytest.mark.slow
def test_a_timetable_holds_every_graph_that_drift_may_need(pipe: StableDiffusionPipeline) -> None:
    unet = sdgraph.apply(pipe.unet, replace(InheritFeatures.deep_cache(), schedule=Drift()))
    table = unet.graph.timetable(8)
    (site,) = unet.graph.sites
    assert table.row(site) == "■■◇◇◇◇◇◇"  # the first gap is one call, and the first refresh measures nothing
    assert [variant.calls for variant in table.variants] == [tuple(range(8)), tuple(range(2, 8))]
    assert table.macs == 8 * unet.graph.macs
    assert table.least_macs == 4 * unet.graph.macs + 4 * unet.graph.call_macs([site])  # at 0, 1, 3 and 6: gaps grow
    assert "as features drift" in str(table)


@pytest.mark.slow
def test_forecasts_are_not_made_of_random_steps(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], caplog: Any
) -> None:
    own = pipe.scheduler
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(own.config)
    damped = sdgraph.apply(pipe.unet, InheritFeatures.damped(2))
    repeated = sdgraph.apply(pipe.unet, InheritFeatures.deep_cache(2))
    results = []
    with caplog.at_level(logging.WARNING, "sdgraph"):
        for unet in (damped, repeated):
            pipe.unet = unet
            with sdgraph.attach(pipe):
                results.append(run(unet, steps=6))
    pipe.scheduler = own
    assert torch.equal(*results)
    assert sum("adds random numbers" in record.message for record in caplog.records) == 1


@pytest.mark.slow
def test_noise_levels_are_known_from_an_attached_or_expected_scheduler(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], caplog: Any
) -> None:
    one = replace(InheritFeatures.damped(2), forecast=Polynomial(1, 0.5, "lambda"))
    unet, by_call = sdgraph.apply(pipe.unet, one), sdgraph.apply(pipe.unet, InheritFeatures.damped(2))
    pipe.unet = unet
    with sdgraph.attach(pipe):
        attached = run(unet, steps=7)
    pipe.scheduler.set_timesteps(7)
    with unet.expecting(pipe.scheduler):
        assert torch.equal(run(unet, steps=7), attached)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not torch.equal(run(by_call, steps=7), attached)
    assert torch.equal(run(unet, steps=7), run(by_call, steps=7))  # they are not known
    assert any("sdgraph.attach(pipe)" in record.message for record in caplog.records)


def test_schedules_that_make_no_sense() -> None:
    for options in ({"bound": 0.0}, {"least": 3, "most": 2}, {"least": 0}):
        with pytest.raises(ScheduleError):
            Drift(**options)  # type: ignore[arg-type]
    assert str(Drift(0.2)) == "Drift(0.2)"
    assert Uniform(2) != Drift()
