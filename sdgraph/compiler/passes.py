"""Passes: the base class, combinations of passes, and passes from text."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ..contract import Contract
from ..errors import SpecError
from ..graph import Graph
from ..options import Count, checked
from ..spec import Spec, value_of
from .report import NearMiss


@dataclass(frozen=True)
class Pass(Spec, abstract=True):
    """A transformation of a graph. Subclass it as a frozen dataclass; fields are its options.

    A pass edits the graph that it is given and nothing else. The runner gives it a copy, checks the edited copy against
    `contract`, and drops the copy if anything fails.

    Class attributes:
        contract: what the pass promises about the numbers.
        may_change_nothing: whether a run may have no effect; otherwise that is an error.
        requires: names of passes that must have run before.
        not_after: names of passes that must not have run before, with the reasons.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    may_change_nothing: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()
    not_after: ClassVar[Mapping[str, str]] = {}

    def run(self, graph: Graph) -> Findings | None:
        """Edit the graph; docs/writing-a-pass.md shows how.

        Decisions that depend on the values of weights go through `graph.decide`, and conditions on the sizes of calls
        through `graph.require`.

        Returns:
            The findings for the report, or None.
        """
        raise NotImplementedError(f"{type(self).__name__}.run")

    def stages(self, graph: Graph) -> Sequence[Pass]:
        """Return passes that do the same one after another, and whose changes can be trained apart; see `incubate`.

        Args:
            graph: the graph that the pass would be applied to. It is not changed.
        Returns:
            The pass itself, where a pass does not say more.
        """
        return (self,)


@dataclass(frozen=True)
class Findings:
    """What a pass reports about its run.

    Args:
        edits: its edits, a line of text for each.
        near_misses: places where it almost applied.
    """

    edits: tuple[str, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()


@dataclass(frozen=True)
class Chain(Pass, abstract=True):
    """A pass that runs other passes in order. Its contract is the weakest of theirs, and it fails as a whole.

    Args:
        passes: the passes. Some may change nothing as long as another changes something.
        repeat: the largest number of rounds; rounds end when nothing changes any more.
    """

    passes: Annotated[tuple[Pass, ...], Any] = ()  # texts too, see `as_passes`
    repeat: Count = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", as_passes(self.passes))

    @property
    def contract(self) -> Contract:  # type: ignore[override]
        return Contract.weakest([p.contract for p in self.passes])

    @property
    def may_change_nothing(self) -> bool:  # type: ignore[override]
        return all(p.may_change_nothing for p in self.passes)


@dataclass(frozen=True)
class Fixpoint(Chain, abstract=True):
    """A chain that repeats its passes until nothing changes. More than `repeat` rounds are an error."""

    repeat: Count = 10


@checked()
def parse(text: str) -> tuple[Pass, ...]:
    """Return the passes that a text names, as calls separated by commas.

    Raises:
        SpecError: a part of the text is not understood; the error gives the nearest known name.
    Example:
        `parse("CleanUp, PruneBlocks('bk-sdm-base')")`
    """
    try:
        tree = ast.parse(f"({text},)" if text.strip() else "()", mode="eval").body
    except SyntaxError as error:
        raise SpecError(
            f"cannot read the spec {text!r}: {error.msg}", hint="write calls: \"CleanUp(), PruneBlocks('bk-sdm-base')\""
        ) from error
    assert isinstance(tree, ast.Tuple)
    return tuple(_as_pass(value_of(item, text, Pass), text) for item in tree.elts)


def as_passes(passes: Any) -> tuple[Pass, ...]:
    """Return the passes in an argument of `apply`: a pass, a text, or an iterable of both.

    Raises:
        SpecError: the argument is or contains something else.
    """
    if isinstance(passes, str):
        return parse(passes)
    if isinstance(passes, Pass):
        return (passes,)
    if isinstance(passes, type) or not isinstance(passes, Iterable) or getattr(passes, "ndim", 1) == 0:
        raise _not_a_pass(passes)
    parsed: list[Pass] = []
    for item in passes:
        parsed += parse(item) if isinstance(item, str) else [_as_pass(item, "")]
    return tuple(parsed)


def _as_pass(value: Any, text: str) -> Pass:
    if not isinstance(value, Pass):
        raise _not_a_pass(value, text)
    return value


def _not_a_pass(value: Any, text: str = "") -> SpecError:
    if isinstance(value, type) and issubclass(value, Spec):
        hint = f"construct it: {value.__name__}(...)"
    else:
        hint = "pass objects of sdgraph.Pass or text specs"
    return SpecError(f"{value!r} is not a pass", where=text, hint=hint)
