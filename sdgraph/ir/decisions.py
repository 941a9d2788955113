"""Decisions that passes take by the values of weights. They are recorded, and returned when the passes run again.

A saved UNet is its configuration, its passes and its weights. Loading it runs the passes again on the shapes of weights
alone, where such decisions cannot be taken.
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
    """A decision of a pass.

    Args:
        about: what was decided, such as a module path.
        value: the result, such as a rank.
    """

    about: str
    value: Any

    def __str__(self) -> str:
        return f"{self.about}: {json.dumps(self.value, ensure_ascii=False)}"


@dataclass(frozen=True)
class Applied:
    """A pass that was applied to a graph, with its decisions in order. It prints as the pass."""

    one: Spec
    decisions: tuple[Decision, ...] = ()

    def __str__(self) -> str:
        return str(self.one)


class Decisions:
    """The decisions of one run of a pass.

    Args:
        recorded: the decisions of an earlier run, which are returned in their order; by default the pass decides.
    """

    def __init__(self, recorded: Iterable[Decision] | None = None) -> None:
        self._taken: list[Decision] = []
        self._left = None if recorded is None else list(recorded)

    def decide(self, about: str, code: Callable[[], Any]) -> Any:
        """Return the result of `code`, or the recorded one; see `Graph.decide`."""
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
        self._taken.append(decision)
        return copy.deepcopy(decision.value)

    def finish(self) -> tuple[Decision, ...]:
        """Return all decisions of the run.

        Raises:
            DecisionError: the pass did not ask for all recorded decisions.
        """
        if self._left:
            raise DecisionError(
                f"the pass did not ask for the decision {self._left[0].about!r}, which is recorded",
                where=self._left[0].about,
                hint="it is another version of the pass: install the one that was saved, or apply it again",
            )
        return tuple(self._taken)


def _plain(about: str, value: Any) -> Any:
    """Return a value as it comes back from a file."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DecisionError(
            f"the decision {about!r} is a {type(value).__name__} that cannot be recorded: {error}",
            where=about,
            hint="decide by numbers, text, lists and dicts of them: tensor.item(), tensor.tolist()",
        ) from error
