"""Feature inheritance: the values are those of reference implementations, and never those of another generation."""

from __future__ import annotations

import copy
import gc
import json
import re
import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from DeepCache import DeepCacheSDHelper
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from scenes import models
from torch._dynamo.testing import CompileCounter

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import CallError, EditError, ModeError, NoChangeError, PathError, ScheduleError, SpecError
from sdgraph.ir.sites import Site
from sdgraph.passes import CleanUp, HoistInvariants, InheritFeatures, PruneBlocks
from sdgraph.schedules import DenseCenter, DenseEarly, DenseLate, Explicit, Gate, Range, Run, Uniform, Warm

from .models import answer, build, call_of

SCHEDULERS = {
    "ddim": DDIMScheduler.from_config,
    "pndm": partial(PNDMScheduler.from_config, skip_prk_steps=True),
    "heun": HeunDiscreteScheduler.from_config,
    "euler": EulerDiscreteScheduler.from_config,
    "euler ancestral": EulerAncestralDiscreteScheduler.from_config,
    "dpm++ 2m": DPMSolverMultistepScheduler.from_config,
    "dpm++ 2m karras": partial(DPMSolverMultistepScheduler.from_config, use_karras_sigmas=True),
    "dpm2 ancestral": KDPM2AncestralDiscreteScheduler.from_config,
    "unipc": UniPCMultistepScheduler.from_config,
    "lcm": LCMScheduler.from_config,
}
RANDOM = ("euler ancestral", "dpm2 ancestral", "lcm")  # samplers that add noise at every step


@pytest.fixture
def run(pipe: StableDiffusionPipeline) -> Any:
    """`run(unet, prompt=..., steps=..., seed=...)`: the final latents; the pipeline is as it was."""
    own, scheduler = pipe.unet, pipe.scheduler

    def latents(unet: Any, prompt: str = "a red circle", steps: int = 5, seed: int = 0, **call: Any) -> torch.Tensor:
        pipe.unet = unet
        generator = torch.Generator().manual_seed(seed)
        return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent", **call).images

    yield latents
    pipe.unet, pipe.scheduler = own, scheduler


# -- against references -----------------------------------------------------------------------------------------------


def intervals_and_branches() -> list[Any]:
    """Each interval and each branch at least once; all of them with the full-size models."""
    chosen = {(2 + branch % 9, branch) for branch in range(12)} | {(3, branch) for branch in range(0, 12, 2)}
    every = [(interval, branch) for branch in range(12) for interval in range(2, 11)]
    return [pytest.param(*each, marks=() if each in chosen else pytest.mark.full) for each in every]


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "branch"), intervals_and_branches())
def test_deep_cache_is_deep_cache(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], interval: int, branch: int
) -> None:
    """Bit for bit the DeepCache package."""
    pipe.unet, own = copy.deepcopy(pipe.unet), pipe.unet
    reference = DeepCacheSDHelper(pipe)
    reference.set_params(cache_interval=interval, cache_branch_id=branch)
    reference.enable()
    theirs = run(pipe.unet, steps=interval + 2)
    reference.disable()
    mine = run(sdgraph.apply(own, InheritFeatures.deep_cache(interval, branch), verify=False), steps=interval + 2)
    assert torch.equal(mine, theirs)


class Broadcast(AttnProcessor2_0):
    """An attention that computes every `interval`-th call only: the plainest reference there is."""

    def __init__(self, interval: int):
        super().__init__()
        self.interval, self.calls = interval, 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.calls % self.interval == 0:
            self.kept = super().__call__(*args, **kwargs)
        self.calls += 1
        return self.kept


def test_units_are_broadcast(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor]) -> None:
    """Self-attention every second call, cross-attention every third."""
    passes = [
        InheritFeatures("*_blocks.*.attentions.*.transformer_blocks.*.attn1", Uniform(2)),
        InheritFeatures("*_blocks.*.attentions.*.transformer_blocks.*.attn2", Uniform(3)),
    ]
    unet = sdgraph.apply(pipe.unet, passes)
    reference = copy.deepcopy(pipe.unet)
    for name, module in reference.named_modules():
        if name.endswith(("attn1", "attn2")) and not name.startswith("mid_block"):
            module.set_processor(Broadcast(2 if name.endswith("attn1") else 3))
    assert torch.equal(run(unet, steps=5), run(reference, steps=5))
    assert len(unet.graph.sites) == 30
    assert len(unet._variants) == 4  # of the 5 steps, only two of the kinds differ: none, both, one, the other, both


