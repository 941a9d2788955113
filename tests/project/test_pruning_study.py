"""The study of pruning: its sets, its ranks, and that it goes on where it was stopped."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sdgraph import JointRemoval, Redundancy, Removal

from ..documents import ROOT

PATHS = tuple(f"down_blocks.{block}.resnets.{layer}" for block in (0, 1) for layer in (0, 1, 2))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # as `python -m` does


def module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.measuring.{name}")


def analysis() -> Redundancy:
    removals = tuple(
        Removal(path, "layer", 0.1, 0.1 + 0.01 * n, 0.1, (0.1 * (n + 1),), 1 - 0.1 * n, None)
        for n, path in enumerate(PATHS)
    )
    pair = JointRemoval((PATHS[0], PATHS[1]), (0.9,))
    return Redundancy("0" * 32, "eager", 2, (500.0,), (0.5,), removals, (pair,))


def test_criteria_choose_by_their_costs_and_score_any_set() -> None:
    sets, found = module("removal_sets"), analysis()
    assert sets.chosen(found, "MACs only", {"time": 0.8}) == PATHS[:2]
    assert sets.chosen(found, "output error", {"time": 0.8}) == PATHS[:2]
    assert sets.chosen(found, "output error, pairs", {"time": 0.8}) == (PATHS[0], PATHS[2])  # a pair costs 0.9
    assert sets.chosen(found, "output error, pairs, 1 of 2", {"time": 0.8}) == (PATHS[0], PATHS[2])
    assert sets.chosen(found, "final latents", {"time": 0.8}) is None  # they were not measured
    assert sets.score(found, "output error", PATHS[:2]) == pytest.approx(0.3)
    assert sets.score(found, "output error, pairs", PATHS[:2]) == pytest.approx(0.9)
    assert sets.score(found, "similarity", PATHS[:3]) == pytest.approx(0.3)
    assert sets.score(found, "output error", ("down_blocks.1",)) == pytest.approx(0.4 + 0.5 + 0.6)  # the layers inside
    assert sets.predicted(found, ("down_blocks.1", PATHS[0]), "time") == pytest.approx(0.6)


def test_random_sets_leave_what_they_should_and_follow_the_seed() -> None:
    sets, found = module("removal_sets"), analysis()
    drawn = list(itertools.islice(sets.at_random(found, "macs", 0.6, 0), 20))
    for paths in drawn:
        assert 0.6 - sets.CLOSE <= sets.predicted(found, paths, "macs") <= 0.6
    assert len(set(drawn)) > 3
    assert drawn == list(itertools.islice(sets.at_random(found, "macs", 0.6, 0), 20))
    assert drawn != list(itertools.islice(sets.at_random(found, "macs", 0.6, 1), 20))


def test_savings_are_weighed_with_less_noise_than_one_by_one() -> None:
    sets, found = module("removal_sets"), analysis()
    savings = dict(zip(PATHS, (0.0, 0.02, 0.04, 0.06, 0.08, 0.1), strict=True))
    random = np.random.default_rng(0)
    measured = [
        (paths, 1 - sum(savings[path] for path in paths) + random.normal(0, 0.02))
        for paths in itertools.islice(sets.weighings(found), 200)
    ]
    off = {one.path: one.time - savings[one.path] for one in sets.weighed(found, measured).removals}
    assert max(map(abs, off.values())) < 0.008
    assert all(one.time >= 0 for one in sets.weighed(found, measured).removals)
    assert 2 < np.mean([len(paths) for paths, _ in measured]) < 4


def test_ranks_are_correlated_and_learned() -> None:
    pytest.importorskip("lightgbm")
    ranking = module("ranking")
    assert ranking.correlation([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert ranking.correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert ranking.correlation([1, 1, 1], [3, 2, 1]) is None
    rows = [{"useful": float(n), "other": float(n * 7 % 5)} for n in range(24)]
    results = [2.0 * n for n in range(24)]
    assert ranking.correlation(ranking.left_out(rows, results), results) > 0.8


@pytest.mark.long
def test_the_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    pytest.importorskip("lightgbm")
    out, folder = tmp_path / "results.json", tmp_path / "runs"
    command = [sys.executable, "-m", "benchmarks.pruning", "--quick", "--folder", folder, "--out", out]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, command), *more], cwd=ROOT, capture_output=True, text=True, timeout=900)

    first = run()
    assert first.returncode == 0, first.stderr[-2000:]
    result = json.loads(out.read_text())
    methods = result["methods"]
    assert {"whole", "bk-sdm-base", "random 0, macs 0.98", "LambdaRank, macs 0.98", "1 steps of DDIM"} <= set(methods)
    base = methods["bk-sdm-base"]
    assert base["untuned"]["psnr"] != base["tuned"]["psnr"]
    assert base["macs"] < 1
    assert importlib.import_module("benchmarks.measuring.documents").report(result) in first.stdout
    changed: dict[str, Any] = json.loads(out.read_text())
    del changed["methods"]["bk-sdm-base"]["untuned"]
    out.write_text(json.dumps(changed))
    again = run()
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads(out.read_text()) == result  # its images were kept
    module("plots").predictions(result, tmp_path / "predictions.svg")
    assert "predicted error" in (tmp_path / "predictions.svg").read_text()
    other = run("--rate", "0.1")
    assert other.returncode == 1
    assert "pass another --out" in other.stderr
