"""The open sessions of a bundle, which a bound on their memory closes again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdgraph.errors import SpecError


class OpenSessions:
    """The sessions of the models of a folder that are open. Where memory is short, the least recently used one closes.

    A session counts with the bytes of its file and of the weights that it reads, even if another one shares them, for
    providers keep rearranged copies. The working memory of calls is not counted.

    Args:
        sizes: the bytes of each model, by file.
        memory: the most bytes of open sessions; None for no bound.
    Raises:
        SpecError: the largest model alone has more bytes.
    """

    def __init__(self, sizes: Mapping[str, int], memory: int | None = None) -> None:
        self.sizes, self.memory = dict(sizes), memory
        self._open: dict[str, tuple[Any, Callable[[str], None]]] = {}  # the least recently used one first
        largest = max(self.sizes, key=self.sizes.__getitem__)
        if memory is not None and memory < self.sizes[largest]:
            raise SpecError(
                f"{memory} bytes do not hold the largest model, {largest}",
                where="memory",
                hint=f"at least {self.sizes[largest]}; or leave it out",
            )

    def __contains__(self, file: str) -> bool:
        return file in self._open

    def __len__(self) -> int:
        return len(self._open)

    @property
    def bytes(self) -> int:
        """The bytes of the open sessions."""
        return sum(self.sizes[file] for file in self._open)

    def session(self, file: str, opened: Callable[[], Any], closed: Callable[[str], None]) -> Any:
        """Return the session of a model, opened if it is not, after others were closed to make room.

        Args:
            file: the name of its file.
            opened: the function that opens it.
            closed: the function that is called with the name of the file after the session has closed.
        """
        if file in self._open:
            self._open[file] = self._open.pop(file)  # now the most recently used one
            return self._open[file][0]
        while self.memory is not None and self._open and self.bytes + self.sizes[file] > self.memory:
            self.close(next(iter(self._open)))
        self._open[file] = opened(), closed
        return self._open[file][0]

    def close(self, file: str) -> None:
        """Close the session of a model, if it is open.

        Args:
            file: the name of its file.
        """
        if file in self._open:
            _, closed = self._open.pop(file)
            closed(file)
