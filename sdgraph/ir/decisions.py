"""What passes decide by the numbers of weights: recorded when they run, given back where they run again without them.

A saved UNet is its configuration, its passes and its weights. Loading runs the passes again, on shapes alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import DecisionError
from ..spec import Spec


@dataclass(frozen=True)
class Decision:
    """What was decided, such as a rank, and about what, such as a module path."""

    about: str
    value: Any

    def __str__(self) -> str:
        return f"{self.about}: {json.dumps(self.value, ensure_ascii=False)}"


@dataclass(frozen=True)
class Applied:
    """A pass that a graph went through, and what it decided there, in order. Prints as the pass."""

    one: Spec
    decisions: tuple[Decision, ...] = ()

    def __str__(self) -> str:
        return str(self.one)


class Decisions:
    """The decisions of one run of a pass.

    Args:
        recorded: those of an earlier run, which are given back in their order; by default the pass decides.
    """

    def __init__(self, recorded: Iterable[Decision] | None = None) -> None:
        self.made: list[Decision] = []
        self._left = None if recorded is None else list(recorded)

    def decide(self, about: str, code: Callable[[], Any]) -> Any:
        """See `Graph.decide`."""
        if self._left is None:
            decision = Decision(about, _plain(about, code()))
        elif self._left and self._left[0].about == about:
            decision = self._left.pop(0)
        else:
            there = f"the next one recorded is {self._left[0].about!r}" if self._left else "no more are recorded"
            raise DecisionError(
                f"the pass asks for a decision {about!r}, and {there}",
                where=about,
                hint="it is another version of the pass: install the one that was saved, or apply it again",
            )
        self.made.append(decision)
        return copy.deepcopy(decision.value)

    def finish(self) -> tuple[Decision, ...]:
        """All decisions.

        Raises:
            DecisionError: some that are recorded were not asked for.
        """
        if self._left:
            raise DecisionError(
                f"the pass did not ask for the decision {self._left[0].about!r}, which is recorded",
                where=self._left[0].about,
                hint="it is another version of the pass: install the one that was saved, or apply it again",
            )
        return tuple(self.made)


def _plain(about: str, value: Any) -> Any:
    """The value as it will come back from a file."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DecisionError(
            f"the decision {about!r} is a {type(value).__name__} that cannot be recorded: {error}",
            where=about,
            hint="decide by numbers, text, lists and dicts of them: tensor.item(), tensor.tolist()",
        ) from error
