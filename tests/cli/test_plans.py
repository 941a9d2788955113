"""Passes from the command line: text, files of passes, plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scenes.pipeline import MODEL, load

import sdgraph
from sdgraph.__main__ import main
from sdgraph.cli.plans import read_passes
from sdgraph.errors import SpecError

CACHE = "InheritFeatures.deep_cache()"
PLAN = '{"format": 1, "passes": "CleanUp", "steps": 4, "solver": "", "unet": {}, "timetable": {"calls": 4}}'


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """The part of a plan of `sdgraph search --save` that is read."""
    config = {name: value for name, value in load().unet.config.items() if not name.startswith("_")}
    content = {
        "format": 1, "passes": CACHE, "steps": 4, "solver": "other", "unet": config, "timetable": {"calls": 4},
    }  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content",
    [
        f"CleanUp\n{CACHE}\n",
        f"# why\nCleanUp()  # first\n\n{CACHE},\n",
        f"CleanUp, {CACHE}",
        "CleanUp,\nInheritFeatures.deep_cache(\n    interval=3,\n)\n",
        "CleanUp\nInheritFeatures.deep_cache",
        f"\ufeffCleanUp\r\n{CACHE}",
    ],
)
def test_a_file_of_passes(content: str, tmp_path: Path) -> None:
    path = tmp_path / "passes.txt"
    path.write_bytes(content.encode())
    assert read_passes(str(path)).passes == sdgraph.parse(f"CleanUp, {CACHE}")
    assert read_passes(["CleanUp", str(path)]).passes == sdgraph.parse(f"CleanUp, CleanUp, {CACHE}")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("plam.json", r"there is no file .*plam.json(.|\n)*did you mean '.*plan.json'"),
        ("plans/plan.json", r"there is no file"),
        ("InheritFeatures.deep_cach", r"no preset 'deep_cach'(.|\n)*did you mean 'deep_cache'"),
        ("CleanUpp", "did you mean 'CleanUp'"),
        (".", "is a folder, not passes"),
    ],
)
@pytest.mark.usefixtures("plan")
def test_names_that_are_mistyped(text: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=complaint):
        read_passes(text)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "holds no passes"),
        ("# nothing\n", "holds no passes"),
        ("x = CleanUp\n", "holds no passes"),
        ("CleanUp\nCleanUp(\n", "line 2"),
        ("CleanUp CleanUp", "line 1"),
        ("NoPass\n", "no pass named 'NoPass'"),
        ("{", "is not JSON"),
        ("{}", "is no plan: it has no format and no passes and no steps and no solver and no unet and no timetable"),
        (PLAN.replace('{"calls": 4}', "{}"), "it has no calls"),
        (PLAN.replace('"CleanUp"', "3"), "it has no passes"),
        (PLAN.replace('"format": 1', '"format": 2'), "is a plan of format 2, and this version reads format 1"),
        ("\0", "not UTF-8"),
    ],
)
def test_files_without_passes(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(SpecError, match=complaint):
        read_passes(str(path))


@pytest.mark.parametrize("command", ["apply", "show", "export", "evaluate", "search"])
def test_a_plan_of_another_model(
    command: str, plan: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(plan.read_text())
    content["unet"]["cross_attention_dim"] = 768
    plan.write_text(json.dumps(content))
    generation = ["--prompts", str(prompts)]
    given: dict[str, list[str]] = {
        "apply": ["apply", str(MODEL), str(plan)],
        "show": ["show", str(MODEL), str(plan)],
        "export": ["export", str(MODEL), "--passes", str(plan), "--out", str(tmp_path / "out")],
        "evaluate": ["evaluate", str(MODEL), str(plan), *generation],
        "search": ["search", str(MODEL), str(plan), *generation, "--held-out", str(prompts), "--budget", "0.5"],
    }
    assert main(given[command]) == 2
    said = capsys.readouterr().err
    assert "the plan is of another model: there cross_attention_dim is 768, here 96" in said
    assert str(plan) in said


@pytest.mark.usefixtures("nothing_loads")
def test_a_plan_for_another_number_of_steps(plan: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["evaluate", str(MODEL), str(plan), "--prompts", str(prompts), "--steps", "5"],
        ["show", str(MODEL), str(plan), "--calls", "5"],
        ["export", str(MODEL), "--passes", str(plan), "--calls", "5", "--out", str(plan.with_name("out"))],
    ):
        assert main(words) == 2
        assert "the plan is for 4 " in capsys.readouterr().err


def test_the_steps_of_a_plan_are_those_of_the_images(
    plan: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(MODEL), str(plan)]) == 0
    assert "\n4 calls: " in capsys.readouterr().out
    prompts.write_text("a large red circle")
    evaluated: list[dict[str, Any]] = []
    out = plan.with_name("evaluation")
    assert main(["evaluate", str(MODEL), str(plan), "--prompts", str(prompts), "--out", str(out)]) == 0
    evaluated.append(json.loads((out / "evaluation.json").read_text()))
    assert "was found with other" in capsys.readouterr().err
    assert evaluated[0]["pairwise"]["equal"] == 0
