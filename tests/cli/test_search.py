"""`sdgraph search`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scenes.pipeline import MODEL, load

import sdgraph
from sdgraph.__main__ import main

CACHE = "InheritFeatures.damped()"


@pytest.mark.slow
def test_search_finds_a_plan_and_goes_on_where_it_stopped(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture, held_out = tmp_path / "found.json", tmp_path / "found.svg", tmp_path / "held-out.txt"
    held_out.write_text("a large green circle\n")
    common = ["search", str(MODEL), CACHE, "--prompts", str(prompts), "--held-out", str(held_out), "--steps", "5"]
    common += ["--guidance-scale", "3", "--trials", "1", "--reference-steps", "8", "--folder", str(tmp_path / "kept")]
    common += ["--cost", "macs"]
    assert main([*common, "--budget", "0.7", "--save", str(out), "--picture", str(picture)]) == 0
    found = json.loads(out.read_text())
    (chain,) = sdgraph.parse(found["passes"])
    assert isinstance(chain, sdgraph.Chain)
    printed = capsys.readouterr().out
    assert str(chain.passes[0]) in printed
    assert "best even spacing" in printed
    unet = sdgraph.apply(load().unet, chain, verify=False)
    timetable = unet.graph.timetable(5)
    assert timetable.macs == found["timetable"]["macs"] <= 0.7 * 5 * unet.graph.macs
    assert picture.read_text().startswith("<?xml")
    (kept,) = (tmp_path / "kept").glob("*.json")
    before = json.loads(kept.read_text())
    assert main([*common, "--budget", "0.8"]) == 0
    assert before.items() <= json.loads(kept.read_text()).items()


def test_a_budget_that_is_none(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["search", str(MODEL), CACHE, "--prompts", str(prompts)]
    assert main([*given, "--budget", "5"]) == 2
    assert "budget is 5.0" in capsys.readouterr().err
