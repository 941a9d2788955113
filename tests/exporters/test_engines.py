"""The engines of this machine, side by side: what is printed is what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdgraph.errors import SourceError, SpecError
from sdgraph.exporters import engines
from sdgraph.exporters.engines import ENGINES, Comparison, Job, Row, Way, compare, ways

from ..documents import ROOT

PASSES = "InheritFeatures.damped(2)"
JOB = Job("a folder", ("a cat",), {"num_inference_steps": 4})


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    bundles = tmp_path_factory.mktemp("bundles")
    return replace(
        JOB, pipeline=str(ROOT / "examples/scenes/model"), prompts=("a large red circle",), threads=1,
        bundles=str(bundles),
    )  # fmt: skip


def test_ways_begin_with_the_reference_and_run_every_engine_with_and_without_the_passes() -> None:
    found, missing = ways(PASSES)
    assert found[0] == Way("PyTorch", "float32")
    assert {way.engine for way in found} | {name.split(" ")[0] for name in missing} >= set(ENGINES) - {"ONNX Runtime"}
    assert [replace(way, passes=PASSES) for way in found if not way.passes] == [way for way in found if way.passes]
    on_gpu, _ = ways("", "cuda")
    assert {way.dtype for way in on_gpu} == {"float32", "float16"}
    assert "OpenVINO" not in {way.engine for way in on_gpu}


def test_the_reference_is_never_left_out() -> None:
    found, _ = ways("", leave_out=ENGINES)
    assert found == (Way("PyTorch", "float32"),)
    with pytest.raises(SpecError, match=r"there is no engine 'Pytorch'(.*\n)*.*did you mean 'PyTorch'"):
        ways("", leave_out=["Pytorch"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_lines_of_every_way_are_python_that_makes_a_pipeline(device: str) -> None:
    full = replace(
        JOB, scheduler=("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}), variant="fp16",
        imports=("acme_passes",), threads=3, device=device,
    )  # fmt: skip
    for way in ways(PASSES, device)[0]:
        for one in (JOB, full):
            code = way.code(replace(one, device=device))
            compile(code, "way", "exec")
            assert "\npipe = " in code
            assert ("sdgraph.attach(pipe)" in code) == bool(way.passes)
            assert ("pipe.unet.compile()" in code) == (way.engine == "compiled")
            assert ("ORTUNet" in code) == way.exported
            assert way.exported or f"torch.{way.dtype}" in code
        assert "import acme_passes" in code
        assert "torch.set_num_threads(3)" in code
        assert "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)" in code
        assert f"{way.passes!r}" in code or way.exported or not way.passes


def test_the_fastest_row_is_one_with_the_passes_and_all_steps() -> None:
    rows = [
        Row(Way("PyTorch", "float32"), 4.0, 9.0, 2e9, math.inf),
        Row(Way("PyTorch", "bfloat16"), 1.0, 9.0, 1e9, 60.0),
        Row(Way("PyTorch", "float32", PASSES), 2.0, 9.0, 2e9, 30.0),
        Row(Way("PyTorch", "bfloat16", PASSES), failure="MemoryError: too large"),
        Row(Way("PyTorch", "float32", steps=2), 0.5, 9.0, 2e9, 20.0),
    ]
    comparison = Comparison(JOB, tuple(rows), {"OpenVINO": "no device"}, {"threads": 2})
    assert comparison.best is rows[2]
    assert Comparison(JOB, tuple(rows[:2]), {}, {}).best is rows[1]
    text = str(comparison)
    assert "PyTorch bfloat16 fails: MemoryError: too large" in text
    assert "OpenVINO: not measured, because no device" in text
    assert f"sdgraph.apply(pipe.unet, {PASSES!r})" in text
    plain = json.loads(json.dumps(comparison.as_dict(), allow_nan=False))
    assert [row["seconds"] for row in plain["rows"]] == [4.0, 1.0, 2.0, None, 0.5]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rounds": 0}, {"repeats": 0}, {"threads": 0}, {"prompts": ()}])
def test_wrong_options_are_refused_before_anything_runs(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        compare("nowhere", **wrong)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
def test_a_process_runs_the_lines_and_reports_the_images(job: Job, tmp_path: Path) -> None:
    """The measured images are those of the printed lines."""
    way = Way("PyTorch", "float32", PASSES)
    task = {
        "code": way.code(job), "call": job.call, "prompts": job.prompts, "repeats": 1, "start": 0.0, "device": "cpu",
    }  # fmt: skip
    (tmp_path / "task.json").write_text(json.dumps(task))
    threads = torch.get_num_threads()
    engines._measure(tmp_path)
    names: dict[str, Any] = {}
    exec(way.code(job), names)
    torch.set_num_threads(threads)
    made = names["pipe"](
        job.prompts[0], generator=torch.Generator().manual_seed(0), output_type="np", **job.call
    ).images  # fmt: skip
    assert np.array_equal(np.load(tmp_path / "images.npy"), made)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["seconds"]) == 1
    assert report["memory"] > 1e8


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # if PyTorch is the fastest
def test_a_comparison_runs_every_engine_that_is_installed(job: Job) -> None:
    leave_out = ["compiled"]
    found = compare(
        job.pipeline, PASSES, prompts=job.prompts, steps=4, threads=1, leave_out=leave_out, rounds=1, repeats=1,
        bundles=job.bundles, progress=False,
    )  # fmt: skip
    assert [row.failure for row in found.rows] == [None] * len(found.rows)
    assert found.rows[0].psnr == math.inf
    for row in found.rows:
        if row.way.dtype == "float32" and not row.way.passes and row.way.steps is None:
            assert row.psnr > 60, row.way
    assert found.best.way.passes
    names: dict[str, Any] = {}
    threads = torch.get_num_threads()
    exec(found.best.way.code(found.job), names)
    torch.set_num_threads(threads)
    assert len(names["pipe"]("a large red circle", num_inference_steps=2).images) == 1


@pytest.mark.slow
def test_a_pipeline_that_makes_no_images_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"PyTorch float32, .*nowhere"):
        compare(tmp_path / "nowhere", steps=1, rounds=1, repeats=1, leave_out=ENGINES, progress=False)
