"""An analysis measures what removals do, goes on after it was stopped, and leaves the pipeline as it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline

import sdgraph
from sdgraph.errors import SourceError, SpecError
from sdgraph.passes import InheritFeatures, PruneBlocks
from sdgraph.redundancy import analysis
from sdgraph.redundancy.analysis import analyse

PROMPTS = ("a red circle", "a blue square")
OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "calls": 2, "progress": False, "levels": ("block",)}


@pytest.fixture(autouse=True)
def few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are not what these tests are about."""
    monkeypatch.setattr(analysis, "TURNS", 3)


@pytest.mark.slow
def test_errors_and_savings_are_those_of_the_pruned_unet(pipe: StableDiffusionPipeline) -> None:
    unet = pipe.unet
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    found = analyse(pipe, PROMPTS, latents=True, **OPTIONS)
    assert pipe.unet is unet
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    by_path = {one.path: one for one in found.removals}
    assert {"mid_block", "up_blocks.3"} <= {*by_path, *found.fixed}
    one, calls = by_path["mid_block"], list[tuple[Any, Any]]()
    pruned = sdgraph.apply(unet, [PruneBlocks("mid_block")], verify=False)
    whole = sdgraph.apply(unet, (), verify=False)
    assert one.macs == pytest.approx(1 - pruned.graph.macs / whole.graph.macs)
    assert one.parameters == pytest.approx(
        1 - sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in whole.parameters())
    )
    whole.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    pipe.unet = whole
    try:
        pipe(list(PROMPTS), num_inference_steps=3, output_type="latent",
             generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)])  # fmt: skip
    finally:
        pipe.unet = unet
    with torch.no_grad():
        for error, (args, kwargs) in zip(one.errors, (calls[0], calls[2]), strict=True):  # the first and the last call
            kept, without = (model(*args, **{**kwargs, "return_dict": True}).sample for model in (whole, pruned))
            off = (without.double() - kept.double()).square().flatten(1).mean(1)
            assert error == pytest.approx(float((off / kept.double().square().flatten(1).mean(1)).mean()), rel=1e-4)
    assert all(removal.latents is not None and -1 <= removal.similarity <= 1 for removal in found.removals)


@pytest.mark.slow
def test_pairs_are_neighbours_of_a_block(pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "LEVEL", {"layer": re.compile(r"mid_block\.\w+\.0|down_blocks\.3\.resnets\.\d")})
    found = analyse(pipe, PROMPTS, pairs=True, **{**OPTIONS, "levels": ("layer",)})
    assert [pair.paths for pair in found.pairs] == [
        ("down_blocks.3.resnets.0", "down_blocks.3.resnets.1"),
        ("mid_block.resnets.0", "mid_block.attentions.0"),
    ]
    assert all(found.error(pair) > 0 for pair in found.pairs)


@pytest.mark.slow
def test_an_analysis_that_was_stopped_goes_on(
    pipe: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, ...]] = []
    seconds = analysis._Trial._seconds

    def counted(trial: Any, without: sdgraph.GraphUNet) -> Any:
        measured.append(tuple(without.graph.removed))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return seconds(trial, without)

    monkeypatch.setattr(analysis._Trial, "_seconds", counted)
    with pytest.raises(KeyboardInterrupt):
        analyse(pipe, PROMPTS, folder=tmp_path, **OPTIONS)
    found = analyse(pipe, PROMPTS, folder=tmp_path, **OPTIONS)
    assert len(measured) == len(found.removals) + 1  # one was measured before, one was interrupted
    again = analyse(pipe, PROMPTS, folder=tmp_path, **OPTIONS)
    assert again == found
    assert len(measured) == len(found.removals) + 1


def test_what_cannot_be_analysed(pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="encoded alike"):
        analyse(pipe, ("a red circle", "a red circle"), **OPTIONS)
    with pytest.raises(SpecError):
        analyse(pipe, (), **OPTIONS)
    for wrong in ({"levels": ("blocks",)}, {"target": "tensorrt"}, {"calls": 0}, {"levels": ()}):
        with pytest.raises(SpecError):
            analyse(pipe, PROMPTS, **{**OPTIONS, **wrong})
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "unet", sdgraph.apply(pipe.unet, [InheritFeatures.deep_cache(2)], verify=False))
        with pytest.raises(SpecError, match="inherits or bypasses features"):
            analyse(pipe, PROMPTS, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "scheduler", EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config))
        with pytest.raises(SourceError, match="adds random numbers"):
            analyse(pipe, PROMPTS, **OPTIONS)
