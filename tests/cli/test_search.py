"""`sdgraph search`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scenes.pipeline import MODEL, STUDENT, load

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


@pytest.mark.slow
def test_search_over_several_unets(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan is read by `SwitchPlan`, refused as passes, and the saved switch loads with its schedule."""
    plan, folder, held_out = tmp_path / "plan.json", tmp_path / "switched", tmp_path / "held-out.txt"
    held_out.write_text("a large green circle\n")
    given = ["search", str(MODEL), "--prompts", str(prompts), "--held-out", str(held_out), "--steps", "3"]
    given += [
        "--unet",
        f"large={MODEL}",
        "--unet",
        f"small={STUDENT / 'unet'}",
        "--trials",
        "2",
        "--reference-steps",
        "6",
    ]
    given += ["--folder", str(tmp_path / "kept"), "--cost", "macs", "--budget", "0.8", "--guidance-scale", "1"]
    assert main([*given, "--save", str(plan), "--save-unet", str(folder)]) == 0
    assert "3 steps of small" in capsys.readouterr().out
    found = sdgraph.SwitchPlan.load(plan)
    unet = sdgraph.SwitchUNet.from_pretrained(folder)
    assert (unet.schedule, tuple(unet.members)) == (found.schedule, tuple(found.passes))
    assert main(["search", str(MODEL), str(plan), "--prompts", str(prompts), "--budget", "0.5"]) == 2
    assert "is a plan of several UNets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["--unet", "a=no/such/x", "--unet", "a=no/such/y"], "two UNets are named a"),
        (["--save-unet", "none"], "there is no switch of one UNet to save"),
    ],
)
def test_unets_that_are_none(
    change: list[str], complaint: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(MODEL), "--prompts", str(prompts), "--budget", "0.5", *change]) == 2
    assert complaint in capsys.readouterr().err


def test_a_unet_without_a_name(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["search", str(MODEL), "--prompts", str(prompts), "--budget", "0.5", "--unet", "large"])
    assert "'large' is not NAME=FOLDER" in capsys.readouterr().err
