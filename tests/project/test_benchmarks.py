"""The benchmarks run, and the figures in documents are their results."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from ..documents import ROOT, load


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # as Python does for a script
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the demo sets it: let go of it afterwards


@pytest.mark.parametrize("name", ["docs/deploying.md", "docs/measurements.md"])
def test_the_figures_in_documents_are_the_results(name: str) -> None:
    table, document = load("benchmarks/table.py"), (ROOT / name).read_text()
    blocks = list(table.MARKED.finditer(document))
    assert blocks
    for block in blocks:
        assert table.filled(document, ROOT / block["file"]) == document


@pytest.mark.long
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """As users run it: the case in a process of its own, figures and samples in a file, its table printed."""
    script, out = ROOT / "benchmarks" / "overhead.py", tmp_path / "result.json"
    run = subprocess.run(
        [sys.executable, str(script), "--quick", "--seconds", "0.1", "--out", str(out), "apply/tiny"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    (apply,) = result["cases"]
    assert apply["not_shared_bytes"] == 0
    assert load("benchmarks/table.py").report(result) in run.stdout
    assert "smoke test" in run.stdout


@pytest.mark.long
def test_the_cases_are_measured() -> None:
    overhead, table = load("benchmarks/overhead.py"), load("benchmarks/table.py")
    settings = overhead.Settings(seconds=0.1, at_least=3, quick=True)
    names = ("forward/tiny/16", "prune/tiny/16", "inherit/tiny/16", "experts/tiny/16", "attention/tiny/16")
    cases = [overhead.cases.run(case, settings) for case in names]
    forward, prune, inherit, experts, attention = cases
    assert forward["largest_difference"] == 0
    assert len(forward["samples"]["eager"]) == len(forward["samples"]["traced"]) >= 3
    macs = [prune["sizes"][name]["macs"] for name in ("traced", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")]
    assert macs == sorted(macs, reverse=True)
    assert set(inherit["largest_difference"].values()) == {0}
    assert all(inherit["kept_bytes"][name] > 0 for name in inherit["timetables"])
    assert experts["sizes"]["timestep"]["parameters"] > experts["sizes"]["plain"]["parameters"]
    assert set(attention["alone"]) == set(attention["samples"]) == {"full", "window 8, pool 4"}
    figures = {**overhead.measure.circumstances("cpu"), "settings": asdict(settings), "cases": cases}
    text = table.report(figures)
    assert all(
        word in text for word in ("traced, no passes", "MACs/whole", "DeepCache", "MECondConv", "window 8, pool 4")
    )


@pytest.mark.long
def test_the_providers_are_measured(tmp_path: Path) -> None:
    """An engine that is not to be had here is a row that says why."""
    script, out = ROOT / "benchmarks" / "providers.py", tmp_path / "result.json"
    given = ["--models", "tiny", "--threads", "1", "--seconds", "0.1", "--out", str(out)]
    run = subprocess.run([sys.executable, str(script), *given], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = {row["engine"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"PyTorch bfloat16", "ONNX Runtime float32", "OpenVINO float32", "OpenVINO bfloat16"}
    assert rows["PyTorch bfloat16"]["psnr"] < 80 < rows["ONNX Runtime float32"]["psnr"]
    for row in rows.values():
        assert row.get("failed") or all(len(samples) >= 3 for samples in row["samples"].values())


@pytest.mark.full
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    """So that nothing is found broken on the day that there is a GPU."""
    script, out = ROOT / "benchmarks" / "gpu.py", tmp_path / "result.json"
    run = subprocess.run(
        [sys.executable, str(script), "--device", "cpu", "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (case,) = json.loads(out.read_text())["cases"]
    assert not {name: way["failed"] for name, way in case["ways"].items() if "failed" in way}
    inheriting = [
        way["difference"]["4"] for name, way in case["ways"].items() if "inherit" in name or "DeepCache" in name
    ]
    whole = [
        way["difference"]["4"] for name, way in case["ways"].items() if not ("inherit" in name or "DeepCache" in name)
    ]
    assert max(whole) < 1e-3 < min(inheriting)
    assert "no CUDA graphs" in run.stderr  # it says why
