"""`sdgraph export`, `inspect` and `bench`, one after the other."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sdgraph.__main__ import main
from sdgraph.errors import SpecError
from sdgraph.exporters.ort.bench import bench

from ..exporters.exports import opened
from ..models import ONE_LEVEL, build

pytestmark = pytest.mark.slow


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    unet, out, figures = tmp_path / "unet", tmp_path / "out", tmp_path / "figures.json"
    build(**ONE_LEVEL).save_pretrained(unet)
    passes = "InheritFeatures.deep_cache(3)"
    assert main(["export", str(unet), "--passes", passes, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "variant_1.onnx" in said
    assert "OUT OF BOUNDS" not in said
    assert main(["inspect", str(out), "--calls", "10"]) == 0
    said = capsys.readouterr().out
    assert "0, 3, 6, 9" in said
    assert "1-2, 4-5, 7-8" in said
    assert "supposed: timesteps 901 to 1" in said
    assert "Uniform(3)" in said
    assert "batch" in said or "B, 4, H, W" in said
    arguments = [
        "bench",
        str(out),
        "--calls",
        "4",
        "--height",
        "64",
        "--width",
        "96",
        "--repeats",
        "1",
        "--out",
        str(figures),
    ]
    assert main([*arguments, "--provider", "CPUExecutionProvider"]) == 0
    said = capsys.readouterr().out
    assert "4 calls" in said
    assert "CPUExecutionProvider in float32" in said
    for option in (["--provider", "OpenVINO"], ["--provider", "CPUExecutionProvider", "--precision", "bfloat16"]):
        assert main([*arguments, "--overwrite", *option]) == 2
        assert "OpenVINOExecutionProvider" in capsys.readouterr().err
    assert set(json.loads(figures.read_text())["variants"]) == {"variant_0.onnx", "variant_1.onnx"}
    config = json.loads((unet / "config.json").read_text())  # of an export that names no size
    running = opened(out)
    running.config = {**config, "sample_size": None}
    with pytest.raises(SpecError, match="no sample_size"):
        bench(running)
    assert main(["export", str(unet), "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    (out / "model.onnx.data").write_bytes(b"")
    assert main(["inspect", str(out)]) == 2
    assert "not the file that was exported" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
