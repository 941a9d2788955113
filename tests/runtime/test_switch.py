"""`sdgraph.switch`: several UNets in the place of one, each of which computes some calls of a generation."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import scenes.pipeline
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UNet2DConditionModel

import sdgraph
from sdgraph import GraphUNet, SwitchUNet, errors
from sdgraph.schedules import ByCall, ByTimestep, InTurns, PerCall, SamplingRun

from ..models import ONE_LEVEL, answer, build, call_of
from ..pipelines import POOLED, PROMPT, SIZE, image, large, make, plain

TEXT = {**PROMPT, **SIZE}
INHERITING = "InheritFeatures('up_blocks.-1.resnets.-1', Uniform(3), part='entry')"


@pytest.fixture(scope="module")
def large_unet() -> UNet2DConditionModel:
    return build(**ONE_LEVEL, layers_per_block=2)


@pytest.fixture(scope="module")
def small_unet() -> UNet2DConditionModel:
    return build(**ONE_LEVEL, seed=1)


@pytest.fixture(scope="module")
def members(large_unet: UNet2DConditionModel, small_unet: UNet2DConditionModel) -> dict[str, GraphUNet]:
    """Two UNets of one conditioning and other depths, traced."""
    return {"large": sdgraph.apply(large_unet), "small": sdgraph.apply(small_unet)}


@pytest.fixture
def pipe(large_unet: UNet2DConditionModel) -> Any:
    return plain("StableDiffusionPipeline", large_unet)


def images(pipe: Any, unet: Any, attached: bool = False, steps: int = 5, **call: Any) -> torch.Tensor:
    """Return the images of a pipeline with a UNet."""
    pipe.unet = unet
    if not attached:
        return make(pipe, TEXT, steps=steps, **call)
    with sdgraph.attach(pipe):
        return make(pipe, TEXT, steps=steps, **call)


def who(unet: SwitchUNet, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the members that compute calls from now on."""
    calls: list[str] = []

    def noting(name: str, member: Any) -> None:
        compute = member.backend.compute
        monkeypatch.setattr(member.backend, "compute", lambda *args: (calls.append(name), compute(*args))[1])

    for name, member in unet.members.items():
        noting(name, member)
    return calls


@pytest.mark.law("A switch with one member computes what this member computes, bit for bit.")
def test_one_member(members: dict[str, GraphUNet], pipe: Any) -> None:
    alone = sdgraph.switch({"large": members["large"]})
    assert torch.equal(images(pipe, alone), images(pipe, members["large"]))


@pytest.mark.law("A switch at ratio 0 or 1 computes what the first or the second member computes, bit for bit.")
@pytest.mark.parametrize(("ratio", "name"), [(0.0, "large"), (1.0, "small")])
def test_the_ends_are_the_members(members: dict[str, GraphUNet], pipe: Any, ratio: float, name: str) -> None:
    assert torch.equal(images(pipe, sdgraph.switch(members, boundary_ratio=ratio)), images(pipe, members[name]))


@pytest.mark.law("A schedule that alternates two equal members computes what one of them computes, bit for bit.")
def test_two_equal_members(members: dict[str, GraphUNet], pipe: Any) -> None:
    unet = sdgraph.switch({"a": members["large"], "b": members["large"]}, "InTurns(('a', 'b'))")
    assert torch.equal(images(pipe, unet, attached=True), images(pipe, members["large"]))