def inherited_output(module: torch.nn.Module, interval: int) -> None:
    """Let a module compute every `interval`-th call only."""
    compute, state = module.forward, {"calls": 0}

    def forward(*args: Any, **kwargs: Any) -> Any:
        if state["calls"] % interval == 0:
            state["kept"] = compute(*args, **kwargs)
        state["calls"] += 1
        return state["kept"]

    module.forward = forward


@pytest.mark.parametrize("site", ["mid_block", "down_blocks.1", "up_blocks.2", "down_blocks.0.attentions.0"])
def test_whole_modules(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], site: str) -> None:
    unet = sdgraph.apply(pipe.unet, InheritFeatures(site, Uniform(2), part="value"))
    reference = copy.deepcopy(pipe.unet)
    inherited_output(reference.get_submodule(site), 2)
    assert torch.equal(run(unet), run(reference))


def test_the_branch_of_a_resnet(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor]) -> None:
    """What comes past the resnet is fresh."""
    sites = ("down_blocks.0.resnets.1", "up_blocks.2.resnets.1")  # without and with a shortcut convolution
    unet = sdgraph.apply(pipe.unet, InheritFeatures(sites, Uniform(3)))
    reference = copy.deepcopy(pipe.unet)
    for site in sites:
        inherited_output(reference.get_submodule(site).conv2, 3)
    assert torch.equal(run(unet), run(reference))


def on_schedule(module: torch.nn.Module, refreshes: Callable[[int], bool]) -> None:
    """Let a module compute at the calls that `refreshes` names only: the published methods, in the plainest way."""
    compute, state = module.forward, {"calls": 0}

    def forward(*args: Any, **kwargs: Any) -> Any:
        if refreshes(state["calls"]) or state["calls"] == 0:
            state["kept"] = compute(*args, **kwargs)
        state["calls"] += 1
        return state["kept"]

    module.forward = forward


def test_faster_diffusion(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor]) -> None:
    keys = (0, 1, 2, 4)
    unet = sdgraph.apply(pipe.unet, InheritFeatures.faster_diffusion(keys))
    reference = copy.deepcopy(pipe.unet)
    for module in (reference.conv_in, *reference.down_blocks, reference.mid_block):
        on_schedule(module, keys.__contains__)
    assert torch.equal(run(unet, steps=6), run(reference, steps=6))
    assert InheritFeatures.faster_diffusion().schedule == Explicit((0, 1, 2, 3, 5, 10, 15, 25, 35))


def test_t_gate(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor]) -> None:
    gate, interval, warm_up = 6, 3, 1
    unet = sdgraph.apply(pipe.unet, InheritFeatures.t_gate(gate, interval, warm_up))
    reference = copy.deepcopy(pipe.unet)

    def self_attention(step: int) -> bool:
        return step <= warm_up or step % interval == 0 or step >= gate - 1

    for name, module in reference.named_modules():
        if name.endswith("attn1"):
            on_schedule(module, self_attention)
        elif name.endswith("attn2"):
            on_schedule(module, lambda step: step < gate)
    assert torch.equal(run(unet, steps=8), run(reference, steps=8))


def test_attention_broadcast(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor]) -> None:
    unet = sdgraph.apply(pipe.unet, InheritFeatures.attention_broadcast(2, 3, (300, 800), (100, 900)))
    reference = copy.deepcopy(pipe.unet)
    pipe.scheduler.set_timesteps(7)
    timesteps = pipe.scheduler.timesteps.tolist()
    rules = {
        "attn1": lambda step: not 300 < timesteps[step] < 800 or step % 2 == 0,
        "attn2": lambda step: not 100 < timesteps[step] < 900 or step % 3 == 0,
    }
    for name, module in reference.named_modules():
        if name.endswith(tuple(rules)):
            on_schedule(module, rules[name.rpartition(".")[2]])
    assert torch.equal(run(unet, steps=7), run(reference, steps=7))


