"""`sdgraph.evaluate`: what it compares and what it refuses."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from scenes import models
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

import sdgraph
from sdgraph.errors import EditError, PathError, QualityError, SourceError, SpecError
from sdgraph.evaluation import metrics

from ..models import build

CALL: dict[str, Any] = {"num_inference_steps": 2, "progress": False}

PROMPTS = ["a red circle", "a small blue star on a white background"]

PRUNE = "PruneBlocks('mid_block.attentions.0')"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    """One of a tiny UNet that reads the scenes' captions; its progress bar is not set up yet."""
    torch.manual_seed(0)
    tokenizer = models.tokenizer()
    unet = build(sample_size=16, cross_attention_dim=models.TEXT_WIDTH)
    return models.pipeline(tokenizer, models.text_encoder(tokenizer), models.vae(), unet)


def test_clip_score_is_the_cosine(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    """A tiny random CLIP with the scenes' tokenizer; the scores of `evaluate` are those of its embeddings."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(pipe.tokenizer), "max_position_embeddings": models.TOKENS}
    tokens |= {name: getattr(pipe.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={**shape, **tokens}, vision_config={**shape, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPProcessor(CLIPImageProcessorPil(**sizes), pipe.tokenizer)
    processor.save_pretrained(tmp_path)
    found = sdgraph.evaluate(pipe, PRUNE, PROMPTS, perceptual=["clip"], clip=str(tmp_path), **CALL)
    for side, score in enumerate(found.figures["clip"]):
        cosines = []
        for image, prompt in zip(found.images[side], PROMPTS, strict=True):
            inputs = processor(
                text=prompt, images=Image.fromarray((255 * image).round().astype("uint8")), return_tensors="pt"
            )
            with torch.no_grad():
                cosines.append(clip(**inputs).logits_per_image.item() / clip.logit_scale.exp().item())
        assert score > 0
        assert score == pytest.approx(100 * np.clip(cosines, 0, None).mean(), abs=1e-3)


def test_a_traced_unet_makes_the_same_images(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    own = pipe.unet
    found = sdgraph.evaluate(pipe, [], PROMPTS, seeds=(0, 1), batch=2, **CALL)
    assert found.pairwise == {"psnr": math.inf, "ssim": pytest.approx(1), "largest": 0, "equal": 1}
    assert found.require(psnr=30, ssim=0.99, at_most={"largest": 0}) is found
    assert found.prompts == (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1])
    assert found.seeds == (0, 1, 0, 1)
    assert pipe.unet is own
    assert not hasattr(pipe, "_progress_bar_config")
    found.save(tmp_path)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["pairwise"]["psnr"] is None
    assert len(written["images"]) == 4


def test_images_are_those_of_the_pipeline(pipe: StableDiffusionPipeline) -> None:
    """Whatever the batch: each image has the seed that is recorded with it."""
    pruned = sdgraph.apply(pipe.unet, PRUNE)
    pipe.set_progress_bar_config(disable=True)
    found = sdgraph.evaluate(pipe, pruned, PROMPTS, seeds=(3, 4), batch=3, **CALL)
    assert pipe._progress_bar_config == {"disable": True}
    for i in (1, 3):
        own = pipe(
            found.prompts[i], generator=torch.Generator().manual_seed(4), num_inference_steps=2, output_type="np"
        )
        assert np.allclose(found.images[0][i], own.images[0], atol=1e-5)
    assert found.pairwise["psnr"] == metrics.psnr(*found.images)
    assert 0 < found.pairwise["largest"] <= 1
    del pipe._progress_bar_config


@pytest.mark.slow
def test_a_pass_list_is_refused(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    def judge(images: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
        assert len(images) == len(prompts)
        return {"brightness": float(images.mean())}

    found = sdgraph.evaluate(pipe, PRUNE, PROMPTS[0], judge=judge, **CALL)
    psnr = found.pairwise["psnr"]
    assert math.isfinite(psnr)
    with pytest.raises(QualityError, match=rf"PSNR below 200 dB: {psnr:.4g}\n  where: PruneBlocks"):
        found.require(psnr=200)
    with pytest.raises(QualityError, match=r"brightness below 2: 0\.\d+; largest above 0: "):
        found.require(brightness=2, at_most={"largest": 0})
    with pytest.raises(SpecError, match=r"no figure 'pnsr'.*\n.*\n.*did you mean 'psnr'"):
        found.require(pnsr=30)
    before, after = found.figures["brightness"]
    assert before == found.images[0].mean()
    assert after == found.images[1].mean()
    text = str(found)
    assert "PruneBlocks" in text
    assert f"{psnr:.4g} dB" in text
    found.save(tmp_path)
    with Image.open(tmp_path / "evaluation.png") as sheet:
        assert sheet.width > 3 * 128


def test_two_unets_in_a_pipeline(pipe: StableDiffusionPipeline) -> None:
    pruned = sdgraph.apply(pipe.unet, PRUNE)
    found = sdgraph.evaluate(pruned, "CleanUp", PROMPTS[0], pipe=pipe, **CALL)  # applied to the pruned one
    assert found.pairwise["equal"] == 1
    whole = sdgraph.evaluate(pruned, pipe.unet, PROMPTS[0], pipe=pipe, **CALL)
    assert whole.pairwise["equal"] == 0


CACHE = "InheritFeatures.deep_cache(2)"


@pytest.mark.parametrize(
    ("passes", "error", "complaint"), [(PRUNE, PathError, "no longer in the graph"), (CACHE, EditError, "site")]
)
def test_a_pass_on_what_it_has_changed_already(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, passes: str, error: type[Exception], complaint: str
) -> None:
    """It is refused as `apply` refuses it, whichever way the UNet is given, and nothing is exchanged."""
    changed = sdgraph.apply(pipe.unet, passes)
    with pytest.raises(error, match=complaint):
        sdgraph.evaluate(changed, passes, PROMPTS[0], pipe=pipe, **CALL)
    monkeypatch.setattr(pipe, "unet", changed)
    with pytest.raises(error, match=complaint):
        sdgraph.evaluate(pipe, passes, PROMPTS[0], **CALL)
    assert pipe.unet is changed


@pytest.mark.slow
def test_passes_on_a_unet_that_inherits(pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two sides take turns, and neither takes over features of the other, or of its earlier images."""
    own, call = pipe.unet, {**CALL, "num_inference_steps": 4}
    inheriting = sdgraph.apply(own, ["CleanUp", CACHE])
    monkeypatch.setattr(pipe, "unet", inheriting)
    found = sdgraph.evaluate(pipe, ["CleanUp", PRUNE], PROMPTS, seeds=(0, 1), **call)
    fresh = [sdgraph.apply(own, passes) for passes in (["CleanUp", CACHE], ["CleanUp", CACHE, PRUNE])]
    again = sdgraph.evaluate(*fresh, PROMPTS, pipe=pipe, seeds=(0, 1), **call)
    for side in (0, 1):
        assert np.array_equal(found.images[side], again.images[side])
    assert again.before.startswith("GraphUNet: CleanUp(), InheritFeatures(")
    twice = sdgraph.evaluate(pipe, "CleanUp", PROMPTS[0], **call)
    assert twice.pairwise["equal"] == 1
    assert sdgraph.evaluate(own, inheriting, PROMPTS[0], pipe=pipe, **call).pairwise["equal"] == 0


def test_bad_input(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(SourceError, match=r"not a diffusers pipeline.*\n.*before.*\n.*pipe="):
        sdgraph.evaluate(pipe.unet, [], PROMPTS, **CALL)
    with pytest.raises(SourceError, match="neither a pipeline nor a UNet nor passes"):
        sdgraph.evaluate(pipe, 3, PROMPTS, **CALL)
    with pytest.raises(SpecError, match="no prompts"):
        sdgraph.evaluate(pipe, [], [], **CALL)
    with pytest.raises(SpecError, match=r"'lips'(.*\n)*.*did you mean 'lpips'"):
        sdgraph.evaluate(pipe, [], PROMPTS, perceptual=["lips"], **CALL)


def test_a_pipeline_without_a_unet(pipe: StableDiffusionPipeline) -> None:
    class Other(DiffusionPipeline):
        def __init__(self, vae: Any) -> None:
            super().__init__()
            self.register_modules(vae=vae)

    with pytest.raises(SourceError, match=r"Other has no UNet, only vae"):
        sdgraph.evaluate(Other(pipe.vae), [], PROMPTS, **CALL)


def test_images_that_are_not_finite(pipe: StableDiffusionPipeline) -> None:
    broken = copy.deepcopy(sdgraph.apply(pipe.unet, []))
    with torch.no_grad():
        next(p for name, p in broken.named_parameters() if name.endswith("bias")).fill_(math.nan)
    own = pipe.unet
    with pytest.raises(QualityError, match="not finite"):
        sdgraph.evaluate(pipe, broken, PROMPTS[0], **CALL)
    assert pipe.unet is own
    assert all(torch.isfinite(p).all() for p in own.parameters())


def test_images_are_compared_whatever_the_caller_wants_of_them(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(SpecError, match="evaluate sets output_type itself"):
        sdgraph.evaluate(pipe, (), "a red circle", output_type="latent")
