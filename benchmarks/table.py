"""Results of the benchmarks as Markdown tables.

python benchmarks/table.py                          # the newest of benchmarks/results/
python benchmarks/table.py RESULT.json
python benchmarks/table.py RESULT.json --into DOC   # between the markers of such results in a document

A marker names the file that is shown: `<!-- figures: FILE -->`, or `<!-- headline: FILE -->` for the short form.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import cases
import quality_tables
import tuning_tables

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"<!-- (?P<kind>figures|headline): (?P<file>\S+) -->\n.*?<!-- end of (?P=kind) -->", re.DOTALL)


def report(result: dict[str, Any]) -> str:
    """All tables of a result, with what it was measured on."""
    if "rate" in result:
        return tuning_tables.report(result)
    if "ways" in result:
        return quality_tables.report(result) if "set" in result else quality_tables.older(result)
    return "\n\n".join([conditions(result), *cases.tables(result["cases"])])


def conditions(result: dict[str, Any]) -> str:
    settings = result["settings"]
    quick = " **A quick run: smoke test, no figures to quote.**" if settings["quick"] else ""
    malloc = "".join(f", `{name}={value}`" for name, value in result.get("malloc", {}).items())
    return (
        f"{result['device']}, {result['cores']} cores, {result['threads']} threads, {settings['dtype']}, batch "
        f"{settings['batch']}{malloc}; torch {result['torch']}, diffusers {result['diffusers']}, sdgraph "
        f"{result['sdgraph']} ({result['commit']}); {result['date'][:10]}.{quick}"
    )


def headline(result: dict[str, Any]) -> str:
    """Return the short table of a result: of a frontier what no way beats, else memory."""
    if "set" in result:
        return quality_tables.headline(result)
    measured = [case for case in result["cases"] if case["case"].startswith("memory/")]
    return f"{conditions(result)}\n\n{cases.KINDS['memory'].table(measured)}"


def newest() -> Path:
    results = {file: json.loads(file.read_text()) for file in (ROOT / "benchmarks" / "results").glob("*.json")}
    if not results:
        raise SystemExit("no results yet: run benchmarks/overhead.py")
    return max(results, key=lambda file: results[file]["date"])


def filled(document: str, file: Path) -> str:
    """The document with the tables of a result between the markers of results of its sort, whatever their date."""
    name = file.resolve().relative_to(ROOT).as_posix()
    result = json.loads(file.read_text())

    def fill(found: re.Match[str]) -> str:
        if found["file"] != "none" and Path(found["file"]).name[len("2000-01-01") :] != file.name[len("2000-01-01") :]:
            return found[0]
        kind = found["kind"]
        text = headline(result) if kind == "headline" else report(result)
        return f"<!-- {kind}: {name} -->\n{text}\n<!-- end of {kind} -->"

    return MARKED.sub(fill, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="JSON file; default: the newest of benchmarks/results")
    parser.add_argument("--into", type=Path, help="document to fill in")
    chosen = parser.parse_args()
    file = chosen.result or newest()
    if chosen.into is None:
        print(report(json.loads(file.read_text())))
    else:
        chosen.into.write_text(filled(chosen.into.read_text(), file))


if __name__ == "__main__":
    main()
