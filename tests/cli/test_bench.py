"""`sdgraph bench` of a pipeline."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from sdgraph.cli import main
from sdgraph.exporters import engines
from sdgraph.exporters.engines import Comparison, Job, Row, Way

from ..documents import ROOT

SCENES = str(ROOT / "examples/scenes/model")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the comparison, which is not run."""
    arguments: dict[str, Any] = {}

    def compare(pipeline: str, passes: Any, **options: Any) -> Comparison:
        arguments.update(options, pipeline=pipeline, passes=passes)
        job = Job(pipeline, ("a cat",), {"num_inference_steps": 4}, bundles="unet-onnx")
        return Comparison(job, (Row(Way("PyTorch", "float32"), 1.0, 2.0, 3e9, 40.0),), {}, {"threads": 1})

    monkeypatch.setattr(engines, "compare", compare)
    return arguments


def test_options_of_images_reach_the_comparison(
    asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a large red circle\na small blue square\n")
    prompts = str(tmp_path / "prompts.txt")
    words = ["--prompts", prompts, "--steps", "4", "--height", "64", "--width", "128", "--scheduler",
             "DPMSolverMultistepScheduler(use_karras_sigmas=True)", "--guidance-scale", "3", "--threads", "1",
             "--without", "compiled", "--rounds", "1", "--out", str(tmp_path / "bench.json")]  # fmt: skip
    assert main(["bench", SCENES, "InheritFeatures.damped(2)", *words]) == 0
    assert asked["prompts"] == ["a large red circle", "a small blue square"]
    assert asked["steps"] == 4
    assert asked["call"] == {"height": 64, "width": 128, "guidance_scale": 3.0}
    assert asked["scheduler"] == ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True})
    assert asked["leave_out"] == ["compiled"]
    assert asked["threads"] == asked["rounds"] == 1
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["rows"][0]["seconds"] == 1.0
    assert written["command"] == shlex.join(["sdgraph", "bench", SCENES, "InheritFeatures.damped(2)", *words])
    assert "The fastest:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--calls", "5"], "examples/scenes/model is a pipeline, and this option is for an exported UNet"),
        (["--provider", "CPUExecutionProvider"], "this option is for an exported UNet"),
        (["--height", "65"], "cannot run at a height of 65 pixels"),
        (["--scheduler", "Karras"], "diffusers has no scheduler 'Karras'"),
        (["Prune"], "Prune"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["bench", SCENES, *words]) == 2
    assert message in capsys.readouterr().err
    assert not asked
