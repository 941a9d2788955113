"""The study of tuning: its results grow over several runs, and have one table."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..documents import ROOT


@pytest.mark.long
def test_ways_are_added_and_those_that_are_there_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.tuning", "--quick", "--folder", tmp_path / "runs", "--out", out]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, command), *more], cwd=ROOT, capture_output=True, text=True, timeout=300)

    first = run("--methods", "untuned")
    assert first.returncode == 0, first.stderr[-2000:]
    ways = json.loads(out.read_text())["methods"]
    assert list(ways) == ["teacher", "base, untuned"]
    assert ways["base, untuned"]["parameters"] < ways["teacher"]["parameters"]
    second = run("--methods", "untuned", "ours")
    assert second.returncode == 0, second.stderr[-2000:]
    result = json.loads(out.read_text())
    assert {name: result["methods"][name] for name in ways} == ways
    assert result["methods"]["base, ours"]["losses"] == ["Output()", "Features(weight=10.0)", "Denoising(weight=0.01)"]
    assert importlib.import_module("benchmarks.measuring.documents").report(result) in second.stdout
    result["methods"]["base, untuned"] |= {"time": 0.0, "timed on": "another machine"}
    out.write_text(json.dumps(result))
    again = run("--methods", "untuned", "--times")
    assert again.returncode == 0, again.stderr[-2000:]
    after = json.loads(out.read_text())
    timed = after["methods"]["base, untuned"]
    assert timed["time"] > 0
    assert timed["timed on"] == result["methods"]["teacher"]["timed on"]
    result["methods"]["base, untuned"] |= {name: timed[name] for name in ("time", "timed on")}
    assert after == result
    assert (tmp_path / "runs" / "images.png").stat().st_size > 0
    assert "are teacher, base, untuned, 8 steps, base, ours, 8 steps" in second.stdout
    other = run("--methods", "ours", "--rate", "0.1")
    assert other.returncode == 1
    assert "pass another --out" in other.stderr


def test_curves_show_what_several_numbers_of_steps_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    tables = importlib.import_module("benchmarks.measuring.tables")
    plots = importlib.import_module("benchmarks.measuring.plots")
    long = json.loads((ROOT / "benchmarks/results/cpu-float32-tuning-800-steps.json").read_text())
    short = copy.deepcopy(long) | {"steps": 100}
    short["methods"] = {name: long["methods"][name] for name in ("teacher", "base, untuned", "base, ours")}
    found = tables.curves([long, short])
    assert {way: list(points) for way, points in found.items()} == {"base, ours": [100, 800]}
    plots.learning_curves(found, tmp_path / "curves.svg")
    assert "base, ours" in (tmp_path / "curves.svg").read_text()
    assert "| base, ours | " in tables.learning_curves(found)
    with pytest.raises(SystemExit, match="measured in different ways"):
        tables.curves([long, short | {"captions": 4}])
