"""The command line, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from scenes.pipeline import MODEL, load

import sdgraph
from sdgraph import cli
from sdgraph.__main__ import main

from .models import answer, build, call_of

PROMPT = "a large red circle\n\na small blue square\n"
PRUNE = "PruneBlocks('mid_block')"
CACHE = "InheritFeatures.deep_cache()"
NAMES = [module.__name__.rpartition(".")[2] for module in cli.COMMANDS]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPT)
    return path


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small UNet of diffusers."""
    folder = tmp_path_factory.mktemp("unet")
    build().save_pretrained(folder)
    return folder


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> Any:
        raise AssertionError("something is loaded")

    monkeypatch.setattr(cli.sources, "_load", load)


def arguments(command: str, source: str, out: Path, prompts: Path) -> list[str]:
    """A call of each command that reads `source` and writes `out`."""
    return {
        "apply": ["apply", source, "CleanUp", "--save", str(out)],
        "evaluate": ["evaluate", source, "CleanUp", "--prompts", str(prompts), "--out", str(out)],
        "search": ["search", source, CACHE, "--prompts", str(prompts), "--budget", "0.5", "--out", str(out)],
        "export": ["export", source, "--out", str(out)],
        "inspect": ["inspect", source],
        "bench": ["bench", source, "--out", str(out)],
    }[command]


# -- all commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: sdgraph {name} ")
    assert f"\n  sdgraph {name}" in said.partition("\n\n")[2]
    assert max(map(len, said.splitlines())) <= 120


@pytest.mark.parametrize("name", [name for name in NAMES if name != "passes"])
@pytest.mark.parametrize("source", ["./nowhere", "nowhere", "nowhere/a/b", "~/nowhere"])
@pytest.mark.usefixtures("nothing_loads")
def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(
    name: str, source: str, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(name, source, tmp_path / "out", prompts)) == 2
    assert f"sdgraph: there is no folder {source}\n" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_loads")
def test_a_folder_within_one_that_is_there_is_no_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert main(["apply", "out/unet", "CleanUp"]) == 2
    assert "there is no folder out/unet" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="something is loaded"):
        main(["apply", "owner/unet", "CleanUp"])


@pytest.mark.parametrize("name", ["apply", "evaluate", "search", "export", "bench"])
@pytest.mark.usefixtures("nothing_loads")
def test_what_is_there_is_refused_before_anything_is_loaded(
    name: str, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    given = arguments(name, str(MODEL), tmp_path / "out", prompts)
    assert main(given) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'out'} already exists" in said
    assert "--overwrite" in said
    if name == "export":  # a folder that is no export is not replaced in any case
        assert main([*given, "--overwrite"]) == 1
        assert "this is not an earlier export" in capsys.readouterr().err
    elif name != "bench":  # which loads by the exporters' own code
        with pytest.raises(AssertionError, match="something is loaded"):
            main([*given, "--overwrite"])


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["export", "m", "--out", "o", "--calls", "0"], "argument --calls: '0' is not a whole number of at least 1"),
        (["inspect", "d", "--calls", "0"], "argument --calls: '0'"),
        (["bench", "d", "--calls", "-3"], "argument --calls: '-3'"),
        (["bench", "d", "--size", "8", "0"], "argument --size: '0'"),
        (["evaluate", "p", "c", "--prompts", "f", "--steps", "1.5"], "argument --steps: '1.5'"),
        (["evaluate", "p", "c", "--prompts", "f", "--require", "psnr"], "write NAME=NUMBER"),
        (["evaluate", "p", "c", "--prompts", "f", "--device", "abacus"], "cannot use the device 'abacus'"),
        (["search", "p", "c", "--prompts", "f"], "required: --budget"),
    ],
)
def test_bad_arguments_are_said_in_a_line(given: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    usage, said = capsys.readouterr().err.splitlines()
    assert usage.startswith(f"usage: sdgraph {given[0]} ")
    assert complaint in said


@pytest.mark.parametrize("name", ["evaluate", "search"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "there is no file"), (b"\n \n", "there are no prompts"), (b"\xff\xfe\x00", "cannot be read")],
)
@pytest.mark.usefixtures("nothing_loads")
def test_prompts_that_are_none(
    name: str, content: bytes | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(arguments(name, str(MODEL), tmp_path / "out", path)) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert str(path) in said
    assert "one prompt per line" in said


def test_interrupting_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.passes, "run", interrupted)
    assert main(["passes"]) == 130
    assert capsys.readouterr().err == "\nsdgraph: interrupted\n"


