"""Module paths: which ones a pattern names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..errors import PathError, did_you_mean


def matching(patterns: str | Iterable[str], known: Sequence[str], check: Callable[[str], object]) -> list[str]:
    """The paths that patterns name, in the order in which they are known; see `sdgraph.Graph.matching`.

    Args:
        check: called with each path that is spelled out; raises an error if there is no such path.
    Raises:
        PathError: a pattern that names nothing; with the nearest paths.
    """
    found: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        choices = [_counted(choice, known) for choice in _expanded(pattern)]
        if len(choices) == 1 and "*" not in choices[0]:
            check(choices[0])
            found.add(choices[0])
            continue
        regex = re.compile("|".join(map(_regex, choices)))
        matches = [path for path in known if regex.fullmatch(path)]
        if not matches:
            cure = did_you_mean(pattern, known) or "print(graph) lists the paths"
            raise PathError(f"no module matches {pattern!r}", where=pattern, cure=cure)
        found.update(matches)
    return sorted(found, key=known.index)


def above(path: str) -> Iterator[str]:
    """The paths of the modules that hold a module, from the inside out."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _expanded(pattern: str) -> list[str]:
    """The pattern for each choice of what its braces hold."""
    before, brace, rest = pattern.partition("{")
    inner, _, after = rest.partition("}")
    return [each for choice in inner.split(",") for each in _expanded(before + choice + after)] if brace else [pattern]


def _regex(pattern: str) -> str:
    parts = re.split(r"(\*\*?)", pattern)
    return "".join({"*": r"[^.]*", "**": r".*"}.get(part, re.escape(part)) for part in parts)


def _counted(pattern: str, known: Sequence[str]) -> str:
    """The pattern with its negative numbers replaced; as it is where there are too few siblings."""
    names = pattern.split(".")
    for i, name in enumerate(names):
        if re.fullmatch(r"-\d+", name):
            above = ".".join(names[:i])
            siblings = dict.fromkeys(
                path.split(".")[i] for path in known if path.startswith(f"{above}.") and path.count(".") >= i
            )
            there = sorted(map(int, filter(str.isdigit, siblings)))
            if -int(name) <= len(there):
                names[i] = str(there[int(name)])
    return ".".join(names)
