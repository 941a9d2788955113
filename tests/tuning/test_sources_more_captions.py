"""`sdgraph.tuning.MoreCaptions`: captions without images, which very noisy latents are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from sdgraph.errors import TuningError
from sdgraph.tuning import Batches, Images, MoreCaptions, NoiseSchedule, Tensors

from ..photos import CAPTIONS, write_photos
from ..pipelines import large_with_text

MORE = ["a purple star", "a small white circle"]
NOISING = NoiseSchedule.of(DDPMScheduler())


@pytest.fixture(params=["SD", "SDXL"])
def pipeline(request: pytest.FixtureRequest, pipe: Any) -> Any:
    return pipe if request.param == "SD" else large_with_text()


def test_rows_keep_their_captions_and_more_are_encoded_as_a_pipeline_does(pipeline: Any, tmp_path: Path) -> None:
    images = Images(write_photos(tmp_path), pipeline, resolution=16)
    source = MoreCaptions(images, MORE, pipeline)
    assert (len(source), source.captions) == (len(CAPTIONS), len(CAPTIONS) + len(MORE))

    found = source.conditions([6, 0, None, 5, 4])
    own = images.conditions([1, 0, None, 0, 4])
    encoded = pipeline.encode_prompt(MORE, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    texts = dict(zip(("encoder_hidden_states", "text_embeds"), encoded[::2], strict=False))
    assert found.keys() == own.keys()
    for name, value in found.items():
        assert torch.equal(value[[1, 2, 4]], own[name][[1, 2, 4]])
        if name == "time_ids":
            assert torch.equal(value, own[name])  # of some row
        else:
            torch.testing.assert_close(value[[3, 0]], texts[name])
            assert not torch.equal(value[[3, 0]], own[name][[3, 0]])


def test_noisy_latents_are_given_them(pipe: Any) -> None:
    empty = {"encoder_hidden_states": pipe.encode_prompt("", "cpu", 1, False)[0][0]}
    rows = Tensors(torch.zeros(2, 4, 8, 8), {name: value.expand(2, -1, -1) + 1 for name, value in empty.items()}, empty)
    source = MoreCaptions(rows, MORE * 9, pipe)
    batch = Batches(source, NOISING, 200, random_conditioning=True, proportion_empty_prompts=0.2).batch(3, range(200))

    texts = pipe.encode_prompt(MORE, "cpu", 1, False)[0]
    given = batch.conditions["encoder_hidden_states"]
    new = torch.stack([torch.isclose(given, text, atol=1e-5).flatten(1).all(1) for text in texts])
    early, late = batch.timesteps < 400, batch.timesteps > 900
    assert (new.sum(1) > 5).all()
    assert new.any(0)[late].float().mean() > 0.5
    assert new.any(0)[early].float().mean() < 0.1
    assert batch.own is not None
    assert not batch.own[new.any(0)].any()


def test_captions_that_would_not_be_read_or_are_none_are_refused(pipe: Any) -> None:
    rows = Tensors(torch.zeros(2, 4, 8, 8), {"encoder_hidden_states": torch.zeros(2, 5, 8)})
    for wrong in ([], [1], ["\ud83d"]):
        with pytest.raises(TuningError, match=r"no captions|captions is|half a character"):
            MoreCaptions(rows, wrong, pipe)  # type: ignore[arg-type]
    source = MoreCaptions(rows, MORE, pipe)
    with pytest.raises(TuningError, match=r"random conditioning only(.|\n)*random_conditioning=True"):
        Batches(source, NOISING, 4)
    with pytest.raises(TuningError, match=r"already(.|\n)*all captions at once"):
        MoreCaptions(source, MORE, pipe)
    others = [MoreCaptions(rows, MORE[:1], pipe), MoreCaptions(rows, MORE[::-1], pipe)]
    assert len({one.fingerprint() for one in [rows, source, *others]}) == 4
    assert source.fingerprint() == MoreCaptions(rows, MORE, pipe).fingerprint()
