"""Tables, numbers and lists of names as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines of text, in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def format_names(names: Sequence[str]) -> str:
    """Return names in one line: the only one, or the first, the last and their number."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"


def format_numbered(names: Sequence[str]) -> str:
    """Return numbered names in short form: `a_0, a_1, a_2` as `a_0…2`, and `a_0, a_2` as `a_0,2`."""
    stem = names[0].rpartition("_")[0]
    numbers = [name.removeprefix(f"{stem}_") for name in names]
    if len(names) == 1 or not all(n.isdigit() for n in numbers):
        return ", ".join(names)
    if int(numbers[-1]) - int(numbers[0]) == len(names) - 1:
        return f"{stem}_{numbers[0]}…{numbers[-1]}"
    return f"{stem}_{','.join(numbers)}"


def format_macs(number: int) -> str:
    """Return a number of multiply-accumulates with its unit."""
    return f"{number / 1e9:.4g} GMACs" if number >= 1e7 else f"{format_count(number)} MACs"


def format_count(number: int) -> str:
    """Return a number in three digits, such as `860 M`."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}" if number < 999.5 * scale else f"{number / scale:.0f} {unit}"
    return str(number)


def format_ranges(calls: Sequence[int]) -> str:
    """Return ascending numbers of calls in short form, such as `0, 3-5, 9`."""
    runs: list[list[int]] = []
    for call in calls:
        if runs and runs[-1][-1] == call - 1:
            runs[-1].append(call)
        else:
            runs.append([call])
    return ", ".join(f"{each[0]}-{each[-1]}" if len(each) > 1 else str(each[0]) for each in runs)
