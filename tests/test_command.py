"""The command line, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scenes.pipeline import MODEL, load

import sdgraph
from sdgraph.__main__ import main


def test_search_finds_a_schedule_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out, picture = tmp_path / "prompts.txt", tmp_path / "found.json", tmp_path / "found.svg"
    prompts.write_text("a large red circle\n\na small blue square\n")
    common = ["search", str(MODEL), "InheritFeatures.deep_cache()", "--prompts", str(prompts), "--steps", "6"]
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


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["InheritFeatures.deep_cash()", "--budget", "0.5"], "did you mean 'deep_cache'"),
        (["InheritFeatures.deep_cache()", "--budget", "5"], "the budget is 5"),
        (["InheritFeatures.deep_cache()", "--budget", "0.5", "--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_searched_is_said_in_a_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a large red circle\n")
    assert main(["search", str(MODEL), "--prompts", str(prompts), *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_help_suffices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["search", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "forecast=1" in said
    assert "--budget" in said
