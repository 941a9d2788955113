"""Passes from text, and from the other arguments that `apply` accepts."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..errors import SpecError
from ..options import checked
from ..spec import Spec, value_of
from .base import Pass


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
