"""`InheritFeatures`: the values are those of reference implementations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from DeepCache import DeepCacheSDHelper
from diffusers import (
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0

import sdgraph
from sdgraph import Graph, GraphUNet
from sdgraph.errors import EditError, PathError, PreconditionError, SpecError
from sdgraph.ir.sites import Site
from sdgraph.passes import CleanUp, HoistInvariants, InheritFeatures, PruneBlocks
from sdgraph.schedules import Explicit, Gate, Uniform, Warm

from ..models import edits


def intervals_and_branches() -> list[Any]:
    """Each interval and each branch at least once; all of them with the full-size models."""
    chosen = {(2 + branch % 9, branch) for branch in range(12)} | {(3, branch) for branch in range(0, 12, 2)}
    every = [(interval, branch) for branch in range(12) for interval in range(2, 11)]
    return [pytest.param(*each, marks=() if each in chosen else pytest.mark.full) for each in every]


@pytest.mark.parametrize(
    ("part", "inherited", "user"), [("branch", "conv2", "add"), ("value", "div", "norm"), ("entry", "add", "cat")]
)
def test_one_value_is_inherited(small: Graph, part: str, inherited: str, user: str) -> None:
    """Of a resnet what it adds, what it gives, or what enters it beside the skip."""
    site = "up_blocks.0.resnets.1"
    after = sdgraph.apply(small, InheritFeatures(site, Uniform(2), part=part)).graph
    assert edits(small, after, within="up_blocks.0") == [f"+% = inherit(%, '{site}')"]
    (node,) = [node for node in after.nodes if node.target is sdgraph.inherit]
    assert inherited in str(node.args[0])
    assert any(user in str(each) for each in node.users)
    assert after.sites[site].schedule == Uniform(2)


@pytest.mark.law("The DeepCache preset equals DeepCache bit for bit.")
@pytest.mark.slow
@pytest.mark.parametrize(("interval", "branch"), intervals_and_branches())
def test_deep_cache_is_deep_cache(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], interval: int, branch: int, whole: Graph
) -> None:
    """Bit for bit the DeepCache package."""
    pipe.unet = copy.deepcopy(pipe.unet)
    reference = DeepCacheSDHelper(pipe)
    reference.set_params(cache_interval=interval, cache_branch_id=branch)
    reference.enable()
    theirs = run(pipe.unet, steps=interval + 2)
    reference.disable()
    mine = run(sdgraph.apply(whole, InheritFeatures.deep_cache(interval, branch), verify=False), steps=interval + 2)
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


@pytest.mark.slow
def test_units_are_broadcast(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], whole: Graph) -> None:
    """Self-attention every second call, cross-attention every third."""
    passes = [
        InheritFeatures("*_blocks.*.attentions.*.transformer_blocks.*.attn1", Uniform(2)),
        InheritFeatures("*_blocks.*.attentions.*.transformer_blocks.*.attn2", Uniform(3)),
    ]
    unet = sdgraph.apply(whole, passes)
    reference = copy.deepcopy(pipe.unet)
    for name, module in reference.named_modules():
        if name.endswith(("attn1", "attn2")) and not name.startswith("mid_block"):
            module.set_processor(Broadcast(2 if name.endswith("attn1") else 3))
    assert torch.equal(run(unet, steps=5), run(reference, steps=5))
    assert len(unet.graph.sites) == 30
    assert len(unet.backend) == 4  # of the 5 steps, only two of the kinds differ: none, both, one, the other, both


def inherited_output(module: torch.nn.Module, interval: int) -> None:
    """Let a module compute every `interval`-th call only."""
    compute, state = module.forward, {"calls": 0}

    def forward(*args: Any, **kwargs: Any) -> Any:
        if state["calls"] % interval == 0:
            state["kept"] = compute(*args, **kwargs)
        state["calls"] += 1
        return state["kept"]

    module.forward = forward


@pytest.mark.slow
@pytest.mark.parametrize("site", ["mid_block", "down_blocks.1", "up_blocks.2", "down_blocks.0.attentions.0"])
def test_whole_modules(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], site: str, whole: Graph
) -> None:
    unet = sdgraph.apply(whole, InheritFeatures(site, Uniform(2), part="value"))
    reference = copy.deepcopy(pipe.unet)
    inherited_output(reference.get_submodule(site), 2)
    assert torch.equal(run(unet), run(reference))


@pytest.mark.slow
def test_the_branch_of_a_resnet(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], whole: Graph) -> None:
    """Values that come past the resnet are fresh."""
    sites = ("down_blocks.0.resnets.1", "up_blocks.2.resnets.1")  # without and with a shortcut convolution
    unet = sdgraph.apply(whole, InheritFeatures(sites, Uniform(3)))
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


@pytest.mark.slow
def test_faster_diffusion(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], whole: Graph) -> None:
    keys = (0, 1, 2, 4)
    unet = sdgraph.apply(whole, InheritFeatures.faster_diffusion(keys))
    reference = copy.deepcopy(pipe.unet)
    for module in (reference.conv_in, *reference.down_blocks, reference.mid_block):
        on_schedule(module, keys.__contains__)
    assert torch.equal(run(unet, steps=6), run(reference, steps=6))
    assert InheritFeatures.faster_diffusion().schedule == Explicit((0, 1, 2, 3, 5, 10, 15, 25, 35))


@pytest.mark.slow
def test_t_gate(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], whole: Graph) -> None:
    gate, interval, warm_up = 6, 3, 1
    unet = sdgraph.apply(whole, InheritFeatures.t_gate(gate, interval, warm_up))
    reference = copy.deepcopy(pipe.unet)

    def self_attention(step: int) -> bool:
        return step <= warm_up or step % interval == 0 or step >= gate - 1

    for name, module in reference.named_modules():
        if name.endswith("attn1"):
            on_schedule(module, self_attention)
        elif name.endswith("attn2"):
            on_schedule(module, lambda step: step < gate)
    assert torch.equal(run(unet, steps=8), run(reference, steps=8))


@pytest.mark.slow
def test_attention_broadcast(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], whole: Graph) -> None:
    unet = sdgraph.apply(whole, InheritFeatures.attention_broadcast(2, 3, (300, 800), (100, 900)))
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


@pytest.mark.slow
@pytest.mark.parametrize("level", ["block", "layer", "unit"])
def test_levels(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], level: str, whole: Graph) -> None:
    """The paper's three levels, within two blocks."""
    within = "{mid_block,up_blocks.0,up_blocks.1}"
    unet = sdgraph.apply(whole, InheritFeatures.at_level(level, Uniform(2), within))
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


