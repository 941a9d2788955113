"""Prompts whose tensor is made anew at every call, and timesteps that rise: speed is not lost in silence."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, EulerAncestralDiscreteScheduler
from hypothesis import strategies as st
from torch import Tensor

import sdgraph
from sdgraph import GraphUNet
from sdgraph.passes import InheritFeatures

from ..loops import Loop, calls_that_compute
from ..models import CROSS, ONE_LEVEL, answer, build, call_of

TEXT = torch.randn(2, 5, CROSS, generator=torch.Generator().manual_seed(5))
PROMPTS: dict[str, Callable[[], Tensor]] = {
    "one tensor": lambda: TEXT,
    "cat": lambda: torch.cat([TEXT[:1], TEXT[1:]]),
    "expand": lambda: TEXT[:1].expand(2, -1, -1),
    "clone": TEXT.clone,
    "to": lambda: TEXT.double().float(),
}


@pytest.fixture(scope="module")
def alternating() -> GraphUNet:
    """Inherits at every second call."""
    return sdgraph.apply(build(**ONE_LEVEL), InheritFeatures.deep_cache(2, branch=0), verify=False)


@pytest.fixture
def caching(alternating: GraphUNet) -> GraphUNet:
    return copy.deepcopy(alternating)


def run(unet: GraphUNet, scheduler: Any, prompt: Callable[[], Tensor], **more: Callable[[], Any]) -> None:
    """A loop of one's own."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            given = {name: make() for name, make in more.items()}
            noise = unet(scheduler.scale_model_input(latents, timestep), timestep, prompt(), **given).sample
            latents = scheduler.step(noise, timestep, latents).prev_sample


class Pipe:
    def __init__(self, unet: GraphUNet, scheduler: Any) -> None:
        self.unet, self.scheduler = unet, scheduler


@contextlib.contextmanager
def told(unet: GraphUNet, scheduler: Any, how: str) -> Iterator[None]:
    pipe = Pipe(unet, scheduler)
    blocks = {"attached": lambda: sdgraph.attach(pipe), "expected": lambda: unet.expecting(scheduler)}
    with blocks.get(how, contextlib.nullcontext)():  # type: ignore[operator]
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [DDIMScheduler, DDIMInverseScheduler, EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize("how", ["expected", "attached", "not known"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_equal_contents_are_one_prompt_or_it_is_said(
    prompt: str, how: str, make: Any, caching: GraphUNet, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    calls, scheduler = calls_that_compute(caching, monkeypatch), make()
    scheduler.set_timesteps(4)
    with told(caching, scheduler, how):
        for _ in range(2):  # the second generation has the same prompt
            run(caching, scheduler, PROMPTS[prompt])
    if how != "not known":
        assert calls == [True, False] * 4
        assert not caplog.records
        assert caching.cache_bytes() == 0
    else:
        assert calls[1] is False or len(caplog.records) == 1


@pytest.mark.parametrize("how", ["expected", "not known"])
def test_other_conditioning_that_is_made_anew(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as SDXL's time ids. Latents tell whose call it is, so the same contents suffice."""
    unet = sdgraph.apply(build("sdxl"), InheritFeatures.deep_cache(2), verify=False)
    calls, scheduler = calls_that_compute(unet, monkeypatch), DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    added = call_of(unet)["added_cond_kwargs"]
    caplog.clear()
    with told(unet, scheduler, how):
        run(unet, scheduler, lambda: TEXT, added_cond_kwargs=lambda: {n: t.clone() for n, t in added.items()})
    assert calls == [True, False, True, False]
    assert not caplog.records
    with told(unet, scheduler, how):  # and other contents are another generation
        run(unet, scheduler, lambda: TEXT, added_cond_kwargs=lambda: {n: torch.rand_like(t) for n, t in added.items()})
    assert calls[4:] == [True] * 4


def test_values_end_with_the_block_or_the_attachment(caching: GraphUNet) -> None:
    """An interrupted generation whose prompt is gone keeps nothing beyond them, and one with a prompt ends with it."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    for how in ("expected", "attached"):
        kept = TEXT.clone()
        with told(caching, scheduler, how):
            answer(caching, {**call_of(caching), "timestep": scheduler.timesteps[0], "encoder_hidden_states": kept})
            assert caching.cache_bytes() > 0
        del kept
        gc.collect()
        assert caching.cache_bytes() == 0


KINDS = ("one tensor", "a separate tensor", "made anew", "made anew and kept")


@hypothesis.given(
    st.lists(st.sampled_from("AB"), min_size=3, max_size=9),
    st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    st.sampled_from(["expected", "not known"]),
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_samples_by_turns_never_share_features(
    caching: GraphUNet, turns: list[str], kinds: tuple[str, str], how: str
) -> None:
    """Two samples with equal prompts: every output is that of a call that inherits from the same sample, or nothing."""
    caching.reset()
    text, kept = TEXT[:1], []
    timesteps = [float(timestep) for timestep in range(900, 0, -100)]
    own = {name: text.clone() for name in "AB"}
    loops = {name: Loop(caching, ord(name), text) for name in "AB"}
    calls: dict[str, int] = dict.fromkeys("AB", 0)
    fresh: dict[str, list[dict[str, Tensor]]] = {"A": [], "B": []}
    with caching.expecting(timesteps) if how == "expected" else contextlib.nullcontext():
        for name in turns:
            kind = kinds["AB".index(name)]
            prompt = {"one tensor": text, "a separate tensor": own[name]}.get(kind)
            loops[name].prompt = text.clone() if prompt is None else prompt
            if kind == "made anew and kept":
                kept.append(loops[name].prompt)
            latents, timestep = loops[name].latents, timesteps[calls[name]]
            output = loops[name](timestep)  # type: ignore[arg-type]
            if prompt is None:
                loops[name].prompt = text
            calls[name] += 1
            call = {"sample": latents, "timestep": timestep, "encoder_hidden_states": text}
            with torch.no_grad():
                computed, values = caching.compute({}, **call)
                inherited = [caching.compute(value, **call)[0] for value in fresh[name]]
            assert any(torch.equal(output, candidate) for candidate in (computed, *inherited))
            fresh[name].append(values)
