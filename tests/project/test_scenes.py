"""The code of `examples/scenes`; test_scenes_model.py checks the model that is shipped."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from scenes import card, data, models, quality
from scenes.caption import WORDS, CaptionError, Mention, caption, mentions
from scenes.draw import draw
from scenes.fit import OutOfTimeError, fit, read_log
from scenes.judge import Judge
from scenes.pipeline import GUIDANCE, JUDGE, MODEL, AssetError, load, load_student
from scenes.scene import COLOURS, HELD_OUT, SHAPES, Scene
from torch import Tensor, nn

import sdgraph

from ..documents import ROOT

EXAMPLES = ROOT / "examples"
ONE_STEP = {"num_inference_steps": 1, "output_type": "np"}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def some(count: int, held_out: bool = False, seed: int = 5) -> list[Scene]:
    return data.scenes(count, seed, held_out)


# -- scenes, captions and pixels --------------------------------------------------------------------------------------


def test_a_seed_is_a_scene() -> None:
    assert some(20) == some(30)[:20]
    assert some(20) != some(20, seed=6)
    assert all(np.array_equal(draw(a), draw(b)) for a, b in zip(some(5), some(5), strict=True))


def test_training_and_held_out_scenes_share_no_combination() -> None:
    def pairs(scenes: list[Scene]) -> list[set[tuple[str, str]]]:
        return [{(thing.shape, thing.colour) for thing in one.things} for one in scenes]

    trained, held_out = pairs(some(2000)), pairs(some(2000, held_out=True))
    assert all(not each & HELD_OUT for each in trained)
    assert all(each & HELD_OUT for each in held_out)
    seen = set().union(*trained)
    assert len(seen) == len(SHAPES) * len(COLOURS) - len(HELD_OUT)  # everything else is in training
    assert {shape for shape, _ in HELD_OUT} <= {shape for shape, _ in seen}


def test_captions_are_true_and_can_be_read_back() -> None:
    rng = np.random.default_rng(0)
    for one in some(1000) + some(1000, held_out=True):
        text = caption(one, rng)
        found = mentions(text)
        assert len(found) == len(one.things)
        for a in found:
            assert any(
                (a.shape, a.colour) == (b.shape, b.colour) and a.size in (None, b.size) and a.place in (None, b.place)
                for b in one.things
            ), text


def test_a_caption_is_read_as_it_is_meant() -> None:
    assert mentions("a big red circle to the right of an orange star on a white background") == (
        Mention("circle", "red", "large", "right"),
        Mention("star", "orange", None, "left"),
    )
    assert mentions("a blue cross above the centre") == (Mention("cross", "blue", None, "top"),)
    assert mentions("a blue cross and a pink square") == (
        Mention("cross", "blue", None, None),
        Mention("square", "pink", None, None),
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a red dog", "unknown words.*: dog"),
        ("a red circle above", "no caption of a scene"),
        ("red circle", "no caption of a scene"),
        ("", "no caption of a scene"),
    ],
)
def test_what_is_no_caption(text: str, complaint: str) -> None:
    with pytest.raises(CaptionError, match=complaint):
        mentions(text)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_where_it_is(shape: str) -> None:
    """Its colour at its centre, the background around it, about the area of its circle, and smooth edges."""
    one = some(1)[0]
    thing = replace(one.things[0], shape=shape, position=(20.0, 40.0), radius=10.0, rgb=(200.0, 0.0, 0.0))
    image = draw(Scene((thing,), "black", (0.0, 0.0, 0.0)))
    assert image.shape == (64, 64, 3)
    assert image[40, 20].tolist() == [200, 0, 0]
    coverage = image[..., 0] / 200
    assert coverage.sum() == pytest.approx(math.pi * 10**2, rel=0.3)
    assert 10 < ((coverage > 0.02) & (coverage < 0.98)).sum() < 120
    y, x = np.mgrid[0:64, 0:64] + 0.5
    assert np.hypot(x - 20, y - 40)[coverage > 0].max() < 16
    if shape != "triangle":
        assert (x * coverage).sum() / coverage.sum() == pytest.approx(20, abs=0.1)
        assert (y * coverage).sum() / coverage.sum() == pytest.approx(40, abs=0.1)


def test_a_word_is_a_token() -> None:
    tokenizer = models.tokenizer()
    for word in WORDS:
        _, token, _ = tokenizer(word).input_ids
        assert tokenizer.decode([token]) == word
    rng = np.random.default_rng(0)
    assert max(len(tokenizer(caption(one, rng)).input_ids) for one in some(2000)) <= models.TOKENS


# -- training ---------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """Fits y = 3x."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) - 3 * x + 0.01 * torch.randn_like(x)).square().mean()


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def fitted(name: str, until: float = math.inf) -> Line:
        torch.manual_seed(0)
        line = Line()

        def draw(rng: np.random.Generator, count: int) -> tuple[Tensor, ...]:
            return (torch.from_numpy(rng.standard_normal((count, 1), dtype=np.float32)),)

        return fit(name, line, draw, tmp_path, steps=200, batch=8, rate=0.1, decay=0.9, until=until)

    whole = fitted("whole")
    with pytest.raises(OutOfTimeError, match=r"stopped: 1 of 200 steps"):
        fitted("stopped", until=0.0)
    with pytest.raises(OutOfTimeError, match=r"stopped: 2 of 200 steps"):
        fitted("stopped", until=0.0)
    again = fitted("stopped")
    assert torch.equal(again.layer.weight, whole.layer.weight)
    assert whole.layer.weight.item() == pytest.approx(3, abs=0.05)
    assert [step for step, _, _ in read_log(tmp_path / "stopped" / "loss.csv")] == list(range(25, 201, 25))
    losses = [[loss for _, _, loss in read_log(tmp_path / name / "loss.csv")] for name in ("whole", "stopped")]
    assert losses[0][1:] == losses[1][1:]


