"""Documents as what can be run and looked up in them: blocks of code, commands, links and names."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FENCED = re.compile(
    r"(?:^<!-- (?P<label>\S+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        language: the language that it declares.
        text: its code.
        line: the number of the line of the document before its first line.
        label: the text of the comment above it, which is the file that it is part of.
    """

    language: str
    text: str
    line: int
    label: str | None


def blocks(document: Path, language: str | None = None) -> list[Block]:
    """The blocks of a document, or those of one language."""
    text = document.read_text()
    found = [
        Block(match["language"], match["text"], text.count("\n", 0, match.start("text")), match["label"])
        for match in FENCED.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def prose(document: Path) -> str:
    """A document without its blocks."""
    return FENCED.sub("", document.read_text())


def inline_code(document: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(document))]


def links(document: Path) -> list[str]:
    """The files that a document links to, without anchors."""
    return re.findall(r"\]\((?!\w+:)([^)#\s]+)", prose(document))


def commands(document: Path) -> list[list[str]]:
    """The command lines of the shell blocks, as words."""
    lines = "".join(block.text for block in blocks(document, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def load(path: str) -> ModuleType:
    """A script of the repository as a module."""
    name = "tested_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def assert_runs(document: Path, patch: pytest.MonkeyPatch, instead: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run the Python blocks of a document in order, in one namespace, which is returned.

    Args:
        document: its path.
        patch: undoes what a run leaves behind.
        instead: text that is replaced in the code, so that it is quick.
    """
    module = ModuleType("document")
    patch.setitem(sys.modules, "document", module)  # dataclasses look their module up
    for block in blocks(document, "python"):
        text = block.text
        for old, new in (instead or {}).items():
            text = text.replace(old, new)
        # as many empty lines before it that errors name lines of the document
        exec(compile("\n" * block.line + text, str(document), "exec", dont_inherit=True), vars(module))
    return vars(module)
