"""An analysis measures what removals do, goes on after it was stopped, and leaves the pipeline as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline

import sdgraph
from sdgraph.errors import ExtraError, SavedError, SourceError, SpecError
from sdgraph.evaluation.metrics import ssim
from sdgraph.passes import InheritFeatures, PruneBlocks
from sdgraph.redundancy import analysis, targets
from sdgraph.redundancy.analysis import analyse

from ..pipelines import large_with_text

PROMPTS = ("a red circle", "a blue square")
OPTIONS: dict[str, Any] = {
    "num_inference_steps": 3, "calls": 2, "progress": False, "levels": ("block",), "target": None,
}  # fmt: skip
PATH = "up_blocks.0.resnets.0"


@pytest.fixture(autouse=True)
def two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are not what these tests are about, and two regions are enough."""
    monkeypatch.setattr(targets, "TURNS", 1)
    monkeypatch.setattr(analysis, "LEVEL", {"block": re.compile(r"mid_block"), "layer": re.compile(PATH)})


def with_part(pipe: StableDiffusionPipeline, **parts: Any) -> StableDiffusionPipeline:
    """The pipeline with other parts."""
    made = type(pipe)(**{**pipe.components, **parts}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def test_errors_and_savings_are_those_of_the_pruned_unet(tiny: StableDiffusionPipeline) -> None:
    unet = tiny.unet
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    found = analyse(tiny, PROMPTS, latents=True, images=True, **OPTIONS)
    assert tiny.unet is unet
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    (one,), calls = found.removals, list[tuple[Any, Any]]()
    assert one.path == "mid_block"
    pruned = sdgraph.apply(unet, [PruneBlocks("mid_block")], verify=False)
    whole = sdgraph.apply(unet, (), verify=False)
    assert one.macs == pytest.approx(1 - pruned.graph.macs / whole.graph.macs)
    assert one.parameters == pytest.approx(
        1 - sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in whole.parameters())
    )
    whole.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)

    def made(unet: Any, kind: str) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return with_part(tiny, unet=unet)(
            list(PROMPTS), num_inference_steps=3, output_type=kind, generator=generators
        ).images

    kept, without = (made(one, "latent").double() for one in (whole, pruned))
    with torch.no_grad():
        for error, (args, kwargs) in zip(one.errors, (calls[0], calls[2]), strict=True):  # the first and the last call
            outputs = [model(*args, **{**kwargs, "return_dict": True}).sample.double() for model in (whole, pruned)]
            off = (outputs[1] - outputs[0]).square().flatten(1).mean(1)
            assert error == pytest.approx(float((off / outputs[0].square().flatten(1).mean(1)).mean()), rel=1e-4)
    off = ((without - kept).square().flatten(1).mean(1) / kept.square().flatten(1).mean(1)).sqrt()
    assert one.latents == pytest.approx(float(off.log().mean().exp()), rel=1e-3)
    assert one.images == pytest.approx(ssim(made(whole, "np"), made(pruned, "np")), abs=1e-4)
    assert "SSIM" in str(found)