@pytest.mark.parametrize("level", ["block", "layer", "unit"])
def test_levels(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], level: str) -> None:
    """The paper's three levels, within two blocks."""
    within = "{mid_block,up_blocks.0,up_blocks.1}"
    unet = sdgraph.apply(pipe.unet, InheritFeatures.at_level(level, Uniform(2), within))
    reference = copy.deepcopy(pipe.unet)
    for name, module in reference.named_modules():
        if not name.startswith(("mid_block", "up_blocks.0", "up_blocks.1")):
            continue
        parent, _, last = name.rpartition(".")
        resnet = parent.endswith("resnets")
        if level == "block" and (name == "mid_block" or parent == "up_blocks"):
            inherited_output(module, 2)
        elif level != "block" and resnet:
            inherited_output(module.conv2, 2)
        elif level == "layer" and parent.endswith("attentions"):
            inherited_output(module.proj_out, 2)
        elif level == "unit" and last in ("attn1", "attn2", "ff"):
            inherited_output(module, 2)
    assert torch.equal(run(unet), run(reference))


def test_forecasts(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor]) -> None:
    """A site that is not refreshed goes on along the line, or the parabola, of its last refreshes."""
    own, site, schedule = pipe.unet, "up_blocks.2", Explicit((0, 2, 3))

    def reference(order: int) -> torch.nn.Module:
        made = copy.deepcopy(own)
        module, known, calls = made.get_submodule(site), [], iter(range(100))
        compute = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            now = next(calls)
            if now in schedule.steps:
                known.append((now, compute(*args, **kwargs)))
                return known[-1][1]
            last = known[-1 - order :]
            coefficients = np.polyfit([n for n, _ in last], np.eye(len(last)), len(last) - 1)
            weights = [np.polyval(column, now) for column in coefficients.T]
            return sum(float(w) * value for w, (_, value) in zip(weights, last, strict=True))

        module.forward = forward
        return made

    for order in (1, 2):
        unet = sdgraph.apply(own, InheritFeatures(site, schedule, part="value", forecast=order))
        torch.testing.assert_close(run(unet, steps=6), run(reference(order), steps=6), rtol=1e-4, atol=1e-4)
    repeated = sdgraph.apply(own, InheritFeatures(site, schedule, part="value"))
    assert not torch.allclose(run(unet, steps=6), run(repeated, steps=6), rtol=1e-2)