@pytest.mark.long
def test_training_end_to_end(tmp_path: Path) -> None:
    """Every stage for two steps, in pieces; then from the result, the UNet alone for two more."""

    def run(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", *map(str, arguments)]
        done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ("--scenes", "32", "--steps", "vae-crops=2,vae=2,judge=2,text=2,unet=2")
    stopped = run("scenes.train", "--work", tmp_path / "work", *small, "--minutes", "0")
    assert "vae-crops: 1 of 2 steps are done; the same command goes on" in stopped
    run("scenes.train", "--work", tmp_path / "work", *small)
    run("scenes.save", "--work", tmp_path / "work", "--model", tmp_path / "model")
    first = load(tmp_path / "model")
    assert np.isfinite(first("a red circle", **ONE_STEP).images).all()
    assert Judge.load(tmp_path / "model").look([draw(some(1)[0])])[1].shape == (1, 5, 3)

    more = ("--scenes", "32", "--steps", "vae-crops=0,vae=0,judge=0,text=0,unet=2", "--begin", tmp_path / "model")
    run("scenes.train", "--work", tmp_path / "again", *more)
    run("scenes.save", "--work", tmp_path / "again", "--model", tmp_path / "model")
    second = load(tmp_path / "model")
    same = {
        name: equal_weights(getattr(first, name), getattr(second, name)) for name in ("vae", "unet", "text_encoder")
    }
    assert same == {"vae": True, "unet": False, "text_encoder": False}
    runs = json.loads((tmp_path / "model" / "training.json").read_text())
    assert [list(each["stages"]) for each in runs.values()] == [["vae-crops", "vae", "judge", "text", "unet"], ["unet"]]


@pytest.mark.long
def test_a_student_end_to_end(tmp_path: Path) -> None:
    """A folder of an earlier student is replaced."""
    for _ in range(2):
        folders = ("--run", tmp_path / "run", "--out", tmp_path / "student")
        options = (*folders, "--share", 0.0005, "--scenes", 32, "--count", 8)
        command = [sys.executable, "-m", "scenes.student", *map(str, options)]
        done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert load_student(tmp_path / "student").dtype == torch.float32
    (tmp_path / "student" / card.CARD).write_text("<!-- figures -->\n<!-- end of figures -->")
    assert "| `max_train_steps` | 2 | 2 |" in card.filled(tmp_path / "student")


def equal_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# -- figures ----------------------------------------------------------------------------------------------------------


def test_a_verdict() -> None:
    red, blue = Mention("circle", "red", "large", "left"), Mention("star", "blue", "small", "right")
    expected = (replace(red, size=None), replace(blue, size=None))
    right = {"shape and colour": True, "place": True, "shape": True, "colour": True, "size": None, "count": True}
    assert quality.verdict(expected, (blue, red)) == right
    exchanged = (replace(red, place="right"), replace(blue, place="left"))
    assert quality.verdict(expected, exchanged) == {**right, "place": False}
    assert quality.verdict(expected, (red,))["shape and colour"] is False
    mixed = quality.verdict(expected, (replace(red, colour="blue"), replace(blue, colour="red")))
    assert (mixed["shape"], mixed["shape and colour"]) == (True, False)
    assert quality.verdict((replace(red, place=None),), (red,))["place"] is None


def test_frechet_is_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200_000, 2)) @ np.diag([1.0, 2.0])
    b = rng.standard_normal((200_000, 2)) @ np.diag([3.0, 1.0]) + [1.0, 0.0]
    assert quality.frechet(a, b) == pytest.approx(1 + (1 - 3) ** 2 + (2 - 1) ** 2, rel=0.02)
    assert quality.frechet(a, a) == pytest.approx(0, abs=1e-6)


