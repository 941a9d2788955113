"""Module paths and patterns of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..errors import PathError, did_you_mean


def matching(patterns: str | Iterable[str], known: Sequence[str], check: Callable[[str], object]) -> list[str]:
    """Return the paths that patterns name, in the order of `known`; see `sdgraph.Graph.matching`.

    Args:
        check: called with every path that is spelled out; raises an error if there is no such path.
    Raises:
        PathError: a pattern names nothing; the error names the nearest paths.
    """
    named: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise PathError(f"{pattern!r} is no module path", hint="pass text, or several texts")
        choices = [counted for choice in _expanded(pattern) for counted in _counted(choice, known)]
        if len(choices) == 1 and "*" not in choices[0]:
            check(choices[0])
            named.add(choices[0])
            continue
        regex = re.compile("|".join(map(_regex, choices)))
        matches = [path for path in known if regex.fullmatch(path)]
        if not matches:
            hint = did_you_mean(pattern, known) or "print(graph) lists the paths"
            raise PathError(f"no module matches {pattern!r}", where=pattern, hint=hint)
        named.update(matches)
    return sorted(named, key=known.index)


def above(path: str) -> Iterator[str]:
    """Yield the paths of the modules that contain a module, from the inside out."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _expanded(pattern: str) -> list[str]:
    """Return the patterns that a pattern with braces stands for."""
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inner, _, after = rest.partition("}")
    return [expanded for choice in inner.split(",") for expanded in _expanded(before + choice + after)]


def _regex(pattern: str) -> str:
    parts = re.split(r"(\*\*?)", pattern)
    return "".join({"*": r"[^.]*", "**": r".*"}.get(part, re.escape(part)) for part in parts)


def _counted(pattern: str, known: Sequence[str]) -> list[str]:
    """Return the pattern with its negative numbers replaced, once for every parent, because last children differ.

    A pattern that counts beyond the first sibling is returned as it is.
    """
    names = pattern.split(".")
    at = next((i for i, name in enumerate(names) if re.fullmatch(r"-\d+", name)), None)
    if at is None:
        return [pattern]
    parent = re.compile(_regex(".".join(names[:at])))
    children: dict[str, set[int]] = {}
    for path in known:
        parts = path.split(".")
        for i, part in enumerate(parts):
            if part.isdigit() and parent.fullmatch(above_it := ".".join(parts[:i])):
                children.setdefault(above_it, set()).add(int(part))
    counted = [
        ".".join([holder, str(sorted(numbers)[int(names[at])]), *names[at + 1 :]])
        for holder, numbers in children.items()
        if -int(names[at]) <= len(numbers)
    ]
    return [full for partial in counted for full in _counted(partial, known)] or [pattern]
