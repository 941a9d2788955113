"""Tables and plots of results, and the documents that cite them.

    python -m benchmarks.report                    # fill in README.md, docs/ and benchmarks/README.md
    python -m benchmarks.report RESULT.json        # print the tables of a result

`benchmarks/measuring/documents.py` describes the markers that are filled in.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from .measuring import plots, tables
from .measuring.claims import PAGE, page
from .measuring.documents import BLOCK, filled, report, result
from .measuring.record import RESULTS, ROOT

CURVES = ROOT / "docs" / "learning-curves.svg"


def documents() -> dict[Path, str]:
    """Return the documents with figures, as they should be."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {file: file.read_text() for file in files}
    return {file: filled(text) for file, text in texts.items() if "<!-- " in text} | {PAGE: page()}


def draw(texts: Iterable[str]) -> None:
    """Draw the plots of frontiers and prunings, and the learning curves whose table a document has."""
    for file in RESULTS.glob("*.json"):
        if result(file)["benchmark"] == "frontier":
            plots.frontier(result(file), file.with_suffix(".svg"))
        elif result(file)["benchmark"] == "pruning":
            plots.predictions(result(file), file.with_suffix(".svg"))
        elif result(file)["benchmark"] == "switching":
            plots.mixes(result(file), file.with_suffix(".svg"))
    for block in BLOCK.finditer("\n".join(texts)):
        if block["kind"] == "curves":
            found = tables.curves([result(ROOT / file) for file in block["files"].split()])
            plots.learning_curves(found, CURVES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="JSON file; default: fill in the documents")
    chosen = parser.parse_args()
    if chosen.result is not None:
        print(report(json.loads(chosen.result.read_text())))
        return
    texts = documents()
    for file, text in texts.items():
        file.write_text(text)
    draw(texts.values())


if __name__ == "__main__":
    main()