# -- the shipped model ------------------------------------------------------------------------------------------------


def test_the_model_loads_as_any_pipeline() -> None:
    plain, ours = StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True), load()
    for pipe in (plain, ours):
        pipe.set_progress_bar_config(disable=True)
    prompt = "a red circle on the left of a small blue star"
    options = {**ONE_STEP, "latents": torch.randn(1, 4, 16, 16)}
    a, b = (pipe([prompt], **options, guidance_scale=GUIDANCE).images for pipe in (plain, ours))
    assert np.array_equal(a, b)
    assert np.array_equal(ours([prompt], **options).images, b)
    assert sum(file.stat().st_size for file in MODEL.rglob("*")) < 25e6
    config = ours.unet.config
    assert tuple(config.down_block_types) == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert config.layers_per_block == 2
    assert 5e6 < sum(p.numel() for p in ours.unet.parameters()) < 12e6


def test_a_word_it_does_not_know() -> None:
    with pytest.raises(CaptionError, match=r"unknown words in 'a red dog': dog"):
        load()("a red dog", **ONE_STEP)


def test_assets_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="there is no model in"):
        load(tmp_path)
    model = shutil.copytree(MODEL, tmp_path / "model")
    (model / JUDGE).rename(model / "elsewhere")
    with pytest.raises(AssetError, match=r"judge.*is missing"):
        Judge.load(model)
    (model / "elsewhere").rename(model / JUDGE)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AssetError, match=r"unet.*is damaged.*git checkout"):
        load(model)


@pytest.mark.slow
def test_evaluate_takes_the_judge(judge: Judge) -> None:
    _, captions = quality.held_out_captions(4)
    found = sdgraph.evaluate(
        load(), [], captions, judge=quality.Quality(judge, references=200), batch=4, progress=False,
        num_inference_steps=4,
    )  # fmt: skip
    assert found.pairwise["equal"] == 1
    assert {"shape and colour", "place", "frechet"} <= found.figures.keys()
    assert all(a == b or math.isnan(a) for a, b in found.figures.values())
