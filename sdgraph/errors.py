"""Every error sdgraph raises: one class per cause a caller can tell apart.

A message says what is wrong, where (a module path, a node, a file) and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SdgraphError(Exception):
    """Base of all errors of this library.

    Args:
        what: what is wrong, in one sentence.
        where: module path, node, argument or file it is about.
        hint: what the caller can do.
        cure: the former name of `hint`, for passes that were written with it.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "", cure: str = "") -> None:
        hint = hint or cure
        self.what, self.where, self.hint = what, where, hint
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if hint:
            lines.append(f"  hint:  {hint}")
        super().__init__("\n".join(lines))

    def came_through(self, what: str) -> None:
        """Add to the message what was under way: a pass, and the place in its code."""
        self.args = (f"{self.args[0]}\n  pass:  {what}",)


class SourceError(SdgraphError, TypeError):
    """The model handed in cannot be traced faithfully: not a UNet, on meta, hooked, unfused LoRA, FreeU ..."""


class TraceError(SdgraphError):
    """The model's code did something that a size-independent graph cannot hold."""


class CallError(SdgraphError, ValueError):
    """A call that the traced graph does not cover: a shape, dtype, argument or branch."""


class PathError(SdgraphError, KeyError):
    """A module path that names no region of the graph."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class EditError(SdgraphError):
    """An edit of the graph that cannot be carried out."""


class ShapeError(EditError):
    """An edit that leaves the shapes of the graph inconsistent."""


class SpecError(SdgraphError, ValueError):
    """A text spec or an option that names no pass, field or value."""


class ScheduleError(SdgraphError, ValueError):
    """A schedule that makes no sense, or not for this generation."""


class PassError(SdgraphError):
    """A pass failed; the cause is chained, the graph it was given is unchanged."""


class DecisionError(PassError):
    """A pass needs the numbers of weights where there are none, or decisions that are not what was recorded."""


class NoChangeError(PassError):
    """A pass changed nothing and had not said that this is fine."""


class OrderError(PassError):
    """Passes in an order that one of them forbids."""


class ContractError(PassError):
    """A pass broke what it declares: a structural invariant or its numeric contract."""


class ModeError(SdgraphError, AttributeError):
    """Something a diffusers UNet offers and a traced one cannot do."""


class SavedError(SdgraphError, ValueError):
    """A saved folder that is missing, damaged, or asks for something unsafe."""


class ExportError(SdgraphError):
    """An export that failed; nothing was written."""


class ParityError(ExportError):
    """An exported model whose numbers are out of bounds against eager; nothing was written."""


class QualityError(SdgraphError):
    """Images that fall short of what was asked of them, or that cannot be compared."""


class ExtraError(SdgraphError, ImportError):
    """An optional dependency is not installed."""


def did_you_mean(word: str, known: Iterable[str], count: int = 3) -> str:
    """`"did you mean 'a' or 'b'?"` for the nearest known words, else the empty string."""
    near = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""
