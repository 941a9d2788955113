"""The study of tuning: its results grow over several runs, and have one table."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..documents import ROOT, load


@pytest.mark.long
def test_ways_are_added_and_those_that_are_there_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    out = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/tuning.py", "--quick", "--folder", tmp_path / "runs", "--out", out]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, command), *more], cwd=ROOT, capture_output=True, text=True, timeout=300)

    first = run("--ways", "untuned")
    assert first.returncode == 0, first.stderr[-2000:]
    ways = json.loads(out.read_text())["ways"]
    assert list(ways) == ["teacher", "base, untuned"]
    assert ways["base, untuned"]["parameters"] < ways["teacher"]["parameters"]
    second = run("--ways", "untuned", "ours")
    assert second.returncode == 0, second.stderr[-2000:]
    result = json.loads(out.read_text())
    assert {name: result["ways"][name] for name in ways} == ways
    assert result["ways"]["base, ours"]["losses"] == ["Output()", "Features(weight=10.0)", "Denoising(weight=0.01)"]
    assert load("benchmarks/table.py").report(result) in second.stdout
    result["ways"]["base, untuned"] |= {"time": 0.0, "timed on": "another machine"}
    out.write_text(json.dumps(result))
    again = run("--ways", "untuned", "--times")
    assert again.returncode == 0, again.stderr[-2000:]
    after = json.loads(out.read_text())
    timed = after["ways"]["base, untuned"]
    assert timed["time"] > 0
    assert timed["timed on"] == result["ways"]["teacher"]["timed on"]
    result["ways"]["base, untuned"] |= {name: timed[name] for name in ("time", "timed on")}
    assert after == result
    assert (tmp_path / "runs" / "images.png").stat().st_size > 0
    assert "are teacher, base, untuned, 8 steps, base, ours, 8 steps" in second.stdout
    other = run("--ways", "ours", "--rate", "0.1")
    assert other.returncode == 1
    assert "pass another --out" in other.stderr


def test_curves_show_what_several_numbers_of_steps_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = load("benchmarks/learning_curves.py")
    long = json.loads((ROOT / "benchmarks/results/tuning/cpu-float32-800-steps.json").read_text())
    short = copy.deepcopy(long) | {"steps": 100}
    short["ways"] = {name: long["ways"][name] for name in ("teacher", "base, untuned", "base, ours")}
    found = script.curves([long, short])
    assert {way: list(points) for way, points in found.items()} == {"base, ours": [100, 800]}
    script.draw(found, tmp_path / "curves.svg")
    assert "base, ours" in (tmp_path / "curves.svg").read_text()
    assert "| base, ours | " in script.table(found)
    with pytest.raises(SystemExit, match="measured in different ways"):
        script.curves([long, short | {"captions": 4}])