def test_invariants_are_computed_once(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor]) -> None:
    """Bit for bit the same, and keys and values of the text only at the first call of a generation."""
    own = pipe.unet
    unet = sdgraph.apply(own, HoistInvariants())
    names = [name for name, _ in own.named_modules()]
    assert set(unet.graph.sites) == {name for name in names if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert torch.equal(run(unet), run(own))
    assert torch.equal(run(unet, prompt="a blue star"), run(own, prompt="a blue star"))
    full, later = unet.graph.timetable(5).variants
    assert (full.calls, later.calls) == ((0,), (1, 2, 3, 4))
    text = sum(m.in_features * m.out_features for n, m in own.named_modules() if n in unet.graph.sites)
    tokens = next(symbol.nominal for symbol in unet.graph.dims.symbols if symbol.name == "L")
    assert full.macs - later.macs == text * tokens
    with pytest.raises(NoChangeError):
        sdgraph.apply(unet, HoistInvariants())


def test_all_conditioning_is_constant() -> None:
    """Also what SDXL adds; a generation ends when another tensor comes, whichever, or one is edited."""
    source = build("sdxl")
    unet = sdgraph.apply(source, HoistInvariants())
    assert "add_embedding.linear_2" in unet.graph.sites
    given = call_of(source)
    added = given["added_cond_kwargs"]
    other = {**added, "time_ids": added["time_ids"] + 1}
    with torch.no_grad():
        for step, conditioning in enumerate((added, added, other, other, added, added)):
            if step == 5:
                added["text_embeds"] *= 2
            now = {**given, "timestep": 900 - step, "added_cond_kwargs": conditioning}
            assert torch.equal(answer(unet, now), answer(source, now))


def test_what_no_call_needs_is_not_computed(pipe: StableDiffusionPipeline) -> None:
    """Attention that is due at a call which inherits all that comes of it waits for the next call that needs it."""
    passes = [InheritFeatures.deep_cache(3, 0), InheritFeatures("**.attn2", Uniform(2))]
    unet = sdgraph.apply(pipe.unet, passes)
    reference = sdgraph.apply(pipe.unet, passes[0])
    table = unet.graph.timetable(7)
    inner = "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert table.row(inner) == "■··■··■"
    assert table.row("up_blocks.3.attentions.2.transformer_blocks.0.attn2") == "■□■□■□■"
    partial_calls = [v for v in table.variants if "up_blocks.3.resnets.2" in v.inherited]
    assert max(v.macs for v in partial_calls) == reference.graph.step_macs(["up_blocks.3.resnets.2"])


def test_it_composes_with_pruning(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor]) -> None:
    passes = [PruneBlocks("bk-sdm-small"), InheritFeatures.deep_cache(2, branch=1)]
    unet = sdgraph.apply(pipe.unet, passes)
    reference = sdgraph.apply(pipe.unet, passes[0]).to_diffusers()
    # by hand: the entry of the last up layer but one is kept from the call before
    layer = reference.up_blocks[-1].resnets[0]
    compute, kept = layer.forward, []

    def forward(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        channels = reference.up_blocks[-2].resnets[-1].out_channels
        if len(kept) % 2 == 0:
            kept.append(hidden[:, :channels])
        else:
            kept.append(kept[-1])
        return compute(torch.cat([kept[-1], hidden[:, channels:]], 1), *args)

    layer.forward = forward
    assert torch.equal(run(unet), run(reference))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"])
def test_it_composes_in_every_order(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], preset: str
) -> None:
    """Pruning, cleaning up, hoisting, inheriting: the same images in whichever order."""
    own = pipe.unet
    prune, clean, hoist = PruneBlocks(preset), CleanUp(), HoistInvariants()
    entry = InheritFeatures("up_blocks.3.resnets.2", Uniform(3), part="entry")
    unit = InheritFeatures("down_blocks.1.attentions.0.**.attn1", Uniform(2))
    orders = [
        (prune, clean, entry, unit, hoist),
        (entry, unit, prune, hoist, clean),
        (unit, clean, prune, entry, hoist),
        (prune, hoist, unit, clean, entry),
    ]
    images = [run(sdgraph.apply(own, order, verify=False), steps=7) for order in orders]
    assert all(torch.equal(image, images[0]) for image in images[1:])


def test_a_site_is_not_pruned_away(pipe: StableDiffusionPipeline) -> None:
    for first in (InheritFeatures("**.attn2"), HoistInvariants()):
        with pytest.raises(EditError, match=r"has the site '.*attn2(.*\n)*.*before features"):
            sdgraph.apply(pipe.unet, [first, PruneBlocks("bk-sdm-base")], verify=False)


def test_what_a_step_costs(pipe: StableDiffusionPipeline) -> None:
    unet = sdgraph.apply(pipe.unet, InheritFeatures.deep_cache(3, branch=0))
    (site,) = unet.graph.sites
    assert re.search(r"inherited\n  Uniform\(3\): up_blocks.3.resnets.2; without: \d+.\d% of the MACs", str(unet.graph))
    assert unet.graph.step_macs([site]) < 0.15 * unet.graph.macs == 0.15 * unet.graph.step_macs()
    full, partial = (
        unet.variant(frozenset(unet.graph.inputs[i].name for i in range(3)), frozenset(s)) for s in ((), (site,))
    )
    assert len(partial.graph.nodes) < len(full.graph.nodes) / 8
    assert (full.meta["takes"], full.meta["gives"]) == ((), (site,))
    assert (partial.meta["takes"], partial.meta["gives"]) == ((site,), ())


# -- generations ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inheriting(pipe: StableDiffusionPipeline) -> GraphUNet:
    return sdgraph.apply(pipe.unet, InheritFeatures.deep_cache(3, branch=1))


