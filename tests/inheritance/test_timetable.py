"""The timetable says what the calls of a generation do and cost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import assume, given, settings, strategies
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sdgraph
from sdgraph import Graph, GraphUNet
from sdgraph.errors import PathError, ScheduleError, SdgraphError, SpecError
from sdgraph.forecasts import Polynomial
from sdgraph.passes import Bypass, HoistInvariants, InheritFeatures
from sdgraph.schedules import (
    DenseCenter,
    DenseEarly,
    DenseLate,
    Drift,
    Explicit,
    Gate,
    Once,
    Range,
    SamplingRun,
    Schedule,
    Uniform,
    Warm,
)

from ..models import CROSS, build


@pytest.mark.slow
def test_what_a_step_costs(whole: Graph) -> None:
    unet = sdgraph.apply(whole, InheritFeatures.deep_cache(3, branch=0))
    (site,) = unet.graph.sites
    assert re.search(r"reused\n  Uniform\(3\): up_blocks.3.resnets.2; without: \d+.\d% of the MACs", str(unet.graph))
    assert unet.graph.call_macs([site]) < 0.15 * unet.graph.macs == 0.15 * unet.graph.call_macs()
    full, partial = (
        unet.variant(frozenset(unet.graph.inputs[i].name for i in range(3)), frozenset(s)) for s in ((), (site,))
    )
    assert len(partial.graph.nodes) < len(full.graph.nodes) / 8
    assert (full.meta["reads"], full.meta["writes"]) == ((), (site,))
    assert (partial.meta["reads"], partial.meta["writes"]) == ((site,), ())


@pytest.mark.slow
def test_a_timetable_says_what_calls_do(
    run: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    whole: Graph,
) -> None:
    unet = sdgraph.apply(whole, [InheritFeatures.deep_cache(3, 1), InheritFeatures("**.attn1", Warm(Uniform(2), 2))])
    table = unet.graph.timetable(8)
    ran: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    module = unet.backend.module

    def noted(given: frozenset[str], inherited: frozenset[str] = frozenset()) -> Any:
        made = module(given, inherited)
        ran.append((made.meta["writes"], made.meta["reads"]))
        return made

    monkeypatch.setattr(unet.backend, "module", noted)
    run(unet, steps=8)
    planned = {call: (v.computed, v.reads) for v in table.variants for call in v.calls}
    assert ran == [planned[call] for call in range(8)]
    assert table.bound == 8 * unet.graph.macs / table.macs > 1
    assert "8 calls: ■ computed □ reused · not needed" in str(table)
    assert json.loads(json.dumps(table.as_dict()))["refreshes"]["up_blocks.3.resnets.1"] == [0, 3, 6]
    table.draw(tmp_path / "table.svg")
    assert "up_blocks.3.resnets.1" in (tmp_path / "table.svg").read_text()
    with pytest.raises(ScheduleError, match="without calls"):
        unet.graph.timetable(0)


# -- the law ------------------------------------------------------------------------------------------------------

few = strategies.integers(1, 4)
leaf_schedules: strategies.SearchStrategy[Schedule] = strategies.one_of(
    strategies.builds(Uniform, few),
    strategies.builds(Explicit, strategies.sets(strategies.integers(1, 9)).map(lambda steps: (0, *sorted(steps)))),
    strategies.builds(DenseEarly, few),
    strategies.builds(DenseLate, few),
    strategies.builds(DenseCenter, few, center=few),
    strategies.just(Once()),
)
schedules = strategies.recursive(
    leaf_schedules,
    lambda inner: strategies.one_of(
        strategies.builds(Gate, few, inner, strategies.none() | inner),
        strategies.integers(0, 800).flatmap(
            lambda low: strategies.builds(Range, *map(strategies.just, (low, low + 300)), inner)
        ),
        strategies.builds(Warm, inner, few, few),
    ),
    max_leaves=3,
)
drifts = strategies.builds(Drift, strategies.sampled_from((0.05, 0.3, 1.0)), strategies.just(1), few)
modules = strategies.sampled_from(
    (
        *("mid_block", "**.ff", "**.attn1", "**.attn2", "conv_in", "time_embedding", "up_blocks.0", "down_blocks.-1"),
        *("up_blocks.-1.resnets.-1", "up_blocks.-1.resnets.-2", "down_blocks.0.resnets.-1", "mid_block.attentions.-1"),
        *("{conv_in,down_blocks.*,mid_block}", "up_blocks.-1.attentions.-1.transformer_blocks.-1.ff"),
    )
)
forecasts = strategies.sampled_from((0, 0, 1, 2, Polynomial(1, 0.5, "lambda")))
inheriting = strategies.builds(
    InheritFeatures, modules, schedules | drifts, strategies.sampled_from(("auto", "value", "entry")), forecasts
)
passes = inheriting | inheriting | strategies.builds(Bypass, modules, schedules) | strategies.just(HoistInvariants())
SOLVERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"steps_offset": 1},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "EulerDiscreteScheduler": {"timestep_spacing": "trailing"},
    "HeunDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": {"original_inference_steps": 50},
    "EulerAncestralDiscreteScheduler": {},
}


@pytest.fixture(scope="module")
def tiny() -> GraphUNet:
    """A tiny UNet, which is not run before its timetable is asked for."""
    return sdgraph.apply(build(), (), verify=False)


class Counted:
    """The multiply-accumulates that the calls of a UNet really take."""

    def __init__(self, unet: GraphUNet, monkeypatch: pytest.MonkeyPatch) -> None:
        self.macs: list[int] = []
        self.kinds: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        self.kept: list[int] = []
        compute, module = unet.backend.compute, unet.backend.module

        macs: dict[frozenset[str], int] = {}  # of straight-line modules: counting once is enough, and counting is slow

        def counted(flat: Any, reused: frozenset[str], read: Any) -> Any:
            if reused in macs:
                result = compute(flat, reused, read)
            else:
                with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted
                    result = compute(flat, reused, read)
                macs[reused] = counter.get_total_flops() // 2
            self.macs.append(macs[reused])
            return result

        def noted(given: frozenset[str], reused: frozenset[str]) -> Any:
            made = module(given, reused)
            self.kinds.append((made.meta.get("writes", ()), made.meta.get("reads", ())))
            return made

        monkeypatch.setattr(unet.backend, "compute", counted)
        monkeypatch.setattr(unet.backend, "module", noted)
        self.unet = unet

    def generate(self, scheduler: Any, text_length: int = 77, side: int = 8, batch: int = 1) -> None:
        """Make the calls of a generation with a scheduler that is attached."""
        draw = torch.Generator().manual_seed(0)
        latents = torch.randn(batch, 4, side, side, generator=draw) * scheduler.init_noise_sigma
        text = torch.randn(batch, text_length, CROSS, generator=draw)
        pipe = _Pipe(unet=self.unet, scheduler=scheduler)
        with torch.no_grad(), sdgraph.attach(pipe):
            for timestep in scheduler.timesteps:
                sample = scheduler.scale_model_input(latents, timestep)
                output = self.unet(sample, timestep, text).sample
                self.kept.append(self.unet.cache_bytes())
                latents = (
                    scheduler.step(output, timestep, latents, generator=draw).prev_sample
                    if _draws(scheduler)
                    else scheduler.step(output, timestep, latents).prev_sample
                )


class _Pipe(SimpleNamespace):
    """The parts of a pipeline that `attach` reads."""


def _draws(scheduler: Any) -> bool:
    return isinstance(scheduler, diffusers.LCMScheduler | diffusers.EulerAncestralDiscreteScheduler)


@pytest.mark.law("A timetable lists exactly what the calls of a generation compute and reuse.")
@pytest.mark.slow
@settings(max_examples=15)
@given(
    plan=strategies.lists(passes, min_size=1, max_size=3),
    solver=strategies.sampled_from(sorted(SOLVERS)),
    steps=strategies.integers(1, 8),
)
def test_a_timetable_is_what_is_computed(tiny: GraphUNet, plan: list[Any], solver: str, steps: int) -> None:
    """Whatever the plan, the solver and the number of steps: the same multiply-accumulates and the same sites, call by
    call; where the drift of features decides, one of the kinds that the timetable has for the call."""
    graph = tiny.graph.copy()
    for one in plan:
        trial = graph.copy()
        try:
            one.run(trial)
        except SdgraphError:
            continue  # does not fit what came before
        graph = trial
    assume(graph.sites)
    unet = GraphUNet(graph)
    scheduler = getattr(diffusers, solver)(**SOLVERS[solver])
    scheduler.set_timesteps(steps)
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(unet, patch)
        try:
            table = unet.graph.timetable(scheduler)
        except ScheduleError:
            with pytest.raises(ScheduleError):
                counted.generate(scheduler)
            return
        counted.generate(scheduler)
    may_go = {name for name, site in unet.graph.sites.items() if site.bypassed}
    assert len(counted.macs) == table.run.calls
    for call, (macs, (gives, takes)) in enumerate(zip(counted.macs, counted.kinds, strict=True)):
        planned = {
            (v.macs, tuple(n for n in v.computed if n not in may_go), v.reads)
            for v in table.variants
            if call in v.calls
        }
        assert (macs, gives, takes) in planned
        for name in unet.graph.sites:
            sign = table.row(name)[call]
            assert sign == "◇" or (sign in "□◪") == (name in takes)
            assert sign == "◇" or name in may_go or (sign == "■") == (name in gives)
    drifting = any(isinstance(site.schedule, Drift) for site in unet.graph.sites.values())
    total = sum(counted.macs)
    assert (table.least_macs <= total <= table.macs) if drifting else (table.least_macs == total == table.macs)
    assert max(counted.kept) <= table.cache_bytes


@given(steps=strategies.integers(1, 1000))
def test_of_a_number_of_calls_the_timesteps_are_those_of_a_pipeline(steps: int) -> None:
    scheduler = DDIMScheduler(steps_offset=1)  # as Stable Diffusion is published
    scheduler.set_timesteps(steps)
    assert SamplingRun(steps).supposed().timesteps == SamplingRun.of(scheduler).timesteps


def test_a_table_says_what_it_supposes(tiny: GraphUNet) -> None:
    unet = sdgraph.apply(tiny, InheritFeatures("**.attn1", Range(300, 850)), verify=False)
    table = unet.graph.timetable(10)
    row = "■□■□■□■■■■"
    assert {table.row(name) for name in unet.graph.sites} == {row}
    assert "supposed: timesteps 901 to 1, evenly spaced, for want of a scheduler; costs at B=1, H=8, W=8, L=77" in (
        str(table)
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    other = unet.graph.timetable(scheduler)
    assert {other.row(name) for name in unet.graph.sites} != {row}
    assert "timesteps 999 to 0, DPMSolverMultistepScheduler" in str(other)
    assert other.as_dict()["timesteps"] == scheduler.timesteps.tolist()
    assert "nothing is reused" in str(tiny.graph.timetable(3))


def test_costs_at_other_sizes(tiny: GraphUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sdgraph.apply(
        tiny, [InheritFeatures("**.attn2", Gate(2)), InheritFeatures("**.ff", Uniform(2))], verify=False
    )
    counted, scheduler = Counted(unet, monkeypatch), DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(5)
    counted.generate(scheduler, text_length=5, side=12, batch=2)
    table = unet.graph.timetable(5, B=2, H=12, W=12, L=5)
    assert counted.macs == [next(v.macs for v in table.variants if call in v.calls) for call in range(5)]
    assert table.macs != unet.graph.timetable(5).macs
    assert max(counted.kept) == table.cache_bytes
    for sizes in ({"X": 2}, {"B": 0}, {"H": 1.5}, {"B": True}):
        with pytest.raises(SpecError):
            unet.graph.timetable(5, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("calls", [0, -1, True, 2.5, "25", None, [], [float("nan")], ["x"]])
def test_what_says_nothing_about_calls(tiny: GraphUNet, calls: Any) -> None:
    with pytest.raises(ScheduleError):
        tiny.graph.timetable(calls)
    with pytest.raises(ScheduleError):
        tiny.expecting(calls)


def test_a_site_that_is_not_there(tiny: GraphUNet) -> None:
    table = sdgraph.apply(tiny, InheritFeatures.deep_cache(), verify=False).graph.timetable(3)
    with pytest.raises(PathError, match=r"resnets\.1"):
        table.row("up_blocks.1.resnets.7")
