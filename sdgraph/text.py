"""Files of text: UTF-8, with or without a byte-order mark, and no other encoding."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import SdgraphError

FOREIGN = re.compile(r"[\0\x1b]")  # in UTF-16 and ISO-2022, whose bytes can be those of other text in UTF-8


def read_text(path: Path, error: type[SdgraphError], *, hint: str, where: str = "") -> str:
    """Return the text of a file, with the ends of lines as they are.

    Args:
        path: the file.
        error: the class of the error.
        hint: the advice of the error: what the file should be.
        where: the argument that names the file, for the error; by default the path.
    Raises:
        error: the file is missing, cannot be read, or has another encoding; the message names the file and the place.
    """
    where = where or str(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as missing:
        raise error(f"there is no file {path}", where=where, hint=hint) from missing
    except OSError as refusal:
        raise error(f"{path} cannot be read: {refusal.strerror}", where=where, hint=hint) from refusal
    mark = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text = content[mark:].decode()
        offset = -1 if (found := FOREIGN.search(text)) is None else len(text[: found.start()].encode())
    except UnicodeDecodeError as wrong:
        text, offset = "", wrong.start
    if offset < 0:
        return text
    place = mark + offset
    line = len(lines(content[:place].decode(errors="replace")))
    raise error(
        f"{path} cannot be read: it is not UTF-8 at byte {place}, in line {line}",
        where=where,
        hint=f"save it as UTF-8; {hint}",
    )


def lines(text: str) -> Sequence[str]:
    r"""Return the lines of a text, which end with \n, \r or both; other line separators of Unicode do not count."""
    return re.split(r"\r\n|\r|\n", text)


def from_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is not JSON, or an object has a name twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_object(path: Path, error: type[SdgraphError], *, hint: str, format: int | None = None) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        error: the class of the error.
        hint: the advice of the error: what the file should be.
        format: the number that the file must state as its `format`; None for files of which others decide the format.
    Raises:
        error: the file cannot be read as text (see `read_text`), its text is not a JSON object, or it has no format or
            another one.
    """
    text = read_text(path, error, hint=hint)
    try:
        plain = from_json(text)
    except ValueError as wrong:
        raise error(f"{path.name} is not JSON: {wrong}", where=str(path), hint=hint) from wrong
    if not isinstance(plain, dict):
        raise error(f"{path.name} is not a JSON object", where=str(path), hint=hint)
    found = plain.get("format")
    if format is not None and (type(found) is not int or found != format):
        stated = f"has format {found}" if type(found) is int else "states no format"
        raise error(f"{path.name} {stated}, and this sdgraph reads format {format}", where=str(path), hint=hint)
    return plain


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return result
