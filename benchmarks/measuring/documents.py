"""Documents with figures: the markers in them, and the tables and cells of results that stand between the markers.

    <!-- figures: FILE TABLE ... -->     the named tables of a result, or all
    <!-- curves: FILE FILE ... -->       learning curves of several results of tuning
    <!-- cell: FILE | ROW | COLUMN -->   a cell in the middle of a sentence, up to `<!-- end -->`

A row is named by cells that only it has, joined by " & "; two rows joined by " minus " give a difference. A fourth part
formats the number that the cell begins with: ".1f", or ".0%" for a percentage. The file of a cell is a result's name in
benchmarks/results, without its ending, or the path of a Markdown file with tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from . import cases, mixes, tables
from .record import RESULTS, ROOT

KINDS = {
    "overhead": cases.tables,
    "frontier": tables.quality,
    "tuning": tables.tuning,
    "pruning": tables.pruning,
    "switching": mixes.tables,
    "channels": tables.channels,
    "gpu": tables.gpu,
    "providers": tables.engines,
    "images": tables.images,
    "drop_in": tables.drop_in,
}
EXTRACTS = ("front", "front-psnr", "front-captions")  # tables that are shown by name only
BLOCK = re.compile(r"<!-- (?P<kind>figures|curves): (?P<files>[^>]+) -->\n.*?<!-- end of (?P=kind) -->", re.DOTALL)
CELL = re.compile(r"<!-- cell: (?P<parts>[^>]+) -->(?P<text>.*?)<!-- end -->", re.DOTALL)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


@cache
def result(file: Path) -> dict[str, Any]:
    """Return a result; it must not be changed."""
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def report(found: dict[str, Any], *names: str) -> str:
    """Return tables of a result as Markdown, with the conditions that it was measured under.

    Args:
        found: the result.
        names: the names of the tables; none shows all but `EXTRACTS`.
    """
    made = KINDS[found["benchmark"]](found)
    chosen = [name for name in made if name not in EXTRACTS] if not names else ["conditions", *names]
    return "\n\n".join(made[name] for name in chosen)


def filled(document: str) -> str:
    """Return a document with all its tables and cells as the results have them."""
    return CELL.sub(_cell, BLOCK.sub(_block, document))


def without_figures(document: str) -> str:
    """Return a document without its filled tables and cells."""
    return CELL.sub("", BLOCK.sub("", document))


def cell(file: str, row: str, column: str, style: str = "") -> str:
    """Return a cell of a result's tables, or the difference of two.

    Args:
        file: the name of a result without its ending, or the path of a Markdown file.
        row: cells of the row, joined by " & "; two rows may be joined by " minus ".
        column: the heading of the column.
        style: the format of the number that the cell begins with; empty returns the cell as it is.
    Raises:
        SystemExit: no cell or several cells are named so.
    """
    found = [_only(file, each, column) for each in row.split(" minus ")]
    if not style:
        return found[0]
    numbers = [float(NUMBER.findall(each)[0]) for each in found]
    value = numbers[0] if len(numbers) == 1 else numbers[0] - numbers[1]
    return format(value, style).replace("%", " %")


def _only(file: str, row: str, column: str) -> str:
    wanted = set(row.split(" & "))
    found = [cells[column] for cells in _rows(file) if column in cells and wanted <= set(cells.values())]
    if len(found) != 1:
        raise SystemExit(f"{len(found)} rows of {file} have the cells {row} and a column {column}")
    return found[0]


@cache
def _rows(file: str) -> list[dict[str, str]]:
    if file.endswith(".md"):
        text = (ROOT / file).read_text()
    else:
        found = result(RESULTS / f"{file}.json")
        made = KINDS[found["benchmark"]](found)
        text = "\n\n".join(made[name] for name in made if name not in EXTRACTS)
    return list(_table_rows(text))


def _table_rows(text: str) -> Iterator[dict[str, str]]:
    """Yield the rows of all Markdown tables of a text, as cells by heading."""
    heading: list[str] = []
    for line in text.splitlines():
        cells = [each.strip() for each in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            heading = []
        elif not heading:
            heading = cells
        elif set(line) - set("|-: "):
            yield dict(zip(heading, cells, strict=True))


def _block(found: re.Match[str]) -> str:
    words = found["files"].split()
    if found["kind"] == "curves":
        text = tables.learning_curves(tables.curves([result(ROOT / file) for file in words]))
    else:
        text = report(result(ROOT / words[0]), *words[1:])
    return f"<!-- {found['kind']}: {found['files']} -->\n{text}\n<!-- end of {found['kind']} -->"


def _cell(found: re.Match[str]) -> str:
    text = cell(*(part.strip() for part in found["parts"].split("|")))
    return f"<!-- cell: {found['parts']} -->{text}<!-- end -->"
