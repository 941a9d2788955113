"""Passes from text, and from whatever else `apply` takes."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..errors import SpecError
from ..spec import Spec, value_of
from .base import Pass


def parse(text: str) -> tuple[Pass, ...]:
    """Passes from text: one or more calls separated by commas, such as `"CleanUp, PruneBlocks('bk-sdm-base')"`.

    Raises:
        SpecError: at what was not understood, with the nearest known name.
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
    """Passes from what `apply` takes: a pass, a spec, or an iterable of both.

    Raises:
        SpecError: something else is among them.
    """
    if isinstance(passes, str):
        return parse(passes)
    if isinstance(passes, Pass):
        return (passes,)
    if isinstance(passes, type) or not isinstance(passes, Iterable):
        raise _not_a_pass(passes)
    found: list[Pass] = []
    for item in passes:
        found += parse(item) if isinstance(item, str) else [_as_pass(item, "")]
    return tuple(found)


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