@pytest.mark.slow
def test_forecasts(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], whole: Graph) -> None:
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
        unet = sdgraph.apply(whole, InheritFeatures(site, schedule, part="value", forecast=order))
        torch.testing.assert_close(run(unet, steps=6), run(reference(order), steps=6), rtol=1e-4, atol=1e-4)
    repeated = sdgraph.apply(whole, InheritFeatures(site, schedule, part="value"))
    assert not torch.allclose(run(unet, steps=6), run(repeated, steps=6), rtol=1e-2)


@pytest.mark.slow
def test_what_no_call_needs_is_not_computed(whole: Graph) -> None:
    """Attention that is due at a call which inherits all that comes of it waits for the next call that needs it."""
    passes = [InheritFeatures.deep_cache(3, 0), InheritFeatures("**.attn2", Uniform(2))]
    unet = sdgraph.apply(whole, passes)
    reference = sdgraph.apply(whole, passes[0])
    table = unet.graph.timetable(7)
    inner = "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert table.row(inner) == "■··■··■"
    assert table.row("up_blocks.3.attentions.2.transformer_blocks.0.attn2") == "■□■□■□■"
    partial_calls = [v for v in table.variants if "up_blocks.3.resnets.2" in v.reads]
    assert max(v.macs for v in partial_calls) == reference.graph.call_macs(["up_blocks.3.resnets.2"])


@pytest.mark.slow
def test_it_composes_with_pruning(run: Callable[..., torch.Tensor], whole: Graph) -> None:
    passes = [PruneBlocks("bk-sdm-small"), InheritFeatures.deep_cache(2, branch=1)]
    unet = sdgraph.apply(whole, passes)
    reference = sdgraph.apply(whole, passes[0]).to_diffusers()
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
@pytest.mark.parametrize(
    "preset", ["bk-sdm-base", *(pytest.param(f"bk-sdm-{size}", marks=pytest.mark.long) for size in ("small", "tiny"))]
)
def test_it_composes_in_every_order(run: Callable[..., torch.Tensor], preset: str, whole: Graph) -> None:
    """Pruning, cleaning up, hoisting, inheriting: the same images in whichever order."""
    prune, clean, hoist = PruneBlocks(preset), CleanUp(), HoistInvariants()
    entry = InheritFeatures("up_blocks.3.resnets.2", Uniform(3), part="entry")
    unit = InheritFeatures("down_blocks.1.attentions.0.**.attn1", Uniform(2))
    orders = [
        (prune, clean, entry, unit, hoist),
        (entry, unit, prune, hoist, clean),
        (unit, clean, prune, entry, hoist),
        (prune, hoist, unit, clean, entry),
    ]
    images = [run(sdgraph.apply(whole, order, verify=False), steps=7) for order in orders]
    assert all(torch.equal(image, images[0]) for image in images[1:])


def test_a_site_is_not_pruned_away(whole: Graph) -> None:
    for first in (InheritFeatures("**.attn2"), HoistInvariants()):
        with pytest.raises(EditError, match=r"has the site '.*attn2(.*\n)*.*before features"):
            sdgraph.apply(whole, [first, PruneBlocks("bk-sdm-base")], verify=False)


@pytest.mark.slow
def test_a_pass_with_a_schedule_is_text(tmp_path: Any, whole: Graph) -> None:
    one = InheritFeatures("up_blocks.-1.attentions.*", Warm(Gate(10, Uniform(5)), first=2), part="branch")
    assert sdgraph.parse(str(one)) == (one,)
    unet = sdgraph.apply(whole, one)
    unet.save_pretrained(tmp_path / "saved")
    again = GraphUNet.from_pretrained(tmp_path / "saved")
    expected = {f"up_blocks.3.attentions.{i}": Site(one.schedule) for i in range(3)}
    assert again.graph.sites == unet.graph.sites == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"sites": ()}, SpecError, r"sites is \(\)"),
        ({"sites": "mid_block", "part": "half"}, SpecError, "part is 'half'"),
        ({"sites": "mid_block", "schedule": 3}, SpecError, "schedule is 3"),
        ({"sites": "up_blocks.9"}, PathError, "no module 'up_blocks.9'"),
        ({"sites": ("mid_block", "mid_block.attentions.0")}, PreconditionError, "mid_block.attentions.0 in mid_block"),
        ({"sites": "conv_in", "part": "branch"}, EditError, "no residual branch"),
        ({"sites": "down_blocks.0.resnets.0", "part": "entry"}, EditError, "no skip is concatenated"),
        ({"sites": "up_blocks.-1.resnets.-4", "part": "entry"}, PathError, "up_blocks.-1"),
    ],
)
def test_bad_sites(options: dict[str, Any], error: type[Exception], complaint: str, whole: Graph) -> None:
    with pytest.raises(error, match=complaint):
        sdgraph.apply(whole, InheritFeatures(**options))
