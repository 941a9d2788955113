"""The common behaviour of all commands: help, refusals in a line, quiet libraries."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from scenes.pipeline import MODEL

from sdgraph import cli
from sdgraph.__main__ import main

CACHE = "InheritFeatures.deep_cache()"
NAMES = [module.__name__.rpartition(".")[2] for module in cli.COMMANDS]
TAKES_NO_MODEL = ("passes", "tune")  # the file that `tune` reads names the model


def arguments(command: str, source: str, out: Path, prompts: Path) -> list[str]:
    """A call of each command that reads `source` and writes `out`."""
    return {
        "apply": ["apply", source, "CleanUp", "--save", str(out)],
        "evaluate": ["evaluate", source, "CleanUp", "--prompts", str(prompts), "--out", str(out)],
        "search": [
            "search",
            source,
            CACHE,
            f"--prompts={prompts}",
            f"--held-out={prompts}",
            "--budget=0.5",
            f"--save={out}",
        ],
        "analyse": ["analyse", source, f"--prompts={prompts}", f"--out={out}"],
        "export": ["export", source, "--out", str(out)],
        "generate": ["generate", source, "a cat", "--out", str(out / "image.png")],
        "inspect": ["inspect", source],
        "show": ["show", source, "CleanUp", "--picture", f"{out}/picture.svg"],
        "bench": ["bench", source, "--out", str(out)],
    }[command]


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: sdgraph {name} ")
    assert f"\n  sdgraph {name}" in said.partition("\n\n")[2]
    assert max(map(len, said.splitlines())) <= 120


def test_help_and_usage_load_no_library() -> None:
    """Counted in modules, for all commands in one process: PyTorch and diffusers would take seconds each time."""
    given = [[], ["--help"], ["--version"], *([name, "--help"] for name in NAMES), *([name, "--no"] for name in NAMES)]
    code = (
        "import contextlib, io, sys\nfrom sdgraph.__main__ import main\n"
        f"for given in {given!r}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n        main(given)\n"
        "print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    known = {"sdgraph", "tqdm", "__main__", "site", "sitecustomize", "usercustomize"}
    loaded = {name for name in done.stdout.split() if not name.startswith("_")}  # without the site's own hooks
    assert loaded <= known, loaded
    assert done.stderr.count("usage: sdgraph") == 1 + len(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TAKES_NO_MODEL])
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
    with pytest.raises(SystemExit, match="something is loaded"):
        main(["apply", "owner/unet", "CleanUp"])


@pytest.mark.parametrize("name", ["apply", "evaluate", "search", "analyse", "export", "bench"])
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
        with pytest.raises(SystemExit, match="something is loaded"):
            main([*given, "--overwrite"])


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["export", "m", "--out", "o", "--calls", "0"], "argument --calls: '0' is not a whole number of at least 1"),
        (["inspect", "d", "--calls", "0"], "argument --calls: '0'"),
        (["bench", "d", "--calls", "-3"], "argument --calls: '-3'"),
        (["bench", "d", "--height", "8", "--width", "0"], "argument --width: '0'"),
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


@pytest.mark.parametrize("name", ["evaluate", "search", "analyse"])
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


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (PermissionError(13, "Permission denied", "some/file"), 2, "sdgraph: some/file: Permission denied\n"),
        (OSError("the disk is gone"), 2, "sdgraph: the disk is gone\n"),
        (torch.OutOfMemoryError("4 GiB wanted"), 1, "sdgraph: out of memory: 4 GiB wanted\n  hint:  a smaller batch"),
        (ZeroDivisionError("a defect"), 3, "in interrupted"),
        (ZeroDivisionError("a defect"), 3, "ZeroDivisionError: a defect\nsdgraph: this is a defect"),
    ],
)
def test_what_goes_wrong_is_told_from_a_defect(
    raised: Exception, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: Any) -> None:
        raise raised

    monkeypatch.setattr(cli.passes, "run", interrupted)
    assert main(["passes"]) == status
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_libraries_may_talk_again_afterwards(unet: Path) -> None:
    before = diffusers.utils.logging.get_verbosity(), diffusers.utils.logging.is_progress_bar_enabled()
    assert main(["apply", str(unet), "CleanUp"]) == 0
    assert before == (diffusers.utils.logging.get_verbosity(), diffusers.utils.logging.is_progress_bar_enabled())


@pytest.mark.long
def test_nothing_is_printed_but_ours(prompts: Path) -> None:
    """In a separate process, where libraries have no settings yet, and read by a pipe that closes early."""
    sdgraph_ = [sys.executable, "-m", "sdgraph"]
    given = ["evaluate", str(MODEL), "CleanUp", "--prompts", str(prompts), "--steps", "1"]
    done = subprocess.run([*sdgraph_, *given], capture_output=True, text=True, check=True)
    threads, first, *rest = done.stderr.splitlines()
    assert threads.startswith("threads: ")
    assert first == f"loading {MODEL}"
    assert all(line.startswith("evaluate: ") for line in rest if line)
    with subprocess.Popen([*sdgraph_, "passes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


# -- what is read is not written to -----------------------------------------------------------------------------------

WRITING = [
    ["apply", "{model}", "CleanUp", "--save"],
    ["export", "{model}", "--out"],
    ["bench", "{model}", "--out"],
    ["evaluate", "{model}", "CleanUp", "--prompts", "{prompts}", "--out"],
    ["evaluate", "other/pipeline", "{model}", "--prompts", "{prompts}", "--out"],
    ["evaluate", "other/pipeline", "CleanUp", "--reference", "{model}", "--prompts", "{prompts}", "--out"],
    ["search", "{model}", "--prompts", "{prompts}", "--budget", "0.5", "--save"],
    ["search", "{model}", "--prompts", "{prompts}", "--budget", "0.5", "--picture"],
    ["search", "{model}", "--prompts", "{prompts}", "--budget", "0.5", "--folder"],
]


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("words", WRITING, ids=lambda words: f"{words[0]} {words[-1]}")
@pytest.mark.parametrize("place", ["", "unet", "new/file.svg", "../link/unet", "unet/config.json"])
def test_no_command_writes_to_its_model(
    words: list[str], place: str, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "unet" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    named = [word.format(model=tmp_path / "model", prompts=prompts) for word in words]
    overwrite = ["--overwrite"]
    assert main([*named, str(tmp_path / "model" / place), *overwrite]) == 2
    assert re.search(r"(is|lies within) (model|directory|pipeline|change|reference), ", capsys.readouterr().err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("nothing_loads")
def test_no_command_writes_over_its_prompts(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    before = prompts.read_text()
    search = ["search", str(tmp_path / "model"), "--prompts", str(prompts), "--budget", "0.5", "--overwrite"]
    assert main([*search, "--save", str(prompts)]) == 2
    assert "is prompts, " in capsys.readouterr().err
    assert prompts.read_text() == before


@pytest.mark.usefixtures("nothing_loads")
def test_arguments_stand_before_and_after_options(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompts", str(prompts)]
    for words in (
        ["evaluate", str(MODEL), *options, "CleanUpp"],
        ["evaluate", *options, str(MODEL), "CleanUpp"],
        ["search", str(MODEL), *options, "--budget", "0.5", "CleanUpp"],
        ["search", str(MODEL), "CleanUp", *options, "CleanUpp", "--budget", "0.5"],
        ["show", "--calls", "3", str(MODEL), "CleanUpp"],
        ["apply", "--no-verify", str(MODEL), "--quiet", "CleanUpp"],
    ):
        assert main(words) == 2
        assert "did you mean 'CleanUp'" in capsys.readouterr().err
