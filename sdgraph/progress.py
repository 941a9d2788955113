"""Progress on standard error: bars on a terminal, lines in a log, and notes. `silent` turns all of them off."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

EVERY = 60.0  # seconds between the lines of a bar that is not on a terminal
_silent = False


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar of tqdm that is redrawn on a terminal only; elsewhere it prints a line every minute and one at the end.

    Args:
        args: the positional arguments of tqdm.
        disable: whether the bar is hidden.
        options: the keyword arguments of tqdm.
    """

    def __init__(self, *args: Any, disable: bool = False, **options: Any) -> None:
        self._redrawn, self._printed = _on_terminal(), time.monotonic()
        super().__init__(*args, disable=disable or _silent, **options)  # type: ignore[call-overload]

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # type: ignore[override]
        if self._redrawn:
            return bool(super().display(msg, pos))
        if msg is None and time.monotonic() - self._printed >= EVERY:
            self._line()
        return False  # so that tqdm moves no cursor

    def close(self) -> None:
        if not self._redrawn and not self.disable:
            self._line()
            self.leave = False
        super().close()

    def _line(self) -> None:
        self._printed = time.monotonic()
        done = "{n_fmt} of {total_fmt}" if self.total is not None else "{n_fmt}"
        rate = "{elapsed}, {rate_fmt}{postfix}"
        self.fp.write(self.format_meter(**{**self.format_dict, "bar_format": f"{{desc}}: {done} [{rate}]"}) + "\n")


def _on_terminal() -> bool:
    return sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)  # a notebook redraws too


def note(text: str) -> None:
    """Print a line on standard error, unless progress is silenced."""
    if not _silent:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def silent(on: bool = True) -> Iterator[None]:
    """Show neither bars nor notes in a block.

    Args:
        on: whether to silence them; False shows them again within a silent block.
    """
    global _silent
    before, _silent = _silent, on
    try:
        yield
    finally:
        _silent = before