def test_only_what_is_asked_for_is_measured(
    tiny: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(targets, "Target", None)
        patch.setattr(analysis, "Target", None)
        found = analyse(tiny, PROMPTS, folder=tmp_path, **OPTIONS)
    assert [one.time for one in found.removals] == [None]
    assert (found.target, found.removals[0].latents, found.removals[0].images) == (None, None, None)
    assert not {"time", "SSIM", "latents"} & set(str(found).split())
    with pytest.raises(SpecError, match="no budget in time") as caught:
        found.cheapest(time=0.9)
    assert "sdgraph analyse PIPELINE --target eager" in caught.value.hint
    assert list(found.cheapest(macs=1.0).left) == ["macs", "parameters"]
    timed = analyse(tiny, PROMPTS, folder=tmp_path, **{**OPTIONS, "target": "eager"})
    assert timed.target is not None
    assert timed.target.startswith("eager on cpu, ")
    assert timed.removals[0].errors == found.removals[0].errors
    assert isinstance(timed.removals[0].time, float)


def test_pairs_are_neighbours_of_a_block(tiny: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "LEVEL", {"layer": re.compile(r"mid_block\.\w+\.0|up_blocks\.1\.attentions\.1")})
    found = analyse(tiny, PROMPTS, pairs=True, **{**OPTIONS, "levels": ("layer",)})
    assert [pair.paths for pair in found.pairs] == [("mid_block.resnets.0", "mid_block.attentions.0")]
    assert all(found.error(pair) > 0 for pair in found.pairs)


@pytest.mark.slow
def test_an_analysis_that_was_stopped_goes_on(
    tiny: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    share = targets.Target.share

    def counted(target: Any, path: str, *args: Any) -> float:
        measured.append(path)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return share(target, path, *args)

    monkeypatch.setattr(targets.Target, "share", counted)
    options = {**OPTIONS, "target": "eager", "levels": ("block", "layer"), "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        analyse(tiny, PROMPTS, **options)
    found = analyse(tiny, PROMPTS, **options)
    assert measured == ["mid_block", PATH, PATH]
    assert analyse(tiny, PROMPTS, **options) == found
    assert len(measured) == 3
    others = analyse(tiny, ("a red circle", "a green circle"), **options)  # of which the folder has nothing yet
    assert measured[3:] == ["mid_block", PATH]
    assert others.removals[0].errors != found.removals[0].errors
    for file in tmp_path.glob("*.json"):
        file.write_text(file.read_text()[:40])
    with pytest.raises(SavedError):
        analyse(tiny, PROMPTS, **options)
    for file in tmp_path.glob("*.json"):
        file.write_text(json.dumps({"format": 1, "numbers": {"output: mid_block": ["much"]}}))
    with pytest.raises(SavedError, match="the measurements are damaged"):
        analyse(tiny, PROMPTS, **options)


def test_a_removal_with_numbers_that_are_not_finite_is_listed_as_fixed(
    tiny: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = analysis.Replay.run

    def overflowing(replay: Any, without: sdgraph.GraphUNet) -> list[torch.Tensor]:
        return [output * (torch.nan if "mid_block" in without.graph.removed else 1) for output in run(replay, without)]

    monkeypatch.setattr(analysis.Replay, "run", overflowing)
    for _ in range(2):  # measured, and read
        found = analyse(tiny, PROMPTS, folder=tmp_path, **{**OPTIONS, "levels": ("block", "layer")})
        assert [one.path for one in found.removals] == [PATH]
        assert found.fixed["mid_block"] == "without it, numbers are not finite"
    with pytest.raises(SpecError, match="every removal gives numbers that are not finite"):
        analyse(tiny, PROMPTS, folder=tmp_path, **OPTIONS)


def test_a_unet_that_is_pruned_already(tiny: StableDiffusionPipeline) -> None:
    pruned = sdgraph.apply(tiny.unet, [PruneBlocks("mid_block")], verify=False)
    found = analyse(with_part(tiny, unet=pruned), PROMPTS, **{**OPTIONS, "levels": ("block", "layer")})
    assert [one.path for one in found.removals] == [PATH]
    assert found.fixed["mid_block"].startswith("removed by PruneBlocks")
    assert "Regions that were removed before this analysis: 1." in str(found)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_predictions_of_both_kinds_with_and_without_guidance(
    kind: str, guidance_scale: float, tiny: StableDiffusionPipeline
) -> None:
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False, steps_offset=1)
    pipe = with_part(tiny, scheduler=scheduler)
    found = analyse(pipe, PROMPTS, guidance_scale=guidance_scale, num_images_per_prompt=2, **OPTIONS)
    assert len(found.removals) == 1
    assert found.error(found.removals[0]) > 0
    assert found.noise[0] > found.noise[-1] > 0


def test_the_conditions_of_sdxl() -> None:
    found = analyse(large_with_text(), PROMPTS, height=32, width=48, images=True, **OPTIONS)
    assert found.error(found.removals[0]) > 0
    assert found.removals[0].images is not None


def test_what_cannot_be_analysed(tiny: StableDiffusionPipeline) -> None:
    for prompts, complaint in (
        (("a red circle", "a red circle"), "all prompts are the same"),
        (("a red circle",), "there is one prompt"),
        (("", ""), "all prompts are the same"),
        (("a red circle", "a  red circle "), "encoded alike"),
        ((), "no prompts"),
    ):
        with pytest.raises(SpecError, match=complaint):
            analyse(tiny, prompts, num_images_per_prompt=2, **OPTIONS)
    for wrong in ({"levels": ("blocks",)}, {"target": "tensorrt"}, {"calls": 0}, {"levels": ()}, {"kept_bytes": -1}):
        with pytest.raises(SpecError):
            analyse(tiny, PROMPTS, **{**OPTIONS, **wrong})
    reusing = sdgraph.apply(tiny.unet, [InheritFeatures.deep_cache(2)], verify=False)
    with pytest.raises(SpecError, match="inherits or bypasses features"):
        analyse(with_part(tiny, unet=reusing), PROMPTS, **OPTIONS)
    scheduler = EulerAncestralDiscreteScheduler.from_config(tiny.scheduler.config)
    with pytest.raises(SourceError, match="adds random numbers"):
        analyse(with_part(tiny, scheduler=scheduler), PROMPTS, **OPTIONS)
    with pytest.raises(SpecError, match="smaller than 11 pixels"):
        analyse(tiny, PROMPTS, images=True, height=8, width=8, **OPTIONS)


def test_a_target_that_is_not_there_is_refused_before_anything_is_measured(
    tiny: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(analysis, "final_latents", None)
    for target, complaint in (
        ("eagre", "there is no target 'eagre'"),
        ("onnx:Nowhere", "has no provider 'Nowhere'"),
    ):
        with pytest.raises(SpecError, match=complaint):
            analyse(tiny, PROMPTS, **{**OPTIONS, "target": target})
    if not torch.cuda.is_available():  # ONNX Runtime may list the provider all the same
        with pytest.raises(sdgraph.SdgraphError, match=r"does not start here|has no provider"):
            analyse(tiny, PROMPTS, **{**OPTIONS, "target": "onnx:CUDAExecutionProvider"})
    half = with_part(tiny, unet=sdgraph.apply(tiny.unet, ()).to(torch.bfloat16))
    with pytest.raises(sdgraph.SdgraphError, match="bfloat16 cannot be exported"):
        analyse(half, PROMPTS, **{**OPTIONS, "target": "onnx:CPUExecutionProvider"})
    monkeypatch.setitem(__import__("sys").modules, "sdgraph.exporters.onnx.removed_regions", None)
    with pytest.raises(ExtraError, match="removed_regions"):
        analyse(tiny, PROMPTS, **{**OPTIONS, "target": "onnx:CPUExecutionProvider"})


@pytest.mark.parametrize("target", [pytest.param("onnx:CPUExecutionProvider", marks=pytest.mark.long), "compiled"])
def test_seconds_on_other_targets(target: str, tiny: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    if target == "compiled":  # by the same steps, without a compiler
        monkeypatch.setattr(sdgraph.GraphUNet, "compile", lambda unet: setattr(unet, "compiled", True))
    else:
        pytest.importorskip("onnxruntime")
    found = analyse(tiny, PROMPTS, **{**OPTIONS, "target": target, "levels": ("block", "layer")})
    assert [one.path for one in found.removals] == ["mid_block", PATH]
    assert all(isinstance(one.time, float) for one in found.removals)
    assert found.target is not None
    assert target.removeprefix("onnx:") in found.target
    assert "threads" in found.target
    assert "time" in str(found).split()


def test_a_compiler_that_is_not_there_is_said(tiny: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(unet: sdgraph.GraphUNet) -> None:
        def fails(*_: object) -> None:
            raise RuntimeError("no compiler\n  at all")

        monkeypatch.setattr(unet, "run", fails)

    monkeypatch.setattr(sdgraph.GraphUNet, "compile", compile_)
    with pytest.raises(SpecError, match=r"cannot compile the UNet here: no compiler\n"):
        analyse(tiny, PROMPTS, **{**OPTIONS, "target": "compiled"})
