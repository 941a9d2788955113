"""Samples by turns: an output is that of a UNet that never saw anything else."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import hypothesis
import pytest
import torch
from diffusers import (
    HeunDiscreteScheduler,
)
from hypothesis import strategies as st
from torch import Tensor

import sdgraph
from sdgraph import GraphUNet

from ..loops import Loop, calls_that_compute, noise
from ..models import CROSS, answer, build, call_of

TURNS = [
    "A900 A800 B900 B800 A700",
    "A900 A800 B700 B600 A700",
    "A900 B900 A800 B800 A700 B700",
    "A900 B800 A800 B700 A700",
    "A900 A900 A800 B900 A700",
    "A900 A800 A700 B700 B600 B500",
]


def played(turns: str, unet: Callable[[str], Any], prompt: Tensor) -> list[tuple[str, Tensor, int, Tensor]]:
    """The calls of samples by turns: whose call, its latents, timestep and output."""
    loops = {name: Loop(unet(name), ord(name), prompt) for name in "AB"}
    found = []
    for name, *digits in turns.split():
        timestep, latents = int("".join(digits)), loops[name].latents
        found.append((name, latents, timestep, loops[name](timestep)))
    return found


def check_turns(turns: str, unet: GraphUNet) -> None:
    """No output has features of the other sample: it is what inheriting from its own calls, or nothing, gives."""
    prompt = torch.randn(1, 5, CROSS)
    values: dict[str, list[dict[str, Tensor]]] = {"A": [], "B": []}
    for name, latents, timestep, output in played(turns, lambda _: unet, prompt):
        call = {"sample": latents, "timestep": timestep, "encoder_hidden_states": prompt}
        with torch.no_grad():
            computed, fresh = unet.compute({}, **call)
            own = [unet.compute(value, **call)[0] for value in values[name]]
        assert any(torch.equal(output, candidate) for candidate in (computed, *own))
        values[name].append(fresh)


@pytest.mark.parametrize("turns", TURNS)
def test_samples_by_turns_with_one_prompt(turns: str, inheriting: GraphUNet) -> None:
    check_turns(turns, inheriting)


@pytest.mark.law("No sample reuses features of another one, in whatever order calls of several samples come.")
@hypothesis.given(st.lists(st.tuples(st.sampled_from("AB"), st.integers(1, 9)), min_size=3, max_size=9))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_samples_by_any_turns(inheriting: GraphUNet, turns: list[tuple[str, int]]) -> None:
    check_turns(" ".join(f"{name}{number}00" for name, number in turns), inheriting)


@pytest.mark.parametrize("turns", ["A900 A800 B900 B800 A700", "A900 B900 A800 B800 A700 B700"])
def test_samples_by_turns_where_calls_are_expected(turns: str, inheriting: GraphUNet, caplog: Any) -> None:
    prompt = torch.randn(1, 5, CROSS)
    copies = {name: copy.deepcopy(inheriting) for name in "AB"}
    with inheriting.expecting([900.0, 800.0, 700.0]):
        found = played(turns, lambda _: inheriting, prompt)
    assert "whose calls are whose" in caplog.text
    with torch.no_grad():
        for name, latents, timestep, output in found[2:]:
            computed, _ = copies[name].compute({}, sample=latents, timestep=timestep, encoder_hidden_states=prompt)
            if f"{name}{timestep}" != "A800":
                assert torch.equal(output, computed)


def test_one_image_after_another_with_one_prompt(inheriting: GraphUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each inherits like the first, whether the calls are known or not."""
    prompt, timesteps = torch.randn(1, 5, CROSS), (900, 800, 700, 600)
    reused: list[bool] = []
    module = inheriting.backend.module
    monkeypatch.setattr(
        inheriting.backend, "module", lambda given, sites: reused.append(bool(sites)) or module(given, sites)
    )
    for seed in range(2):
        loop = Loop(inheriting, seed, prompt)
        for timestep in timesteps:
            loop(timestep)
    with inheriting.expecting(timesteps):
        for seed in range(2):
            loop = Loop(inheriting, seed, prompt)
            for timestep in timesteps:
                loop(timestep)
    assert reused == [False, True, True, False] * 4


def test_heun_image_to_image_on_a_used_module(inheriting: GraphUNet) -> None:
    """Its timesteps come in pairs. Whatever ran before with the prompt, and wherever it was interrupted, the latents
    are those of a fresh module: a used one took the first calls for the next ones of the image before."""
    prompt = torch.randn(1, 5, CROSS)
    scheduler = HeunDiscreteScheduler()

    def run(unet: Any, seed: int, calls: Iterable[int]) -> Tensor:
        scheduler.set_timesteps(6)
        latents = noise(seed) * scheduler.init_noise_sigma
        for i in calls:
            timestep = scheduler.timesteps[i]
            if not i or scheduler._step_index is None:
                scheduler.set_begin_index(i)
            with torch.no_grad():
                output = unet(scheduler.scale_model_input(latents, timestep), timestep, prompt).sample
            latents = scheduler.step(output, timestep, latents).prev_sample
        return latents

    rest = range(4, 11)  # image-to-image begins with the second of a pair
    fresh = run(copy.deepcopy(inheriting), 0, rest)
    for begin, end in itertools.product((0, 2, 4), (5, 6, 7, 8, 11)):
        run(inheriting, 1, range(begin, end))
        assert torch.equal(run(inheriting, 0, rest), fresh), (begin, end)
    for end in rest[1:]:
        run(inheriting, 0, range(4, end))  # the same image, interrupted
        assert torch.equal(run(inheriting, 0, rest), fresh), end


def test_samples_at_different_timesteps(unet: Any, inheriting: GraphUNet, caplog: Any) -> None:
    call = call_of(unet, B=2)
    for timesteps in ([900, 500], [900, 400], [800, 300]):
        call["timestep"] = torch.tensor(timesteps)
        assert torch.equal(answer(inheriting, call), answer(unet, call))
    assert "different timesteps" in caplog.text
    for timestep in (200, 200):
        call["timestep"] = torch.tensor([timestep, timestep])
        answer(inheriting, call)
    assert inheriting.cache_bytes() > 0  # one timestep for all, one number for each: a generation


@pytest.mark.parametrize("case", ["variances", "autocast", "one channel"])
def test_latents_are_followed_whatever_the_prediction_is(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With variances behind the noise, in another dtype than the latents, with fewer channels than the sample."""
    changes = {"variances": {"out_channels": 8}, "one channel": {"out_channels": 1}}.get(case, {})
    unet = sdgraph.apply(build(**changes), "InheritFeatures('mid_block', Uniform(2))", verify=False)
    calls = calls_that_compute(unet, monkeypatch)
    prompt, latents = torch.randn(1, 5, CROSS), noise(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        for timestep in (900, 800, 700):
            prediction = unet(latents, timestep, prompt).sample
            latents = latents.clone()
            latents[:, : prediction.shape[1]] -= 0.1 * prediction[:, :4]
    assert calls == [True, False, True]