class Counted:
    """Which calls of a UNet computed everything."""

    def __init__(self, unet: GraphUNet, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[bool] = []
        variant = unet.variant

        def noted(given: frozenset[str], inherited: frozenset[str] = frozenset()) -> Any:
            self.calls.append(not inherited)
            return variant(given, inherited)

        monkeypatch.setattr(unet, "variant", noted)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # diffusers' KDPM2
@pytest.mark.parametrize("name", SCHEDULERS)
def test_calls_are_counted_under_every_scheduler(
    name: str, pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], inheriting: GraphUNet,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pipe.scheduler = SCHEDULERS[name](pipe.scheduler.config)
    inheriting = copy.deepcopy(inheriting)  # which has warned of nothing yet
    counted = Counted(inheriting, monkeypatch)
    first = run(inheriting, steps=5)
    calls = len(pipe.scheduler.timesteps)
    expected = [i % 3 == 0 for i in range(calls)]
    if name in RANDOM:  # latents with new noise could be those of another image
        assert sum(counted.calls) > sum(expected)
        assert "the latents of a call do not follow" in caplog.text
    else:
        assert counted.calls == expected
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
    counted.calls.clear()
    with sdgraph.attach(pipe):
        assert torch.equal(run(inheriting, steps=5), first) == (name not in RANDOM)
    assert counted.calls == expected


def test_no_history_changes_an_image(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], inheriting: GraphUNet
) -> None:
    """Interrupted, failed, other prompts, sizes, batches: the next image is that of a fresh module."""
    fresh = run(copy.deepcopy(inheriting))

    def interrupt(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return values

    def fail(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    histories: list[Callable[[], Any]] = [
        lambda: run(inheriting, callback_on_step_end=interrupt),
        lambda: run(inheriting, prompt="a blue star", seed=1),
        lambda: run(inheriting, height=32, width=64),
        lambda: run(inheriting, num_images_per_prompt=2),
        lambda: run(inheriting, guidance_scale=1.0),
        lambda: run(inheriting, steps=1),
    ]
    for history in histories:
        history()
        assert torch.equal(run(inheriting), fresh)
    with pytest.raises(KeyboardInterrupt):
        run(inheriting, callback_on_step_end=fail)
    assert torch.equal(run(inheriting), fresh)


def call(seed: int, timestep: int, prompt: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"sample": scale * sample, "timestep": timestep, "encoder_hidden_states": prompt, "return_dict": False}


def test_a_generation_is_recognised_by_its_calls(inheriting: GraphUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(inheriting, monkeypatch)
    prompt, other = torch.randn(2, 1, 24, models.TEXT_WIDTH)
    with torch.no_grad():
        for timestep in (900, 800, 700, 600):
            inheriting(**call(0, timestep, prompt))
        assert counted.calls == [True, False, False, True]
        counted.calls.clear()
        inheriting(**call(0, 500, other))  # another prompt
        inheriting(**call(0, 500, prompt))  # goes on with the first
        inheriting(**call(0, 400, other))
        assert counted.calls == [True, False, False]
        counted.calls.clear()
        inheriting(**call(0, 900, prompt))  # the timestep rose
        inheriting(**call(0, 800, prompt))
        inheriting(**call(0, 800, prompt, scale=0.9))  # a repeated timestep with new latents, as PNDM and Heun have
        inheriting(**call(0, 800, prompt, scale=0.9))  # the same call again: an image begun anew
        assert counted.calls == [True, False, False, True]
        counted.calls.clear()
        inheriting(**call(0, 900, prompt))  # the timestep rose
        inheriting(**call(1, 900, prompt))  # another sample
        inheriting(**call(0, 800, prompt))
        inheriting(**call(1, 800, prompt))
        assert counted.calls == [True, True, True, True]
        counted.calls.clear()
        for timestep in (900, 800):
            inheriting(**call(0, timestep, prompt))
        counted.calls.clear()
        prompt *= 2  # edited in place
        inheriting(**call(0, 700, prompt))
        inheriting.reset()
        inheriting(**call(0, 600, prompt))
        assert counted.calls == [True, True]


def test_a_failed_call_ends_its_generation(inheriting: GraphUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.randn(1, 24, models.TEXT_WIDTH)
    failing = call(0, 800, prompt)
    with torch.no_grad():
        inheriting(**call(0, 900, prompt))
        with monkeypatch.context() as patch:
            patch.setattr(inheriting, "variant", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                inheriting(**failing)
        counted = Counted(inheriting, monkeypatch)
        inheriting(**call(0, 700, prompt))
        assert counted.calls == [True]


def test_values_are_kept_no_longer_than_the_prompt(pipe: StableDiffusionPipeline) -> None:
    unet = sdgraph.apply(pipe.unet, InheritFeatures.deep_cache(3, branch=1))
    prompt = torch.randn(1, 24, models.TEXT_WIDTH)
    with torch.no_grad():
        unet(**call(0, 900, prompt))
    (site,) = unet.graph.sites
    channels, side = 32, 16
    assert unet.cache_bytes() == 4 * channels * side * side
    del prompt
    gc.collect()
    assert unet.cache_bytes() == 0
    assert site == "up_blocks.3.resnets.1"


def test_threads_do_not_meet(pipe: StableDiffusionPipeline, inheriting: GraphUNet) -> None:
    """Two threads with the same prompt object and other samples, their calls interleaved."""
    prompt = torch.randn(1, 24, models.TEXT_WIDTH)
    turns = threading.Barrier(2)
    found: dict[int, list[torch.Tensor]] = {}

    def generate(unet: GraphUNet, seed: int, wait: bool) -> list[torch.Tensor]:
        outputs = []
        with torch.no_grad():
            for timestep in (900, 800, 700, 600):
                if wait:
                    turns.wait()
                outputs.append(unet(**call(seed + timestep, timestep, prompt))[0])
        return outputs

    threads = [threading.Thread(target=lambda s=s: found.update({s: generate(inheriting, s, True)})) for s in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        inheriting.reset()
        alone = generate(inheriting, seed, False)
        assert all(torch.equal(a, b) for a, b in zip(alone, found[seed], strict=True))


def test_a_schedule_that_depends_on_the_run_is_told_it(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = sdgraph.apply(pipe.unet, InheritFeatures("mid_block", DenseLate(3)))
    with pytest.raises(ScheduleError, match=r"needs to know the calls(.*\n)*.*expecting"):
        run(unet, steps=8)
    counted = Counted(unet, monkeypatch)
    pipe.scheduler.set_timesteps(8)
    timesteps = pipe.scheduler.timesteps
    with unet.expecting(timesteps):
        run(unet, steps=8)
    assert [i for i, full in enumerate(counted.calls) if full] == list(DenseLate(3).calls(Run(8)))


def test_an_attached_pipeline_tells_the_run(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to a schedule that needs to know it, whatever the scheduler; and nothing is kept after the last call."""
    unet = sdgraph.apply(pipe.unet, InheritFeatures("mid_block", DenseLate(3)))
    counted = Counted(unet, monkeypatch)
    prompt, _ = pipe.encode_prompt("a red circle", "cpu", 1, False)
    pipe.unet = unet
    with sdgraph.attach(pipe):
        for scheduler in (DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler):
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
            counted.calls.clear()
            run(unet, None, steps=8, prompt_embeds=prompt, guidance_scale=1.0)
            known = Run.of(pipe.scheduler.timesteps)
            assert [i for i, full in enumerate(counted.calls) if full] == list(DenseLate(3).calls(known))
            assert unet.cache_bytes() == 0
    with pytest.raises(ScheduleError, match="needs to know the calls"):
        run(unet)


def test_no_value_is_read_once_attached(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], inheriting: GraphUNet
) -> None:
    """What would stop a GPU: reading a timestep. Once per generation all of them are."""
    expected = run(inheriting)

    class Unread(torch.utils._python_dispatch.TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def reads(unet: Any) -> list[int]:
        found, forward = [], unet.run

        def counting(flat: Any) -> torch.Tensor:
            with Unread() as mode:
                result = forward(flat)
            found.append(mode.reads)
            return result

        unet.run = counting
        try:
            assert torch.equal(run(unet), expected)
        finally:
            del unet.run
        return found

    assert sum(reads(inheriting)) > 0
    with sdgraph.attach(pipe):
        assert reads(inheriting)[1:] == [0] * 4


def test_image_to_image_begins_anywhere(pipe: StableDiffusionPipeline, inheriting: GraphUNet) -> None:
    """At every strength, after every other: the image is that of a fresh module; attached or not."""
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    components = {**pipe.components, "unet": None, "image_encoder": None}
    other = StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)

    def run(unet: Any, strength: float) -> torch.Tensor:
        other.unet = unet
        options = {"strength": strength, "num_inference_steps": 8, "output_type": "latent"}
        return other("a red circle", image, generator=torch.Generator().manual_seed(0), **options).images

    fresh = {s: run(copy.deepcopy(inheriting), s) for s in (0.3, 0.6, 1.0)}
    for strength in (0.3, 1.0, 0.6, 0.6, 0.3):
        assert torch.equal(run(inheriting, strength), fresh[strength])
    with sdgraph.attach(other):
        for strength in (0.3, 1.0, 0.6, 0.6, 0.3):
            assert torch.equal(run(inheriting, strength), fresh[strength])


def test_two_pipelines_on_one_unet(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], inheriting: GraphUNet
) -> None:
    """The second makes an image within every step of the first."""
    fresh = run(copy.deepcopy(inheriting))
    second = StableDiffusionPipeline(**{**pipe.components, "unet": inheriting}, requires_safety_checker=False)
    second.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    second.set_progress_bar_config(disable=True)

    def between(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        second("a blue star", num_inference_steps=2, generator=generator, output_type="latent")
        return values

    assert torch.equal(run(inheriting, callback_on_step_end=between), fresh)
    with sdgraph.attach(pipe_of(pipe, inheriting)), sdgraph.attach(second):
        assert torch.equal(run(inheriting, callback_on_step_end=between), fresh)
    assert inheriting.generations.clocks == []


def pipe_of(pipe: StableDiffusionPipeline, unet: GraphUNet) -> StableDiffusionPipeline:
    pipe.unet = unet
    return pipe


def test_guidance_switched_off_midway(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], inheriting: GraphUNet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The batch is another from there: everything is computed, then inherited again."""

    def off(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    options = {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"], "steps": 8}
    counted = Counted(inheriting, monkeypatch)
    run(inheriting, **options)
    assert counted.calls == [True, False, False, True, True, False, False, True]
    counted.calls.clear()
    with sdgraph.attach(pipe_of(pipe, inheriting)):  # the calls of the run go on being counted
        run(inheriting, **options)
    assert counted.calls == [True, False, False, True, True, False, True, False]


def test_what_cannot_be_attached(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ModeError, match="UNet2DConditionModel as its unet"):
        sdgraph.attach(pipe)
    with pytest.raises(ModeError, match="no unet"):
        sdgraph.attach(object())


def test_an_attached_pipeline_is_not_kept(pipe: StableDiffusionPipeline, inheriting: GraphUNet) -> None:
    other = StableDiffusionPipeline(**{**pipe.components, "unet": inheriting}, requires_safety_checker=False)
    sdgraph.attach(other)
    assert len(inheriting.generations.clocks) == 1
    del other
    gc.collect()
    assert inheriting.generations.clocks == []


def test_the_functional_form(pipe: StableDiffusionPipeline, inheriting: GraphUNet) -> None:
    """What the module keeps between calls goes in and comes out instead."""
    prompt = torch.randn(1, 24, models.TEXT_WIDTH)
    copy_of = copy.deepcopy(inheriting)
    with torch.no_grad(), copy_of.expecting(4):
        values: dict[str, torch.Tensor] = {}
        for number, timestep in enumerate((900, 800, 700, 600)):
            given = {k: v for k, v in call(number, timestep, prompt).items() if k != "return_dict"}
            output, fresh = inheriting.step(values if number % 3 else {}, **given)
            values |= fresh
            assert torch.equal(output, copy_of(**given)[0])
        assert inheriting.cache_bytes() == 0
        assert list(values) == list(inheriting.graph.sites)
        with pytest.raises(PathError, match="no value of a site 'mid_block'"):
            inheriting.step(values, ["mid_block"], **given)
        with pytest.raises(CallError, match=r"sample is torch\.float64"):
            inheriting.step({}, **{**given, "sample": given["sample"].double()})


def test_variants_compile_without_breaks(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor]) -> None:
    """One compilation for each variant, whole, and none again over generations."""
    unet = sdgraph.apply(pipe.unet, InheritFeatures.deep_cache(3, branch=1))
    expected = run(unet)
    compiled = CompileCounter()
    unet.compile(backend=compiled, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(run(unet), expected)
        assert compiled.frame_count == 2
        run(unet, prompt="a blue star", steps=7)
    assert compiled.frame_count == 2


def test_a_timetable_says_what_calls_do(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    unet = sdgraph.apply(
        pipe.unet, [InheritFeatures.deep_cache(3, 1), InheritFeatures("**.attn1", Warm(Uniform(2), 2))]
    )
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


# -- schedules --------------------------------------------------------------------------------------------------------


def test_published_schedules() -> None:
    assert DenseCenter(5, center=15).calls(Run(50)) == (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)
    assert Uniform(5).calls(Run(20)) == (0, 5, 10, 15)
    assert Gate(10, Uniform(5)).calls(Run(25)) == (0, 5, 10)


def test_schedules_are_what_they_say() -> None:
    early, late = DenseEarly(5).calls(Run(50)), DenseLate(5).calls(Run(50))
    assert len(early) == len(late) == 10
    steps = [[b - a for a, b in pairwise(each)] for each in (early, late)]
    assert steps[0][0] < steps[0][-1]
    assert steps[1][0] > steps[1][-1]
    timesteps = tuple(float(t) for t in range(980, -20, -20))
    inside = [i for i, t in enumerate(timesteps) if 100 < t < 800]
    found = Range(100, 800, Uniform(2)).calls(Run(50, timesteps))
    assert [i for i in inside if i in found] == [i for i in inside if i % 2 == 0]
    assert set(range(50)) - set(inside) <= set(found)
    assert Warm(Uniform(10), first=3, last=2).calls(Run(25)) == (0, 1, 2, 10, 20, 23, 24)
    assert Explicit((7, 0, 3)).calls(Run(9)) == (0, 3, 7)


def test_schedules_that_make_no_sense() -> None:
    with pytest.raises(ScheduleError, match=r"does not refresh at the first call"):
        Explicit((3, 6))
    with pytest.raises(ScheduleError, match=r"call 9 is not one of 9"):
        Explicit((0, 9), of=9)
    with pytest.raises(ScheduleError, match=r"interval is 0"):
        Uniform(0)
    with pytest.raises(ScheduleError, match=r"needs to know the calls"):
        DenseEarly(5).refreshes(3, 500.0, Run())
    with pytest.raises(ScheduleError, match=r"made for 50 calls, this generation has 20"):
        Explicit((0, 9), of=50).refreshes(3, 500.0, Run(20))


def test_a_pass_with_a_schedule_is_text(pipe: StableDiffusionPipeline, tmp_path: Any) -> None:
    one = InheritFeatures("up_blocks.-1.attentions.*", Warm(Gate(10, Uniform(5)), first=2), part="branch")
    assert sdgraph.parse(str(one)) == (one,)
    unet = sdgraph.apply(pipe.unet, one)
    unet.save_pretrained(tmp_path / "saved")
    again = GraphUNet.from_pretrained(tmp_path / "saved")
    expected = {f"up_blocks.3.attentions.{i}": Site(one.schedule) for i in range(3)}
    assert again.graph.sites == unet.graph.sites == expected


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"sites": ()}, SpecError, "sites are module paths"),
        ({"sites": "mid_block", "part": "half"}, SpecError, "no part 'half'"),
        ({"sites": "mid_block", "schedule": 3}, SpecError, "3 is no schedule"),
        ({"sites": "up_blocks.9"}, PathError, "no module 'up_blocks.9'"),
        ({"sites": ("mid_block", "mid_block.attentions.0")}, EditError, "is within the site mid_block"),
        ({"sites": "conv_in", "part": "branch"}, EditError, "no residual branch"),
        ({"sites": "down_blocks.0.resnets.0", "part": "entry"}, EditError, "no skip is concatenated"),
        ({"sites": "up_blocks.-1.resnets.-4", "part": "entry"}, PathError, "up_blocks.-1"),
    ],
)
def test_bad_sites(
    pipe: StableDiffusionPipeline, options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        sdgraph.apply(pipe.unet, InheritFeatures(**options))
