"""The shipped model of `examples/scenes`, its student and its judge: their figures, their cards and what they make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import card, data, quality, student
from scenes.draw import draw
from scenes.judge import Judge, labels
from scenes.pipeline import JUDGE, MODEL, STUDENT, load, load_student
from scenes.scene import Scene
from torch import nn

import sdgraph


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def some(count: int, held_out: bool = False, seed: int = 5) -> list[Scene]:
    return data.scenes(count, seed, held_out)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_judge_reads_drawn_scenes(judge: Judge, held_out: bool) -> None:
    scenes = some(1000, held_out, seed=11)
    _, found = judge.look(draw(one) for one in scenes)
    truth = torch.stack([labels(one) for one in scenes]).numpy()
    assert (found == truth).all((1, 2)).mean() >= 0.99  # all attributes of all objects of a scene
    assert (MODEL / JUDGE).stat().st_size < 2e6


@pytest.mark.slow
def test_figures_of_drawn_scenes_are_at_the_ceiling(judge: Judge) -> None:
    scenes, captions = quality.held_out_captions(200)
    images = np.stack([draw(one) for one in scenes]) / 255
    figures = quality.Quality(judge, references=500)(images, captions)
    assert figures["shape and colour"] >= 0.99
    assert figures["place"] >= 0.99
    blurred = images[:, ::-1]  # upside down: what is on top is at the bottom
    turned = quality.Quality(judge, references=500)(blurred, captions)
    assert turned["place"] < 0.75
    assert turned["frechet"] > figures["frechet"]
    swapped = quality.Quality(judge, references=500)(images, captions[1:] + captions[:1])
    assert swapped["shape and colour"] < 0.05


@pytest.mark.parametrize("folder", [MODEL, STUDENT])
def test_the_card_is_current(folder: Path) -> None:
    """If this fails: `python -m scenes.card`, from examples/."""
    assert card.filled(folder) == (folder / "README.md").read_text()


def test_the_figures_meet_the_bar() -> None:
    found = json.loads((MODEL / "quality.json").read_text())
    generated = found["figures"]["generated"]
    assert found["count"] == 1000
    assert generated["shape and colour"] >= 0.90
    assert generated["place"] >= 0.85


@pytest.mark.long
@pytest.mark.parametrize("unet", [None, load_student], ids=["model", "student"])
def test_the_model_makes_what_captions_say(unet: Callable[[], nn.Module] | None) -> None:
    """The recorded figures, on fewer images and steps."""
    pipe = load()
    if unet is not None:
        pipe.unet = unet()
    figures, _, _ = quality.measure(pipe, count=40, steps=20, guidance=quality.GUIDANCE)
    assert figures["generated"]["shape and colour"] >= 0.75
    assert figures["generated"]["place"] >= 0.7


def test_the_student_is_the_pruned_unet_of_the_model() -> None:
    tuned, untuned = load_student(), sdgraph.apply(load().unet, student.PASSES)
    assert [str(p.one) for p in tuned.graph.passes] == [student.PASSES]
    assert {name: p.shape for name, p in tuned.named_parameters()} == {
        name: p.shape for name, p in untuned.named_parameters()
    }
    pairs = zip(tuned.parameters(), untuned.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)
    assert tuned.dtype == torch.float32
    assert sum(file.stat().st_size for file in STUDENT.rglob("*.safetensors")) < 8e6
