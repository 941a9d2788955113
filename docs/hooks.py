"""A hook of MkDocs: README.md is the home page, and links out of docs/ lead somewhere.

Pages link to files of the repository as they must on a code host, so the same files read well in both places. Here a
linked Markdown file becomes a page, a linked Python file a page that shows it, and any other file is copied.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Module, Object
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ALWAYS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SECTION = re.compile(r"^(?=(?:Returns|Raises|Yields|Example|Source):$)", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside of docs/ that pages link to, and those that these link to."""
    waiting = [*ALWAYS, *(f"docs/{file.src_uri}" for file in files if file.is_documentation_page())]
    known: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in known:
            continue
        known.add(path)
        if not (ROOT / path).is_file():
            raise PluginError(f"a page links to {path}, which is not a file")
        if not path.startswith("docs/"):
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += [posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in links(path)]
    return files


def on_page_read_source(page: Page, config: Any) -> str | None:
    """The text of a page, its links as they are on the site."""
    path = Path(str(page.file.abs_src_path)).relative_to(ROOT).as_posix()
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".py"):
        return f"# {Path(path).name}\n\n`{path}`\n\n```python\n{text}```\n"
    here, there = posixpath.dirname(path), posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        return posixpath.relpath(place(posixpath.normpath(posixpath.join(here, link[1]))), there or ".")

    return LINK.sub(moved, text)


def on_page_content(html: str, page: Page, **_: Any) -> None:
    """Refuse a section of a docstring that was read as prose."""
    section = re.search(r"<p>[^<]*\b(Args|Returns|Raises|Yields):.{0,80}", html, re.DOTALL)
    if section is not None:
        raise PluginError(f"{page.file.src_uri}: a docstring is not understood at {section[0]!r}")


def links(path: str) -> list[str]:
    return LINK.findall((ROOT / path).read_text(encoding="utf-8"))


def place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") + (".md" if path.endswith(".py") else "")


class Docstrings(Extension):
    """Read docstrings as ours are: no empty lines between their sections."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub("\n", obj.docstring.value)


class Exports(Extension):
    """Let `sdgraph.X` be what `sdgraph` exports, as in Python, where a module inside has the same name."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        moved = {str(name): pkg.imports.get(str(name)) for name in pkg.exports or () if pkg[str(name)].is_module}
        exported = {name: pkg[path.removeprefix(f"{pkg.path}.")] for name, path in moved.items() if path is not None}
        for name, member in exported.items():
            pkg.set_member(name, member)
