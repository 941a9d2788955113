"""`sdgraph search`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scenes.pipeline import MODEL, load

import sdgraph
from sdgraph.__main__ import main

CACHE = "InheritFeatures.deep_cache()"


@pytest.mark.slow
def test_search_finds_a_schedule_and_goes_on_where_it_stopped(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "found.json", tmp_path / "found.svg"
    common = ["search", str(MODEL), CACHE, "--prompts", str(prompts), "--steps", "6"]
    common += ["--guidance", "3", "--reach", "4", "--folder", str(tmp_path / "kept")]
    assert main([*common, "--budget", "0.6", "--out", str(out), "--picture", str(picture)]) == 0
    found = json.loads(out.read_text())
    (chain,) = sdgraph.parse(found["passes"])
    assert isinstance(chain, sdgraph.Chain)
    assert str(chain.passes[0]) in capsys.readouterr().out
    unet = sdgraph.apply(load().unet, chain)
    timetable = unet.graph.timetable(6)
    assert timetable.macs == found["timetable"]["macs"] <= 0.6 * 6 * unet.graph.macs
    assert picture.read_text().startswith("<?xml")
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 1 + 6  # the weights, and the stretches from each of the calls
    assert main([*common, "--budget", "0.8"]) == 0
    assert sorted((tmp_path / "kept").iterdir()) == files


def test_a_budget_that_is_none(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["search", str(MODEL), CACHE, "--prompts", str(prompts)]
    assert main([*given, "--budget", "5"]) == 2
    assert "the budget is 5" in capsys.readouterr().err
