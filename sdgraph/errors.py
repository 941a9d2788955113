"""The errors that sdgraph raises: one class for each cause that a caller can tell apart.

A message says what is wrong, where (a module path, a node, a file) and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CallError",
    "ContractError",
    "DecisionError",
    "EditError",
    "ExportError",
    "ExtraError",
    "ModeError",
    "NoChangeError",
    "OrderError",
    "ParityError",
    "PassError",
    "PathError",
    "QualityError",
    "SavedError",
    "ScheduleError",
    "SdgraphError",
    "ShapeError",
    "SourceError",
    "SpecError",
    "TraceError",
    "TuningError",
    "did_you_mean",
]


def __dir__() -> list[str]:
    return __all__


class SdgraphError(Exception):
    """The base class of all errors of sdgraph.

    Args:
        what: the fault, in one sentence.
        where: the module path, node, argument or file that the error is about.
        hint: the remedy, as an instruction to the caller.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if hint:
            lines.append(f"  hint:  {hint}")
        super().__init__("\n".join(lines))

    def came_through(self, what: str) -> None:
        """Add the pass that was running to the message.

        Args:
            what: the pass as text, and the line of its code where it is known.
        """
        self.args = (f"{self.args[0]}\n  pass:  {what}",)


class SourceError(SdgraphError, TypeError):
    """The source cannot be traced faithfully: no UNet, no weights, hooks, unfused LoRA, mixed dtypes ..."""


class TraceError(SdgraphError):
    """The code of a model or a pass does something that a graph for every size cannot represent."""


class CallError(SdgraphError, ValueError):
    """The graph does not cover a call: its shapes, its dtypes, its arguments, or the branch that it would take."""


class PathError(SdgraphError, KeyError):
    """A module path does not name a region of the graph."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class EditError(SdgraphError):
    """An edit of the graph is impossible."""


class ShapeError(EditError):
    """An edit would leave the shapes of the graph inconsistent."""


class SpecError(SdgraphError, ValueError):
    """A text or an option does not name a pass, an option or a value that exists."""


class ScheduleError(SdgraphError, ValueError):
    """A schedule is invalid, or does not fit the generation."""


class PassError(SdgraphError):
    """A pass failed. The cause is chained, and the graph that the pass received is unchanged."""


class DecisionError(PassError):
    """A pass needs the values of weights where there are none, or its decisions differ from the recorded ones."""


class NoChangeError(PassError):
    """A pass changed nothing, and does not declare `may_change_nothing`."""


class OrderError(PassError):
    """The passes are in an order that one of them forbids."""


class PreconditionError(PassError):
    """The graph does not satisfy a precondition of a pass."""


class ContractError(PassError):
    """A pass broke an invariant of the graph, a postcondition, or its numeric contract."""


class ModeError(SdgraphError, AttributeError):
    """A diffusers UNet offers this attribute or method, and a traced one cannot."""


class SavedError(SdgraphError, ValueError):
    """A saved folder is missing, damaged, or asks for something unsafe."""


class ExportError(SdgraphError):
    """An export failed. Nothing was written."""


class ParityError(ExportError):
    """The outputs of an exported model differ from PyTorch's by more than the bounds. Nothing was written."""


class QualityError(SdgraphError):
    """Images fall short of a required figure, or cannot be compared."""


class TuningError(SdgraphError):
    """Training cannot begin, go on or be resumed. What was saved before is still there."""


class ExtraError(SdgraphError, ImportError):
    """An optional dependency cannot be imported."""


def did_you_mean(word: object, known: Iterable[str], count: int = 3) -> str:
    """Return `"did you mean 'a' or 'b'?"` for the known words closest to a word, or "" if none is close.

    Args:
        word: the word that is not known.
        known: the known words.
        count: the largest number of suggestions.
    Example:
        `did_you_mean("PruneBlock", ["PruneBlocks", "CleanUp"])` is `"did you mean 'PruneBlocks'?"`
    """
    if not isinstance(word, str):
        return ""
    others = [name for name in known if name != word]  # the word itself may be known, and be wrong here
    matches = difflib.get_close_matches(word, others, n=count, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, matches))}?" if matches else ""
