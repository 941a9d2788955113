"""Prose: docstrings begin with nouns and imperatives, entries of arguments are noun phrases, some words are banned."""

from pathlib import Path

import pytest

from ..documents import ROOT
from .prose import of_code, of_page

ROOMS = ("sdgraph", "passes", "exporters", "benchmarks", "examples", "tests")
QUOTING = ("prose.py", "test_prose.py")  # which hold what is banned
CODE = [path for top in ROOMS for path in ROOT.glob(f"{top}/**/*.py") if path.name not in QUOTING]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]


def room(path: Path) -> str:
    """Return the folder of a file of code, or a page itself."""
    return (path if path.suffix == ".md" else path.parent).relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", sorted({room(path) for path in [*CODE, *PAGES]}))
def test_prose_keeps_the_rules(name: str) -> None:
    faults = [fault for path in CODE if room(path) == name for fault in of_code(path)]
    faults += [fault for path in PAGES if room(path) == name for fault in of_page(path)]
    assert not faults, "\n".join(faults)


def test_faults_are_found(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text('''
def cost(call: int, graph: int) -> int:
    """What it takes.

    Args:
        call: of a
            generation.
        graph: the graph.
    """
    return 0  # nobody knows
''')
    assert [fault.partition(":")[2] for fault in of_code(file)] == [
        "2: begins with a clause: What it takes.",
        "2: begins with a preposition: call: of a",
        "3: 'What it takes': What it takes. Args: call: of",
        "10: 'nobody': # nobody knows",
    ]
