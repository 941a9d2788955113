"""`sdgraph analyse`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

import sdgraph
from sdgraph.__main__ import main
from sdgraph.redundancy import analysis

from ..redundancy.conftest import tiny

__all__ = ["tiny"]


@pytest.fixture
def given(tiny: StableDiffusionPipeline, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that analyses the mid block and one layer."""
    layer = re.compile(r"up_blocks\\.0\\.resnets\\.0")
    monkeypatch.setattr(analysis, "LEVEL", {"block": re.compile("mid_block"), "layer": layer})
    tiny.save_pretrained(tmp_path / "pipeline")
    return [
        "analyse", str(tmp_path / "pipeline"), "--prompts", str(prompts), "--steps", "2", "--levels", "block", "layer",
        "--target", "none", "--calls", "2", "--folder", str(tmp_path / "kept"),
    ]  # fmt: skip


@pytest.mark.slow
def test_an_analysis_is_written_drawn_and_goes_on(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, picture = tmp_path / "analysis.json", tmp_path / "redundancy.svg"
    assert main([*given, "--out", str(out), "--picture", str(picture)]) == 0
    found = sdgraph.Redundancy.load(out)
    printed = capsys.readouterr().out
    assert str(found) in printed
    assert f"saved in {out}" in printed
    assert picture.read_text().count('id="mid_block"') == 1
    monkeypatch.setattr(analysis.Replay, "run", None)  # nothing is measured again
    assert main([*given, "--macs", "0.999", "--parameters", "0.999"]) == 0
    recipe = capsys.readouterr().out.strip().splitlines()[-1]
    (chosen,) = sdgraph.parse(recipe.partition("#")[0])
    assert chosen == sdgraph.parse(f"PruneBlocks({found.cheapest(macs=0.999, parameters=0.999).paths!r})")[0]


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--time", "0.7"], "no budget in time"),
        (["--macs", "1.5"], "macs is 1.5"),
        (["--parameters", "0"], "parameters is 0"),
        (["--picture", "redundancy.gif"], "cannot draw a .gif"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_loaded(
    options: list[str], complaint: str, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*given, *options]) == 2
    assert complaint in capsys.readouterr().err
