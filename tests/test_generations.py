"""Calls that are no plain generation: with gradients, edited conditioning, samples by turns, tensors edited by callers.

Whatever happens between calls, an output is that of a UNet that never saw anything else.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import hypothesis
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import EditError
from sdgraph.passes import HoistInvariants, InheritFeatures
from sdgraph.schedules import Explicit, Uniform, Warm

from .models import CROSS, answer, build, call_of

DEEP_CACHE = InheritFeatures("up_blocks.-1.resnets.-1", part="entry")


@pytest.fixture(scope="module")
def source() -> Any:
    return build()


@pytest.fixture(scope="module")
def applied(source: Any) -> dict[str, GraphUNet]:
    inherit = "InheritFeatures('up_blocks.-1.resnets.-1', Uniform(3), part='entry')"
    return {"inherit": sdgraph.apply(source, inherit), "hoist": sdgraph.apply(source, HoistInvariants())}


@pytest.fixture
def inheriting(applied: dict[str, GraphUNet]) -> GraphUNet:
    return copy.deepcopy(applied["inherit"])  # which has seen no calls


@pytest.fixture
def hoisting(applied: dict[str, GraphUNet]) -> GraphUNet:
    return copy.deepcopy(applied["hoist"])


def noise(seed: int) -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


class Loop:
    """A loop of a caller's own: DDIM without a scheduler, one call at a time."""

    def __init__(self, unet: Any, seed: int, prompt: Tensor):
        self.unet, self.latents, self.prompt = unet, noise(seed), prompt

    def __call__(self, timestep: int) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.unet(self.latents, timestep, self.prompt).sample
        self.latents = 0.95 * self.latents - 0.1 * output
        return output


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["sample", "encoder_hidden_states"])
@pytest.mark.parametrize("passes", [DEEP_CACHE, HoistInvariants()], ids=["inherit", "hoist"])
def test_gradients_of_inputs_are_the_sources(wanted: str, passes: Any, source: Any, caplog: Any) -> None:
    """With frozen weights: guidance by gradients, inversion of the prompt."""
    frozen = copy.deepcopy(source).requires_grad_(False)
    unet = sdgraph.apply(frozen, passes)
    call = call_of(source)
    with torch.no_grad():  # an ordinary call of the same generation comes before
        unet(**{**call, "timestep": 9})
    call[wanted].requires_grad_(True)
    for timestep in (8, 7, 6):
        expected, found = (
            torch.autograd.grad(each(**{**call, "timestep": timestep}).sample.square().sum(), call[wanted])[0]
            for each in (frozen, unet)
        )
        assert torch.equal(expected, found)
    assert "gradients are on" in caplog.text


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp's own
def test_forward_derivatives_are_the_sources(source: Any) -> None:
    frozen = copy.deepcopy(source).requires_grad_(False)
    unet, call = sdgraph.apply(frozen, DEEP_CACHE), call_of(source)
    tangent = torch.randn_like(call["sample"])
    for timestep in (8, 7):

        def of_latents(unet: Any, timestep: int = timestep) -> Callable[[Tensor], Tensor]:
            return lambda latents: unet(**{**call, "sample": latents, "timestep": timestep}).sample

        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivatives
            expected, found = (
                torch.func.jvp(of_latents(each), (call["sample"],), (tangent,))[1] for each in (frozen, unet)
            )
        assert torch.allclose(expected, found, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(unet(**call).sample, frozen(**call).sample)


def test_weights_are_copied_when_gradients_come_and_not_before(source: Any) -> None:
    unet, call = sdgraph.apply(source), call_of(source)
    before = {n: p.detach().clone() for n, p in source.named_parameters()}
    shared = {n: p.data_ptr() for n, p in source.named_parameters()}
    output = unet(**call).sample
    assert {n: p.data_ptr() for n, p in unet.named_parameters()} == shared  # a call that forgot no_grad copies nothing
    output.sum().backward()
    torch.optim.SGD(unet.parameters(), 0.1).step()
    assert all(torch.equal(before[n], p) for n, p in source.named_parameters())
    assert not torch.equal(unet(**call).sample, source(**call).sample)


def test_gradients_by_autograd_and_a_step_by_hand(source: Any) -> None:
    unet, call = sdgraph.apply(source), call_of(source)
    before = source.conv_out.weight.detach().clone()
    weight = unet.get_parameter("conv_out.weight")
    (gradient,) = torch.autograd.grad(unet(**call).sample.sum(), weight)
    with torch.no_grad():
        weight -= gradient
    assert torch.equal(source.conv_out.weight, before)


# -- conditioning edited in place -------------------------------------------------------------------------------------


def by_numpy(prompt: Tensor) -> None:
    prompt.numpy()[:] *= 2


def by_data(prompt: Tensor) -> None:
    prompt.data.mul_(2)


def in_place(prompt: Tensor) -> None:
    prompt.mul_(2)


@pytest.mark.parametrize("edit", [in_place, by_data, by_numpy])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_edited_prompt_is_noticed(edit: Callable[[Tensor], None], mode: Any, source: Any, hoisting: Any) -> None:
    with mode():
        prompt = torch.randn(1, 5, CROSS)
        loop = Loop(hoisting, 0, prompt)
        for timestep in (900, 800):
            loop(timestep)
        edit(prompt)
        latents = loop.latents
        assert torch.equal(loop(700), source(latents, 700, prompt).sample)


@pytest.mark.slow
def test_an_edited_prompt_is_noticed_in_an_attached_pipeline(pipe: StableDiffusionPipeline) -> None:
    def edit(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            values["prompt_embeds"].mul_(0.5)
        return values

    def run(unet: Any) -> Tensor:
        own, pipe.unet = pipe.unet, unet
        options = {"callback_on_step_end": edit, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        with torch.inference_mode():
            images: Tensor = pipe(
                "a red circle", num_inference_steps=5, generator=torch.Generator().manual_seed(0),
                output_type="latent", **options,
            ).images  # fmt: skip
        pipe.unet = own
        return images

    hoisting = sdgraph.apply(pipe.unet, HoistInvariants(), verify=False)
    expected = run(pipe.unet)
    assert torch.equal(run(hoisting), expected)
    own, pipe.unet = pipe.unet, hoisting
    with sdgraph.attach(pipe):
        pipe.unet = own
        assert torch.equal(run(hoisting), expected)


def test_invariants_serve_all_samples_with_one_prompt(hoisting: GraphUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values depend on the prompt alone: they are computed once, whoever comes with it."""
    prompt, hoisted = torch.randn(1, 5, CROSS), frozenset(hoisting.graph.sites)
    stale: list[frozenset[str]] = []
    variant = hoisting.variant
    monkeypatch.setattr(hoisting, "variant", lambda given, sites: stale.append(sites) or variant(given, sites))
    for loop, timestep in itertools.product((Loop(hoisting, 0, prompt), Loop(hoisting, 1, prompt)), (900, 800)):
        loop(timestep)
    assert stale == [frozenset(), *[hoisted] * 3]


# -- whose call is it -------------------------------------------------------------------------------------------------

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
            computed, fresh = unet.step({}, **call)
            own = [unet.step(value, **call)[0] for value in values[name]]
        assert any(torch.equal(output, candidate) for candidate in (computed, *own))
        values[name].append(fresh)


@pytest.mark.parametrize("turns", TURNS)
def test_samples_by_turns_with_one_prompt(turns: str, inheriting: GraphUNet) -> None:
    check_turns(turns, inheriting)


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
            computed, _ = copies[name].step({}, sample=latents, timestep=timestep, encoder_hidden_states=prompt)
            if f"{name}{timestep}" != "A800":
                assert torch.equal(output, computed)


def test_one_image_after_another_with_one_prompt(inheriting: GraphUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each inherits like the first, told of the calls or not."""
    prompt, timesteps = torch.randn(1, 5, CROSS), (900, 800, 700, 600)
    stale: list[bool] = []
    variant = inheriting.variant
    monkeypatch.setattr(inheriting, "variant", lambda given, sites: stale.append(bool(sites)) or variant(given, sites))
    for seed in range(2):
        loop = Loop(inheriting, seed, prompt)
        for timestep in timesteps:
            loop(timestep)
    with inheriting.expecting(timesteps):
        for seed in range(2):
            loop = Loop(inheriting, seed, prompt)
            for timestep in timesteps:
                loop(timestep)
    assert stale == [False, True, True, False] * 4


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


def test_samples_at_different_timesteps(source: Any, inheriting: GraphUNet, caplog: Any) -> None:
    call = call_of(source, B=2)
    for timesteps in ([900, 500], [900, 400], [800, 300]):
        call["timestep"] = torch.tensor(timesteps)
        assert torch.equal(answer(inheriting, call), answer(source, call))
    assert "different timesteps" in caplog.text
    for timestep in (200, 200):
        call["timestep"] = torch.tensor([timestep, timestep])
        answer(inheriting, call)
    assert inheriting.cache_bytes() > 0  # one timestep for all, one number for each: a generation


# -- tensors of the caller's ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["conv_out", "conv_in"])
def test_callers_may_edit_what_they_gave_and_got(site: str, source: Any) -> None:
    unet = sdgraph.apply(source, f"InheritFeatures('{site}', Uniform(9))")
    untouched = copy.deepcopy(unet)
    call = call_of(source, B=1)
    latents, values = call["sample"].clone(), dict[str, Tensor]()
    for timestep in (900, 800, 700):
        given = {**call, "sample": latents.clone(), "timestep": timestep}
        with torch.no_grad():
            output = unet(**given).sample
            expected, fresh = untouched.step(values, **{**call, "sample": latents, "timestep": timestep})
        assert torch.equal(output, expected)
        values |= {name: value.clone() for name, value in fresh.items()}
        output.mul_(3)
        given["sample"].mul_(5)


def test_the_functional_form_hands_out_no_tensor_twice(source: Any) -> None:
    unet = sdgraph.apply(source, "InheritFeatures('conv_out', Uniform(9))")
    call = call_of(source)
    with torch.no_grad():
        output, values = unet.step({}, **call)
        kept = values["conv_out"].clone()
        output.zero_()
        again, _ = unet.step(values, **call)
        again.zero_()
    assert torch.equal(values["conv_out"], kept)


def test_the_graph_of_a_unet_is_not_edited(inheriting: GraphUNet) -> None:
    """Its calls are compiled once; an edit would reach some of them."""
    graph = inheriting.graph
    (site,) = graph.sites
    for edit in (
        lambda: graph.reschedule(site, Explicit((0,))),
        lambda: graph.bypass("mid_block"),
        lambda: graph.replace("mid_block", lambda x, *_: x),
        lambda: graph.add_parameter("extra", torch.zeros(1)),
        lambda: graph.rewire(graph.output, graph.output),
        lambda: graph.erase(graph.output),
        lambda: graph.inherit(graph.output, "output", Explicit((0,))),
        lambda: graph.eliminate_dead_code(),
    ):
        with pytest.raises(EditError, match="belongs to a GraphUNet") as caught:
            edit()
        assert "copy" in caught.value.hint
    twin = graph.copy()
    twin.reschedule(site, Explicit((0,)))
    assert GraphUNet(twin).graph.sites[site].schedule == Explicit((0,))


# -- attached schedulers ----------------------------------------------------------------------------------------------


def counted(unet: GraphUNet, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    calls: list[bool] = []
    variant = unet.variant
    monkeypatch.setattr(unet, "variant", lambda given, sites: calls.append(not sites) or variant(given, sites))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("order", ["text first", "image first"])
def test_pipelines_that_share_a_scheduler(
    order: str, pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `pipe.components` makes them: each knows how many calls it made last, and only one of them is running."""
    unet = sdgraph.apply(pipe.unet, InheritFeatures("mid_block", Warm(Uniform(4), last=1)), verify=False)
    text = StableDiffusionPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    image = StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    for each in (text, image):
        each.set_progress_bar_config(disable=True)
    calls = counted(unet, monkeypatch)
    start = torch.rand(1, 3, 64, 64)
    for each in (text, image) if order == "text first" else (image, text):
        sdgraph.attach(each)
    for _ in range(2):
        image("a red circle", start, strength=0.5, num_inference_steps=8, output_type="latent")
        text("a red circle", num_inference_steps=7, output_type="latent")
        assert [i for i, full in enumerate(calls) if full] == [0, 3, 4, 8, 10]
        calls.clear()


@pytest.mark.slow
def test_a_loop_of_ones_own_on_an_attached_scheduler(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = sdgraph.apply(pipe.unet, InheritFeatures.deep_cache(3, branch=1), verify=False)
    text = StableDiffusionPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    text.set_progress_bar_config(disable=True)
    calls = counted(unet, monkeypatch)
    with sdgraph.attach(text):
        text("a red circle", num_inference_steps=4, output_type="latent")
        calls.clear()
        prompt, _ = text.encode_prompt("a red circle", "cpu", 1, False)
        text.scheduler.set_timesteps(10)
        for seed in range(2):  # one image after the other, with one prompt
            latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
            for timestep in text.scheduler.timesteps:
                with torch.no_grad():
                    output = unet(latents, timestep, prompt).sample
                latents = text.scheduler.step(output, timestep, latents).prev_sample
            if isinstance(text.scheduler, DPMSolverMultistepScheduler):
                text.scheduler._step_index = None
    assert calls == [i % 3 == 0 for i in range(10)] * 2


def test_a_run_that_ends_early_is_known_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's `denoising_end`: the schedule is laid over the calls that are made."""
    unet = sdgraph.apply(build("sdxl"), InheritFeatures("mid_block", Explicit((0, 3), of=6)), verify=False)
    pipe = StableDiffusionXLPipeline(None, None, None, None, None, unet, DDIMScheduler())  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    calls = counted(unet, monkeypatch)
    prompts = {"prompt_embeds": torch.randn(1, 5, CROSS), "pooled_prompt_embeds": torch.randn(1, 16)}
    with sdgraph.attach(pipe):
        pipe(
            **prompts, num_inference_steps=10, denoising_end=0.6, guidance_scale=1.0, output_type="latent",
            height=64, width=64,
        )  # fmt: skip
    assert [i for i, full in enumerate(calls) if full] == [0, 3]
    assert len(calls) == 6


@pytest.mark.parametrize("case", ["variances", "autocast", "one channel"])
def test_latents_are_followed_whatever_the_prediction_is(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With variances behind the noise, in another dtype than the latents, with fewer channels than the sample."""
    changes = {"variances": {"out_channels": 8}, "one channel": {"out_channels": 1}}.get(case, {})
    unet = sdgraph.apply(build(**changes), "InheritFeatures('mid_block', Uniform(2))", verify=False)
    calls = counted(unet, monkeypatch)
    prompt, latents = torch.randn(1, 5, CROSS), noise(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        for timestep in (900, 800, 700):
            prediction = unet(latents, timestep, prompt).sample
            latents = latents.clone()
            latents[:, : prediction.shape[1]] -= 0.1 * prediction[:, :4]
    assert calls == [True, False, True]
