"""A command that is stopped, and readers that leave."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from scenes.pipeline import MODEL

from sdgraph import cli
from sdgraph.__main__ import main
from sdgraph.cli.terminal import Output

SDGRAPH = [sys.executable, "-m", "sdgraph"]
PRUNE = "PruneBlocks('mid_block')"


@pytest.mark.parametrize(
    ("number", "status", "message"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_stop_a_command_once(
    number: int, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    removed = []

    def run(args: Namespace) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), number)  # of a user who presses Ctrl+C twice
            time.sleep(0.01)
            removed.append("unfinished files")

    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    monkeypatch.setattr(cli.passes, "run", run)
    assert main(["passes"]) == status
    assert removed
    assert capsys.readouterr().err == f"\nsdgraph: {message}\n"
    assert before == [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]


def test_a_signal_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.passes, "run", lambda args: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["passes"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reader_may_leave() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        output = Output(stream)
        for _ in range(3):
            assert output.write("a line\n") == 7
            output.flush()
        assert not output.isatty()


@pytest.mark.slow
def test_a_command_goes_on_without_readers(unet: Path, tmp_path: Path) -> None:
    """Its files are written, and its status is that of the command."""
    saved = tmp_path / "saved"
    for given, status in ((["apply", str(unet), PRUNE, "--save", str(saved)], 0), (["apply", "./nowhere", PRUNE], 2)):
        with subprocess.Popen([*SDGRAPH, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()
        assert process.returncode == status
    assert (saved / "sdgraph.json").is_file()


def calls_of(given: list[str], stop_at: int, number: int = signal.SIGINT) -> tuple[int, int]:
    """Run a command, which gets a signal at a call of a function of sdgraph. Return its status and the calls."""
    count = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        # Python drops what is raised in the callback of a weak reference.
        callback = frame.f_code.co_name == "_forget"
        file = frame.f_code.co_filename.replace("/exporters/", "/sdgraph/")
        if event == "call" and "/sdgraph/" in file and not callback:
            count += 1
            if count == stop_at:
                os.kill(os.getpid(), number)

    sys.setprofile(profile)
    try:
        return main(given), count
    finally:
        sys.setprofile(None)


@pytest.mark.long
@pytest.mark.parametrize("command", ["apply", "evaluate", "search", pytest.param("export", marks=pytest.mark.full)])
def test_nothing_unfinished_remains(command: str, unet: Path, prompts: Path, tmp_path: Path) -> None:
    """A command is stopped at moments from its beginning to its end, of which the last calls write files."""
    folder = tmp_path / "written"
    out = folder / "out"
    given = {
        "apply": ["apply", str(unet), PRUNE, "--no-verify", "--save", str(out)],
        "evaluate": ["evaluate", str(MODEL), PRUNE, "--steps", "1", "--prompts", str(prompts), "--out", str(out)],
        "search": ["search", str(MODEL), "InheritFeatures.damped()", "--steps", "2", "--prompts", str(prompts)],
        "export": ["export", str(unet), "--out", str(out)],
    }[command]
    if command == "search":
        given += ["--held-out", str(prompts), "--budget", "0.9", "--trials", "1", "--reference-steps", "3"]
        given += ["--cost", "macs", "--folder", str(folder / "kept"), "--save", str(out)]
    status, calls = calls_of(given, 0)
    assert status == 0
    whole = files(folder)
    assert whole
    for before_the_end in (calls // 2, 12, 4):
        shutil.rmtree(folder)
        folder.mkdir()
        status, _ = calls_of(given, calls - before_the_end)
        assert status == 130 or files(folder) == whole  # a run may have fewer calls than another
        assert files(folder) in (set(), whole)


def files(folder: Path) -> set[str]:
    """The files of a command's output, without the measurements that a search keeps."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in paths if path.parts[0] != "kept" or path.name.startswith(".")}