def test_libraries_may_talk_again_afterwards(unet: Path) -> None:
    before = diffusers.utils.logging.get_verbosity(), diffusers.utils.logging.is_progress_bar_enabled()
    assert main(["apply", str(unet), "CleanUp"]) == 0
    assert before == (diffusers.utils.logging.get_verbosity(), diffusers.utils.logging.is_progress_bar_enabled())


@pytest.mark.slow
def test_nothing_is_printed_but_ours(prompts: Path) -> None:
    """In a process of its own, where libraries have not been told anything, and read by a pipe that closes early."""
    sdgraph_ = [sys.executable, "-m", "sdgraph"]
    given = ["evaluate", str(MODEL), "CleanUp", "--prompts", str(prompts), "--steps", "1"]
    done = subprocess.run([*sdgraph_, *given], capture_output=True, text=True, check=True)
    first, *rest = done.stderr.splitlines()
    assert first == f"loading {MODEL}"
    assert all(line.startswith("evaluate: ") for line in rest if line)
    with subprocess.Popen([*sdgraph_, "passes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


# -- apply ------------------------------------------------------------------------------------------------------------


def test_apply_prints_a_report_and_saves(unet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made" / "pruned"
    assert main(["apply", str(unet), f"CleanUp, {PRUNE}", "--save", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "\nPruneBlocks('mid_block')  " in said
    assert f"saved in {folder}" in said
    source, saved = build(), sdgraph.GraphUNet.from_pretrained(folder)
    assert saved.graph.removed == {"mid_block": PRUNE}
    call = call_of(source)
    assert torch.equal(answer(saved, call), answer(sdgraph.apply(source, ["CleanUp", PRUNE]), call))
    # what was saved is a source again, and takes its own place if that is asked for
    assert main(["apply", str(folder), "PruneBlocks('up_blocks.1.attentions.1')", "--save", str(folder)]) == 2
    assert (
        main(["apply", str(folder), "PruneBlocks('up_blocks.1.attentions.1')", "--save", str(folder), "--overwrite"])
        == 0
    )
    assert set(sdgraph.GraphUNet.from_pretrained(folder).graph.removed) == {"mid_block", "up_blocks.1.attentions.1"}


def test_apply_may_only_try(unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["apply", str(unet), PRUNE, "--dtype", "bfloat16", "--no-verify"]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("passes", "complaint"),
    [("PruneBlock('mid_block')", "did you mean 'PruneBlocks'"), ("CleanUp(", "cannot read the spec")],
)
@pytest.mark.usefixtures("nothing_loads")
def test_passes_are_read_before_anything_is_loaded(
    passes: str, complaint: str, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in (
        ["apply", str(MODEL), passes],
        ["export", str(MODEL), "--passes", passes, "--out", str(tmp_path / "out")],
        ["evaluate", str(MODEL), passes, "--prompts", str(prompts)],
        ["search", str(MODEL), passes, "--prompts", str(prompts), "--budget", "0.5"],
    ):
        assert main(given) == 2
        assert complaint in capsys.readouterr().err


def test_a_pass_that_fails_is_said_in_lines(unet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", str(unet), "CleanUp, PruneBlocks('mid_blocks.0')"]) == 2
    said = capsys.readouterr().err
    assert "mid_block" in said
    assert "Traceback" not in said


def test_a_folder_without_a_unet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", str(tmp_path), "CleanUp"]) == 2
    assert "neither a pipeline nor a UNet" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["apply", str(tmp_path), "CleanUp"]) == 2
    assert f"{tmp_path} cannot be loaded: " in capsys.readouterr().err
    (tmp_path / "model.onnx").write_text("")
    assert main(["apply", str(tmp_path), "CleanUp"]) == 2
    assert "is exported already" in capsys.readouterr().err


# -- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluate_prints_writes_and_judges(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "evaluation"
    given = [
        "evaluate",
        str(MODEL),
        PRUNE,
        "--prompts",
        str(prompts),
        "--seeds",
        "1",
        "2",
        "--steps",
        "1",
        "--batch",
        "4",
    ]
    assert main([*given, "--require", "psnr=5", "ssim=0.01", "--at-most", "largest=1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"after:  {PRUNE}\n4 images" in said
    written = json.loads((out / "evaluation.json").read_text())
    assert [each["seed"] for each in written["images"]] == [1, 2, 1, 2]
    assert f"{written['alike']['psnr']:.4g} dB" in said
    with Image.open(out / "evaluation.png") as sheet:
        assert sheet.width > 3 * 64
    # what falls short is written as well, and the status tells
    assert main([*given, "--require", "psnr=500", "--out", str(out), "--overwrite"]) == 1
    captured = capsys.readouterr()
    assert "sdgraph: PSNR below 500 dB: " in captured.err
    assert f"written to {out}" in captured.out


@pytest.mark.slow
def test_evaluate_takes_a_saved_unet(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sdgraph.apply(load().unet, (), verify=False).save_pretrained(tmp_path / "unet")
    given = ["evaluate", str(MODEL), str(tmp_path / "unet"), "--prompts", str(prompts), "--steps", "1"]
    assert main([*given, "--require", "psnr=1000", "--at-most", "largest=0"]) == 0
    assert "after:  GraphUNet" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "unet"), "CleanUp", "--prompts", str(prompts)]) == 2
    assert "there is no pipeline in" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_loads")
def test_a_figure_that_is_not_measured(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(MODEL), PRUNE, "--prompts", str(prompts), "--require", "pnsr=30"]) == 2
    assert "did you mean 'psnr'" in capsys.readouterr().err
    assert main(["evaluate", str(MODEL), "./nowhere", "--prompts", str(prompts)]) == 2
    assert "there is no folder ./nowhere" in capsys.readouterr().err


# -- passes -----------------------------------------------------------------------------------------------------------


def test_passes_lists_those_of_every_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "others-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[sdgraph.passes]\nTidy = tidy_passes:Tidy\nLost = not_there:Lost\n")
    (tmp_path / "tidy_passes.py").write_text(
        "from dataclasses import dataclass\nimport sdgraph\n\n"
        "@dataclass(frozen=True)\nclass Tidy(sdgraph.Pass):\n"
        '    """Tidy up. It does no more."""\n    level: int\n    contract = sdgraph.Contract.CLOSE(rtol=0.5)\n'
        "    may_change_nothing = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["passes"]) == 0
    said = capsys.readouterr().out
    titles = [part.partition("\n")[0] for part in said.split("\n\n")]
    assert {"CleanUp", "InheritFeatures", "MECondConv", "PruneBlocks", "Tidy, of others", "Lost, of others"} <= set(
        titles
    )
    assert "Tidy, of others\n  Tidy up.\n  contract  CLOSE(rtol=0.5, atol=1e-05)\n  options   level\n" in said
    assert "Lost, of others\n  cannot be loaded: No module named 'not_there'" in said
    assert "contract  EXACT, by default\n" in said  # that of MECondConv
    assert ".deep_cache(interval=3, branch=0)\n            DeepCache (Ma et al., 2023" in said
    assert main(["passes", "InheritFeatures"]) == 0
    said = capsys.readouterr().out
    assert "every how many calls everything is computed" in said  # of a preset's option
    assert main(["passes", "Lost"]) == 2
    assert "repair or uninstall others" in capsys.readouterr().err
    assert main(["passes", "CleanUpp"]) == 2
    assert "did you mean 'CleanUp'" in capsys.readouterr().err


# -- search -----------------------------------------------------------------------------------------------------------


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
