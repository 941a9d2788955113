"""The rules of prose that a machine can check, and the sentences of a file that break them."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

CLAUSE = re.compile(r"(What|How|Where|Until|Without)\b")  # a docstring begins with a noun or an imperative instead
PREPOSITION = re.compile(r"(of|in|at|by|for|from|to|with|on|as|per|into|over|under|after|before|since|through)\b", re.I)
BANNED = re.compile(
    r"\b(nobody|told|said|wished|see there|comes? by|(?:is|are) to be had|what it takes|whole or not at all"
    r"|of (?:its|their) own|on the way back)\b".replace(" ", r"\s+"),
    re.I,
)
ENTRY = re.compile(r"( +)(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.+)")


def of_code(path: Path) -> list[str]:
    """Return the faults of a Python file: in its docstrings, comments and messages."""
    text = path.read_text()
    tree = ast.parse(text)
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            line = getattr(node, "lineno", 1)
            if CLAUSE.match(docstring):
                faults.append(f"{path}:{line}: begins with a clause: {docstring.splitlines()[0]}")
            faults += [
                f"{path}:{line}: begins with a preposition: {name}: {meaning}"
                for name, meaning in arguments(docstring)
                if PREPOSITION.match(meaning)
            ]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            faults += banned(path, node.lineno, node.value)
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                faults += banned(path, token.start[0], token.string)
    return faults


def of_page(path: Path) -> list[str]:
    """Return the banned words of a page of Markdown."""
    return banned(path, 1, path.read_text())


def banned(path: Path, line: int, text: str) -> list[str]:
    """Return the banned words of a text that begins at a line of a file."""
    return [
        f"{path}:{line + text.count(chr(10), 0, found.start())}: {found[0]!r}: {around(text, found)}"
        for found in BANNED.finditer(text)
    ]


def around(text: str, found: re.Match[str]) -> str:
    """Return the words beside those that were found."""
    return " ".join(text[max(0, found.start() - 40) : found.end() + 30].split())


def arguments(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield the entries of a docstring's `Args`: the names and what is written of them."""
    _, found, section = docstring.partition("Args:\n")
    indent = None
    for line in section.splitlines() if found else ():
        if line.strip() and not line.startswith(" "):
            return
        entry = ENTRY.fullmatch(line)
        if entry and indent in (None, entry[1]):
            indent = entry[1]
            yield entry[2], entry[3]
