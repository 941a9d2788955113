"""Folders appear complete or do not appear, also after a process was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdgraph.atomic import appearing, check_apart, owned, written
from sdgraph.errors import SavedError, TuningError

KILLED = """
import os, signal, sys
from pathlib import Path
from sdgraph.errors import SavedError
from sdgraph.atomic import appearing

with appearing(sys.argv[1], lambda path: None, SavedError) as folder:
    (folder / "half").write_text("written")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "t"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".t-")
    (left / "old").mkdir()  # as if it had been killed between putting the old away and the new in its place
    others = [tmp_path / name for name in (".t-mine", ".t-12345678", ".t-x-12345678", ".u-12345678")]
    for other in others:
        other.mkdir()
    seen = []
    with appearing(target, lambda path: seen.append(path.exists()), SavedError) as folder:
        running = folder.parent
        assert not left.exists()
        with appearing(target, lambda path: None, SavedError):
            assert running.exists()  # another process's, or thread's
    assert seen[0]  # what was put away is back
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "figures.json"
    with contextlib.suppress(KeyboardInterrupt), written(target) as file:
        file.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with written(target) as file:
        file.write_text("first")
        assert not target.exists()
    with contextlib.suppress(ValueError), written(target) as file:
        file.write_text("half")
        raise ValueError
    assert [(path.name, path.read_text()) for path in target.parent.iterdir()] == [("figures.json", "first")]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


# -- one process for a folder -----------------------------------------------------------------------------------------

OWNING = """
import sys, time
from pathlib import Path
from sdgraph.atomic import owned
from sdgraph.errors import TuningError
with owned(Path(sys.argv[1]), TuningError, "out"):
    print("owned", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_owned_by_one_process_until_it_dies(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", OWNING, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"owned\n"
    with (
        pytest.raises(TuningError, match=f"process {other.pid} on .* is writing to"),
        owned(tmp_path / "run", TuningError, "out"),
    ):
        pass
    other.kill()
    other.communicate()
    with owned(tmp_path / "run", TuningError, "out"):
        pass


def test_a_folder_is_owned_by_one_thread_that_may_own_it_again(tmp_path: Path) -> None:
    def enter(folder: Path) -> bool:
        with owned(folder, TuningError, "out"):
            return True

    (tmp_path / "link").symlink_to(tmp_path / "run")
    with ThreadPoolExecutor(1) as other, owned(tmp_path / "run", TuningError, "out"):
        assert enter(tmp_path / "run")
        assert enter(tmp_path / "link")
        for name in ("run", "link"):
            with pytest.raises(TuningError, match=f"process {os.getpid()} on"):
                other.submit(enter, tmp_path / name).result()
    with ThreadPoolExecutor(1) as other:
        assert other.submit(enter, tmp_path / "run").result()
    (tmp_path / "file").touch()
    with pytest.raises(TuningError, match="cannot write there"):
        enter(tmp_path / "file" / "run")


# -- apart from what is read ------------------------------------------------------------------------------------------


def test_outputs_are_apart_from_inputs_by_whatever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "gone").symlink_to(tmp_path / "model" / "new")
    monkeypatch.chdir(tmp_path / "model" / "unet")
    inputs = [("the model", tmp_path / "model")]
    refused = {"is": ["../../model", "../../link", ".."], "lies within": [".", "new", "../../link/a/b", "../../gone/c"]}
    refused["contains"] = ["../..", str(tmp_path)]
    for how, paths in refused.items():
        for path in paths:
            with pytest.raises(TuningError, match=f" {how} the model(.|\n)*name a new folder"):
                check_apart(Path(path), inputs, TuningError, "out")
    for path in ("../../other", "../../model-2", "../../mod", str(tmp_path / "model2" / "model")):
        check_apart(Path(path), inputs, TuningError, "out")
    check_apart(tmp_path, inputs, TuningError, "out", around=False)
