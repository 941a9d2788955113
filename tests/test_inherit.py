"""Feature inheritance: the values are those of reference implementations, and never those of another generation."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from scenes import models

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import EditError, ExportError, PathError, ScheduleError, SpecError
from sdgraph.passes import InheritFeatures, PruneBlocks
from sdgraph.schedules import DenseCenter, DenseEarly, DenseLate, Explicit, Gate, Range, Run, Uniform, Warm

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "heun": HeunDiscreteScheduler,
    "euler": EulerDiscreteScheduler,
    "euler ancestral": EulerAncestralDiscreteScheduler,
    "dpm++ 2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = models.tokenizer()
    pipe = models.pipeline(tokenizer, models.text_encoder(tokenizer), models.vae(), models.unet())
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "branch"), [*((3, branch) for branch in range(12)), (2, 1), (4, 4), (5, 1)])
def test_deep_cache_is_deep_cache(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], interval: int, branch: int
) -> None:
    """Bit for bit the DeepCache package."""
    pipe.unet, own = copy.deepcopy(pipe.unet), pipe.unet
    reference = DeepCacheSDHelper(pipe)
    reference.set_params(cache_interval=interval, cache_branch_id=branch)
    reference.enable()
    theirs = run(pipe.unet, steps=6)
    reference.disable()
    mine = run(sdgraph.apply(own, InheritFeatures.deep_cache(interval, branch), verify=False), steps=6)
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


def test_what_a_step_costs(pipe: StableDiffusionPipeline) -> None:
    unet = sdgraph.apply(pipe.unet, InheritFeatures.deep_cache(3, branch=0))
    (site,) = unet.graph.sites
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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_calls_are_counted_under_every_scheduler(
    name: str, pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], inheriting: GraphUNet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    counted = Counted(inheriting, monkeypatch)
    first = run(inheriting, steps=5)
    assert counted.calls == [i % 3 == 0 for i in range(len(pipe.scheduler.timesteps))]
    again = run(inheriting, steps=5)
    assert torch.equal(first, again)


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


def call(seed: int, timestep: int, prompt: torch.Tensor) -> dict[str, Any]:
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"sample": sample, "timestep": timestep, "encoder_hidden_states": prompt, "return_dict": False}


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
        inheriting(**call(0, 900, prompt))  # after one call: a new generation of one step
        inheriting(**call(0, 800, prompt))
        inheriting(**call(0, 800, prompt))  # a repeated timestep, as PNDM and Heun have
        assert counted.calls == [True, True, False, False]
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


def test_an_inheriting_unet_is_not_exported_as_one_graph(inheriting: GraphUNet, tmp_path: Any) -> None:
    with pytest.raises(ExportError, match="several graphs"):
        sdgraph.exporters.onnx.export(inheriting, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


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
    assert [i for i in inside if i in found] == inside[::2]
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
    expected = {f"up_blocks.3.attentions.{i}": one.schedule for i in range(3)}
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
