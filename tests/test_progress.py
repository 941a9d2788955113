"""Progress: bars on a terminal, lines in a log, nothing if it is silenced."""

from __future__ import annotations

import contextlib
import io

import pytest

from sdgraph import progress
from sdgraph.progress import Bar, note, silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, every: float = 60.0) -> str:
    """Return the text that is written for three images, a note, and a bar that is not shown."""
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "EVERY", every)
    with Bar(total=3, desc="evaluate", unit="image") as bar:
        for _ in range(3):
            bar.update()
            bar.refresh()
    note("threads: 2")
    for _ in Bar(range(5), desc="other", disable=True):
        pass
    return stream.getvalue()


def test_a_log_has_one_line_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    line, noted = drawn(monkeypatch, io.StringIO()).splitlines()
    assert line.startswith("evaluate: 3 of 3 [")
    assert line.endswith("image/s]")
    assert noted == "threads: 2"


def test_a_log_has_more_lines_if_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    written = drawn(monkeypatch, io.StringIO(), every=0.0)
    *lines, _ = written.splitlines()
    assert len(lines) > 3
    assert all(line.startswith("evaluate: ") for line in lines)
    assert "\r" not in written


def test_a_bar_that_fails_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    with contextlib.suppress(OSError), Bar(desc="search", unit="generation") as bar:
        bar.update(2)
        raise OSError("gone")
    assert stream.getvalue().startswith("search: 2 [")


def test_a_terminal_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    written = drawn(monkeypatch, Terminal())
    assert written.count("\revaluate: ") >= 3
    assert "100%" in written


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent():
        assert drawn(monkeypatch, Terminal()) == ""
        with silent(False):
            assert drawn(monkeypatch, io.StringIO())
    assert drawn(monkeypatch, io.StringIO())
