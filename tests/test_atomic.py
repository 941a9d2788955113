"""Folders appear whole or not at all, also after a process was killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdgraph.atomic import appearing, written
from sdgraph.errors import SavedError

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