@pytest.mark.law("A pipeline with a switch computes the latents of a loop over its UNets written by hand, bit for bit.")
@pytest.mark.parametrize(
    ("schedule", "first"),
    [
        ("ByTimestep(('large', 'small'), (500,))", 2),  # of the timesteps 831, 665, 499, 333, 167, 1
        ("ByCall(('large', 'small'), (3,))", 3),
        ("ByShare.t_stitch(0.7, ('large', 'small'))", 4),
    ],
)
def test_a_loop_by_hand(members: dict[str, GraphUNet], pipe: Any, schedule: str, first: int) -> None:
    steps, guidance = 6, 7.5
    start = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(7))
    seen: list[torch.Tensor] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(tensors["latents"])
        return {}

    found = images(pipe, sdgraph.switch(members, schedule), attached=True, steps=steps, guidance_scale=guidance,
                   latents=start, output_type="latent", callback_on_step_end=note)  # fmt: skip
    prompt = torch.cat([PROMPT["negative_prompt_embeds"], PROMPT["prompt_embeds"]])
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    latents = start * scheduler.init_noise_sigma
    with torch.no_grad():
        for call, timestep in enumerate(scheduler.timesteps):
            unet = members["large" if call < first else "small"]
            without, given = unet(torch.cat([latents] * 2), timestep, prompt).sample.chunk(2)
            latents = scheduler.step(without + guidance * (given - without), timestep, latents).prev_sample
            assert torch.equal(latents, seen[call])
    assert torch.equal(latents, found)


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_pipelines_that_begin_late(members: dict[str, GraphUNet], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = plain(kind, members["large"])
    unet = sdgraph.switch(members, boundary_ratio=0.3)
    calls = who(unet, monkeypatch)
    call: dict[str, Any] = {**PROMPT, "image": image(1, 3, 32, 48), "strength": 0.6}
    if "Inpaint" in kind:
        call |= {**SIZE, "mask_image": torch.ones(1, 1, 32, 48)}
    pipe.unet = unet
    assert make(pipe, call, steps=10).isfinite().all()
    late = [timestep for timestep in pipe.scheduler.timesteps.tolist() if timestep <= 600]
    assert calls == ["large" if timestep >= 300 else "small" for timestep in late]
    with sdgraph.attach(pipe):
        unet.schedule = ByCall(("large", "small"), (2,))
        make(pipe, call, steps=10)
    assert calls[len(late) :] == ["large"] * 2 + ["small"] * (len(late) - 2)


@pytest.mark.slow
def test_sdxl_with_its_own_denoising_end() -> None:
    a, b = build("sdxl"), build("sdxl", seed=1)
    call = {**TEXT, **POOLED}
    pipe = large("StableDiffusionXLPipeline", a)
    pipe.unet = sdgraph.switch({"base": a, "refiner": b}, denoising_end=0.6)
    found = make(pipe, call, steps=10, output_type="latent")
    pipe.unet = a
    latents = make(pipe, call, steps=10, output_type="latent", denoising_end=0.6)
    image_to_image = large("StableDiffusionXLImg2ImgPipeline", b)
    again = make(image_to_image, {**PROMPT, **POOLED, "image": latents, "denoising_start": 0.6}, steps=10,
                 output_type="latent", guidance_scale=5.0)  # fmt: skip
    assert torch.equal(found, again)


def test_a_solver_of_two_calls_per_step(members: dict[str, GraphUNet], pipe: Any, caplog: Any) -> None:
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    unet = sdgraph.switch(members, "ByCall(('large', 'small'), (3,))")
    assert images(pipe, unet, attached=True, steps=4).isfinite().all()
    images(pipe, unet, attached=True, steps=4)
    assert caplog.text.count("HeunDiscreteScheduler combines the predictions of several calls") == 1


@pytest.mark.slow
def test_the_history_of_the_other_unet_changes_less_than_the_switch() -> None:
    """The figure of docs/switching.md: run with -s to see it."""
    pipe, steps, first = scenes.pipeline.load(), 10, 5
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    large = pipe.unet
    both = sdgraph.switch(
        {"large": large, "small": scenes.pipeline.load_student()}, ByCall(("large", "small"), (first,))
    )
    prompts = ["a red circle", "a blue square", "a green triangle", "a yellow circle"]

    def latents(unet: Any, forgetting: bool = False) -> torch.Tensor:
        def forget(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if forgetting and step == first - 1:
                pipe.scheduler.lower_order_nums = 0  # the next step is of the first order, as at the beginning
            return {}

        pipe.unet = unet
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        with sdgraph.attach(pipe) if unet is both else contextlib.nullcontext():
            return pipe(prompts, num_inference_steps=steps, generator=generators, output_type="latent",
                        callback_on_step_end=forget).images  # type: ignore[no-any-return]  # fmt: skip

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(((one - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)).mean())

    switched = latents(both)
    of_history, of_switch = distance(latents(both, forgetting=True), switched), distance(switched, latents(large))
    print(f"history {of_history:.4f}, switch {of_switch:.4f} (relative L2 of the final latents)")
    assert 0.02 < of_history / of_switch < 0.25


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inheriting(members: dict[str, GraphUNet]) -> dict[str, GraphUNet]:
    return {name: sdgraph.apply(member, INHERITING) for name, member in members.items()}


def reused(unet: SwitchUNet, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Of each call from now on, the member and whether it reuses features."""
    calls: list[tuple[str, bool]] = []

    def noting(name: str, member: Any) -> None:
        compute = member.backend.compute

        def noted(inputs: Any, reused: Any, read: Any) -> Any:
            calls.append((name, bool(reused)))
            return compute(inputs, reused, read)

        monkeypatch.setattr(member.backend, "compute", noted)

    for name, member in unet.members.items():
        noting(name, member)
    return calls


def test_the_first_call_of_a_turn_computes_everything(
    inheriting: dict[str, GraphUNet], pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = sdgraph.switch(inheriting, "ByCall(('large', 'small'), (4,))")
    calls = reused(unet, monkeypatch)
    images(pipe, unet, attached=True, steps=9)
    assert calls == [
        *(("large", uses) for uses in (False, True, True, False)),
        *(("small", uses) for uses in (False, True, False, True, True)),
    ]
    table = unet.timetable(9)
    assert table.turns == ("large",) * 4 + ("small",) * 5
    rows = {site.partition(":")[0]: row for site, row in table.signs.items()}
    assert rows == {"large": "■□□■·····", "small": "····■□■□□"}
    assert unet.cache_bytes() == 0  # nothing is left after the last call


def test_features_are_carried_over_where_that_is_asked_for(
    inheriting: dict[str, GraphUNet], pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sdgraph.apply(build(**ONE_LEVEL, layers_per_block=2, seed=2), INHERITING)
    both = {"large": inheriting["large"], "small": other}
    unet = sdgraph.switch(both, "ByCall(('large', 'small'), (4,))", carry_features=True)
    calls = reused(unet, monkeypatch)
    images(pipe, unet, attached=True, steps=9)
    assert [uses for _, uses in calls] == [False, True, True] * 3
    rows = {site.partition(":")[0]: row for site, row in unet.timetable(9).signs.items()}
    assert rows == {"large": "■□□■·····", "small": "····□□■□□"}


def test_no_common_site_to_carry(members: dict[str, GraphUNet], inheriting: dict[str, GraphUNet]) -> None:
    mixed = {"large": inheriting["large"], "small": members["small"]}
    with pytest.raises(errors.SpecError, match="no site in common"):
        sdgraph.switch(mixed, boundary_ratio=0.5, carry_features=True)


def test_gradients_reach_the_latents_through_the_member_whose_turn_it_is(members: dict[str, GraphUNet]) -> None:
    unet = sdgraph.switch(members, boundary_ratio=0.5)
    call = call_of(members["small"], B=1, H=8, W=8, timestep=100)
    call["sample"].requires_grad_()
    unet(**call).sample.sum().backward()
    found, call["sample"].grad = call["sample"].grad, None
    members["small"](**call).sample.sum().backward()
    assert torch.equal(found, call["sample"].grad)


# -- guidance ---------------------------------------------------------------------------------------------------------


def test_a_scale_of_guidance_for_each_unet(members: dict[str, GraphUNet], pipe: Any) -> None:
    schedule = "ByCall(('large', 'small'), (2,))"
    alone = sdgraph.switch({"large": members["large"]}, guidance_scale={"large": 3.0})
    found, wanted = images(pipe, alone, attached=True), images(pipe, members["large"], guidance_scale=3.0)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(found, images(pipe, members["large"]), atol=1e-2)
    unet = sdgraph.switch(members, schedule, guidance_scale={"small": 7.5})
    plain_unet = sdgraph.switch(members, schedule)
    found, wanted = (images(pipe, one, attached=True, output_type="latent") for one in (unet, plain_unet))
    assert torch.allclose(found, wanted, atol=1e-3)  # the pipeline's scale, by another order of operations


def test_guidance_that_a_unet_cannot_scale(members: dict[str, GraphUNet], pipe: Any) -> None:
    unet = sdgraph.switch(members, boundary_ratio=0.5, guidance_scale={"large": 3.0})
    with pytest.raises(errors.ModeError, match="no attached pipeline makes this call"):
        images(pipe, unet)
    for options in ({"guidance_scale": 1.0}, {"guidance_rescale": 0.7}):
        with pytest.raises(errors.ModeError, match="runs without guidance, or combines"):
            images(pipe, unet, attached=True, **options)
    with pytest.raises(errors.ScheduleError, match="guidance_scale names a UNet 'other'"):
        sdgraph.switch(members, boundary_ratio=0.5, guidance_scale={"other": 3.0})
    with pytest.raises(errors.SpecError, match="guidance_scale is"):
        sdgraph.switch(members, boundary_ratio=0.5, guidance_scale={"large": -1.0})


# -- weights ----------------------------------------------------------------------------------------------------------


def storages(unet: SwitchUNet) -> dict[str, set[int]]:
    return {name: {p.data_ptr() for p in member.parameters()} for name, member in unet.members.items()}


def test_equal_weights_are_held_once(large_unet: UNet2DConditionModel) -> None:
    other = copy.deepcopy(large_unet)
    with torch.no_grad():
        other.conv_in.weight.add_(1)
    unet = sdgraph.switch({"a": large_unet, "b": other}, boundary_ratio=0.5)
    held = storages(unet)
    assert len(held["b"] - held["a"]) == 1  # conv_in.weight
    assert large_unet.conv_in.weight.data_ptr() in held["a"]  # neither source is changed or copied
    assert other.conv_out.weight.data_ptr() not in held["b"]
    moved = copy.deepcopy(unet).to(torch.float64)
    held = storages(moved)
    assert len(held["b"] - held["a"]) == 1
    assert moved.dtype is torch.float64


def test_masks_by_call_are_members_over_one_set_of_weights(large_unet: UNet2DConditionModel, pipe: Any) -> None:
    masks = {
        "all": (),
        "light": "PruneBlocks('down_blocks.0.attentions.1')",
        "lightest": "PruneBlocks(('down_blocks.0.attentions.1', 'up_blocks.0.attentions.2'))",
    }
    members = {name: sdgraph.apply(large_unet, passes, verify=False) for name, passes in masks.items()}
    unet = sdgraph.switch(members, PerCall(("all", "light", "lightest", "light", "all")))
    held = storages(unet)
    assert held["lightest"] < held["light"] < held["all"]
    assert held["all"] == {p.data_ptr() for p in large_unet.parameters()}
    found = images(pipe, unet, attached=True)
    assert not torch.equal(found, images(pipe, members["all"]))
    assert [v.calls for v in unet.timetable(5).variants] == [(0, 4), (1, 3), (2,)]


def test_a_weight_that_differs_in_the_sign_of_zero_is_not_equal(large_unet: UNet2DConditionModel) -> None:
    one, other = copy.deepcopy(large_unet), copy.deepcopy(large_unet)
    with torch.no_grad():
        one.conv_in.bias.zero_()
        other.conv_in.bias.fill_(-0.0)
    unet = sdgraph.switch({"a": one, "b": other}, boundary_ratio=0.5)
    assert unet.members["b"].conv_in.bias.signbit().all()


@pytest.mark.law("A saved and loaded switch computes the same, bit for bit.")
@pytest.mark.slow
def test_saved_and_loaded(
    inheriting: dict[str, GraphUNet], members: dict[str, GraphUNet], pipe: Any, tmp_path: Any
) -> None:
    mixed = {"whole": members["large"], "reusing": inheriting["large"], "small": members["small"]}
    schedule = "ByCall(('whole', 'reusing', 'small'), (1, 4))"
    unet = sdgraph.switch(mixed, schedule, guidance_scale={"small": 5.0})
    expected = images(pipe, unet, attached=True)
    pipe.save_pretrained(tmp_path)
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
    loaded = type(pipe).from_pretrained(tmp_path, requires_safety_checker=False, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.unet, SwitchUNet)
    assert torch.equal(expected, images(loaded, loaded.unet, attached=True))
    held = storages(loaded.unet)
    assert held["whole"] == held["reusing"]
    weights = (tmp_path / "unet" / "sdgraph.safetensors").stat().st_size
    parameters = sum(p.numel() for name in ("large", "small") for p in members[name].parameters())
    assert weights < 4 * parameters + 200_000


def test_training_is_refused(members: dict[str, GraphUNet]) -> None:
    unet = sdgraph.switch(members, boundary_ratio=0.5)
    with pytest.raises(errors.ModeError, match="not trained together"):
        unet.train()
    with pytest.raises(errors.SourceError, match="has several graphs"):
        sdgraph.apply(unet, "CleanUp")
    with pytest.raises(errors.ModeError, match="a switch of several UNets has no load_lora_adapter"):
        unet.load_lora_adapter({})


def test_a_member_that_is_trained_no_longer_shares(large_unet: UNet2DConditionModel) -> None:
    unet = sdgraph.switch({"a": large_unet, "b": large_unet}, boundary_ratio=0.5)
    assert storages(unet)["a"] == storages(unet)["b"]
    unet.members["b"].train()
    assert not storages(unet)["a"] & storages(unet)["b"]
    assert large_unet.conv_in.weight.data_ptr() in storages(unet)["a"]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_what_differs_is_named(members: dict[str, GraphUNet]) -> None:
    others = {
        "in_channels 4 and 9": build("inpaint", **ONE_LEVEL),
        "cross_attention_dim 24 and 8": build(**ONE_LEVEL, cross_attention_dim=8),
        "time_cond_proj_dim None and 12": build("lcm", **ONE_LEVEL),
        "dtype torch.float32 and torch.float64": build(**ONE_LEVEL).double(),
    }
    for what, other in others.items():
        with pytest.raises(errors.SourceError, match=f"large and other differ: .*{what}"):
            sdgraph.switch({"large": members["large"], "other": other}, boundary_ratio=0.5)


def test_prediction_types_of_pipelines_are_compared(members: dict[str, GraphUNet]) -> None:
    one = plain("StableDiffusionPipeline", members["large"])
    other = plain(
        "StableDiffusionPipeline",
        members["small"],
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False, prediction_type="v_prediction"),
    )
    with pytest.raises(errors.SourceError, match="prediction_type epsilon and v_prediction"):
        sdgraph.switch({"large": one, "small": other}, boundary_ratio=0.5)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("ByCall(('large', 'smal'), (2,))", "names a UNet 'smal'"),
        ("ByCall(('large',))", "never names small"),
        ("ByCall(('large', 'small'))", "2 members have 0 starts"),
        ("ByTimestep(('large', 'small', 'large'), (200, 700))", "not in the order of the generation"),
        ("Uniform(3)", "names no UNets"),
    ],
)
def test_schedules_that_do_not_fit(members: dict[str, GraphUNet], schedule: str, message: str) -> None:
    with pytest.raises(errors.SdgraphError, match=message):
        sdgraph.switch(members, schedule)


def test_a_call_without_a_unet_is_refused_before_the_first_call(
    members: dict[str, GraphUNet], pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = sdgraph.switch(members, PerCall(("large", "small", "small")))
    calls = who(unet, monkeypatch)
    with pytest.raises(errors.ScheduleError, match="no UNet computes call 3"):
        images(pipe, unet, attached=True, steps=4)
    with pytest.raises(errors.ScheduleError, match="nothing says which call"):
        images(pipe, unet, steps=3)
    assert calls == []
    images(pipe, unet, attached=True, steps=3)
    assert calls == ["large", "small", "small"]


def test_samples_on_both_sides_of_a_switch(members: dict[str, GraphUNet]) -> None:
    unet = sdgraph.switch(members, boundary_ratio=0.5)
    call = call_of(members["large"], timestep=torch.tensor([100, 900]))
    with pytest.raises(errors.CallError, match="timesteps of large and small"):
        answer(unet, call)
    call["timestep"] = torch.tensor([100, 200])
    assert torch.equal(answer(unet, call), answer(members["small"], call))


def test_arguments_that_do_not_fit(members: dict[str, GraphUNet]) -> None:
    with pytest.raises(errors.SpecError, match="neither a schedule nor a boundary_ratio is given"):
        sdgraph.switch(members)
    with pytest.raises(errors.SpecError, match="schedule and boundary_ratio are given"):
        sdgraph.switch(members, "InTurns(('large', 'small'))", boundary_ratio=0.5)
    with pytest.raises(errors.SpecError, match="boundary_ratio lies between two UNets"):
        sdgraph.switch({**members, "third": members["small"]}, boundary_ratio=0.5)
    with pytest.raises(errors.SpecError, match="a member is named"):
        sdgraph.switch({"a.b": members["small"]})
    with pytest.raises(errors.SpecError, match="there are no UNets"):
        sdgraph.switch({})


def test_presets_are_the_words_of_the_ecosystem() -> None:
    run = SamplingRun.of(25)
    names = ("large", "small")
    assert ByTimestep.boundary_ratio(0.5, names).turns(run) == ("large",) * 12 + ("small",) * 13
    assert ByTimestep.denoising_end(0.5, names) == ByTimestep.boundary_ratio(0.5, names)
    assert ByCall.hybrid_sd(10, of=25).turns(run) == ("large",) * 10 + ("small",) * 15
    assert InTurns(names, (1, 2)).turns(SamplingRun(5)) == ("large", "small", "small", "large", "small")
