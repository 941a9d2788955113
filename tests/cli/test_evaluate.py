"""`sdgraph evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scenes.pipeline import MODEL, load

import sdgraph
from sdgraph.__main__ import main

PRUNE = "PruneBlocks('mid_block')"


@pytest.mark.slow
def test_evaluate_prints_writes_and_judges(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "evaluation"
    given = [
        "evaluate",
        str(MODEL),
        PRUNE,
        "--prompts",
        str(prompts),
        "--seeds",
        "1",
        "2",
        "--steps",
        "1",
        "--batch",
        "4",
    ]
    assert main([*given, "--require", "psnr=5", "ssim=0.01", "--at-most", "largest=1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"after:  {PRUNE}\n4 images" in said
    written = json.loads((out / "evaluation.json").read_text())
    assert [each["seed"] for each in written["images"]] == [1, 2, 1, 2]
    assert f"{written['pairwise']['psnr']:.4g} dB" in said
    with Image.open(out / "evaluation.png") as sheet:
        assert sheet.width > 3 * 64
    # what falls short is written as well, and the status tells
    assert main([*given, "--require", "psnr=500", "--out", str(out), "--overwrite"]) == 1
    captured = capsys.readouterr()
    assert "sdgraph: PSNR below 500 dB: " in captured.err
    assert f"written to {out}" in captured.out


@pytest.mark.slow
def test_evaluate_takes_a_saved_unet(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sdgraph.apply(load().unet, (), verify=False).save_pretrained(tmp_path / "unet")
    given = ["evaluate", str(MODEL), str(tmp_path / "unet"), "--prompts", str(prompts), "--steps", "1"]
    assert main([*given, "--require", "psnr=1000", "--at-most", "largest=0"]) == 0
    assert "after:  GraphUNet" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "unet"), "CleanUp", "--prompts", str(prompts)]) == 2
    assert "there is no pipeline in" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_loads")
def test_a_figure_that_is_not_measured(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(MODEL), PRUNE, "--prompts", str(prompts), "--require", "pnsr=30"]) == 2
    assert "did you mean 'psnr'" in capsys.readouterr().err
    assert main(["evaluate", str(MODEL), "./nowhere", "--prompts", str(prompts)]) == 2
    assert "there is no folder ./nowhere" in capsys.readouterr().err
    for option in (["--provider", "CPUExecutionProvider"], ["--precision", "bfloat16"]):
        assert main(["evaluate", str(MODEL), PRUNE, "--prompts", str(prompts), *option]) == 2
        assert "runs exported UNets" in capsys.readouterr().err


def evaluated(capsys: pytest.CaptureFixture[str], out: Path, *given: str) -> tuple[str, str, dict[str, Any]]:
    """Return the text that an evaluation prints, and the figures that it writes."""
    capsys.readouterr()
    assert main(["evaluate", str(MODEL), *given, "--out", str(out), "--overwrite"]) == 0
    said = capsys.readouterr()
    return said.out, said.err, json.loads((out / "evaluation.json").read_text())


@pytest.mark.slow
def test_evaluate_compares_steps_schedulers_and_references(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts.write_text("a large red circle\n")
    out, common = tmp_path / "out", ["--prompts", str(prompts), "--steps", "1"]
    said, _, written = evaluated(capsys, out, *common, "--reference-steps", "2")
    assert "(num_inference_steps=2)" in written["before"]
    assert "(num_inference_steps=1)" in written["after"]
    assert written["pairwise"]["equal"] == 0
    said, _, written = evaluated(capsys, out, *common, "--reference-scheduler", "EulerDiscreteScheduler")
    assert "(EulerDiscreteScheduler)" in written["before"]
    assert "(DDIMScheduler)" in written["after"]
    assert written["pairwise"]["equal"] == 0
    # the same change on both sides
    said, _, written = evaluated(capsys, out, PRUNE, "--reference", PRUNE, *common)
    assert written["pairwise"]["equal"] == 1
    assert "the images are equal: both sides compute the same" in said
    # options of both sides
    plain = evaluated(capsys, out, "CleanUp", *common)[2]
    assert plain["pairwise"]["equal"] == 1
    sized = [*common, "--height", "72", "--width", "80", "--guidance-scale", "2", "--negative-prompt", "blue"]
    evaluated(capsys, out, "CleanUp", *sized, "--scheduler", "EulerDiscreteScheduler")
    with Image.open(out / "evaluation.png") as sheet:
        assert sheet.width > 3 * 80


@pytest.mark.slow
def test_a_changed_pipeline_is_compared_with_itself_or_with_its_teacher(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = load()
    pipe.unet = sdgraph.apply(pipe.unet, PRUNE, verify=False)
    pipe.save_pretrained(tmp_path / "tuned")
    given = ["evaluate", str(tmp_path / "tuned"), "--prompts", str(prompts), "--steps", "1"]
    assert main(given) == 2
    assert "there is nothing to compare" in capsys.readouterr().err
    assert main([*given, "--reference", str(MODEL)]) == 0
    said = capsys.readouterr().out
    assert f"Pipeline with {PRUNE}\n" in said
    assert "both sides compute the same" not in said
    assert main([*given[:2], "CleanUp", *given[2:]]) == 0
    said_too = capsys.readouterr()
    assert f"the reference is the UNet of {tmp_path / 'tuned'} itself ({PRUNE}); --reference" in said_too.err
    assert "both sides compute the same" in said_too.out
