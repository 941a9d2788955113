"""Passes as text: printed, parsed back, misspelt."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes.pipeline import MODEL

from sdgraph import Graph, Pass, Spec, parse
from sdgraph.__main__ import main
from sdgraph.errors import SpecError
from sdgraph.passes import CleanUp, InheritFeatures, PruneBlocks
from sdgraph.schedules import Range, Schedule, Uniform
from sdgraph.spec import _declared, import_module, known, read

MODULE = """
from dataclasses import dataclass
from sdgraph import Pass

@dataclass(frozen=True)
class {}(Pass): ...
"""


@dataclass(frozen=True)
class Window(Spec):
    size: int = 8
    shift: bool = False


@dataclass(frozen=True)
class Tile(Pass):
    window: Window = Window()
    levels: tuple[int, ...] = ()
    name: str | None = None
    rate: float = 0.5
    schedule: Schedule | None = None

    def run(self, graph: Graph) -> None:
        return None


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (CleanUp(), "CleanUp()"),
        (PruneBlocks("bk-sdm-base"), "PruneBlocks('bk-sdm-base')"),
        (PruneBlocks(["mid_block"]), "PruneBlocks(('mid_block',))"),
        (Tile(), "Tile()"),
        (Tile(Window(4), rate=0.25), "Tile(Window(4), rate=0.25)"),
        (Tile(levels=(0, 1), name="it's"), 'Tile(levels=(0, 1), name="it\'s")'),
    ],
)
def test_text_and_back(one: Pass, text: str) -> None:
    assert str(one) == text
    assert parse(text) == (one,)


@given(
    st.builds(
        Tile,
        st.builds(Window, st.integers(1, 99), st.booleans()),
        st.lists(st.integers(-3, 3), max_size=3).map(tuple),
        st.none() | st.text(max_size=8),
        st.floats(allow_nan=False),
    )
)
@settings(derandomize=True)
def test_any_options_survive(one: Tile) -> None:
    assert parse(str(one)) == (one,)


def test_several_at_once() -> None:
    assert parse("CleanUp, PruneBlocks('bk-sdm-tiny')") == (CleanUp(), PruneBlocks("bk-sdm-tiny"))
    assert parse("") == ()


def test_presets() -> None:
    assert parse("InheritFeatures.deep_cache(5, branch=1)") == (InheritFeatures.deep_cache(5, 1),)
    assert parse("CleanUp, InheritFeatures.t_gate()") == (CleanUp(), InheritFeatures.t_gate())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("PruneBlock('bk-sdm-base')", "did you mean 'PruneBlocks'"),
        ("PruneBlocks(block='bk-sdm-base')", "did you mean 'blocks'"),
        ("PruneBlocks('bk-sdm-base'", "cannot read the spec"),
        ("PruneBlocks('bk-sdm-bass')", "did you mean 'bk-sdm-base'"),
        ("PruneBlocks(open('x'))", "no spec named 'open'"),
        ("PruneBlocks(mid_block)", "write text in quotes: 'mid_block'"),
        ("Tile(schedule=Unifrom(3))", "did you mean 'Uniform'"),
        ("Tile(schedule=zzz)", "no schedule named 'zzz'"),
        ("PruneBlocks(1 + x)", "neither a literal nor a call"),
        ("__import__('os').system('true')", "neither a literal nor a call"),
        ("[].append", "neither a literal nor a call"),
        ("'CleanUp'", "is not a pass"),
        ("Window(3)", "is not a pass"),
        ("Tile(1, 2, 3, 4, 5, 6)", "cannot construct Tile"),
        ("zzz", "known: "),
        ("InheritFeatures.deep_cash(3)", "did you mean 'deep_cache'"),
        ("InheritFeatures.deep_cache(intervall=3)", "did you mean 'interval'"),
        ("InheritFeatures.run(3)", "has no preset 'run'"),
        ("CleanUp.x.y()", "neither a literal nor a call"),
    ],
)
def test_bad_specs_say_what_was_meant(text: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert words in str(caught.value)


def test_a_third_party_s_passes_are_found_and_a_broken_package_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = tmp_path / "acme-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    points = "[sdgraph.passes]\nAcmeFold = acme_passes:AcmeFold\nAcmeGone = acme_gone:AcmeGone\n"
    (package / "entry_points.txt").write_text(points)
    code = """
from dataclasses import dataclass
from sdgraph import Pass

@dataclass(frozen=True)
class AcmeFold(Pass):
    depth: int = 1
"""
    (tmp_path / "acme_passes.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert str(parse("AcmeFold(3)")[0]) == "AcmeFold(3)"
    assert "AcmeGone (acme_gone:AcmeGone) cannot be loaded" in caplog.text
    with pytest.raises(SpecError, match="did you mean 'AcmeFold'"):
        parse("AcmeFolt(3)")


def test_our_passes_come_in_as_a_third_party_s_do() -> None:
    found = {point.name: point.load() for point in entry_points(group="sdgraph.passes")}
    assert found["CleanUp"] is CleanUp
    assert found["PruneBlocks"] is PruneBlocks


def test_suggestions_are_of_the_kind_that_is_wanted() -> None:
    with pytest.raises(SpecError, match="known: ") as caught:
        parse("zzz")
    names = caught.value.hint.removeprefix("known: ").split(", ")
    assert {"CleanUp", "InheritFeatures", "Tile"} <= set(names)
    assert not {"Pass", "Chain", "Fixpoint", "Rewrite", "Uniform", "Window", "Schedule"} & set(names)
    assert {"Uniform", "Range"} <= set(known(Schedule))
    assert not {"CleanUp", "Schedule"} & set(known(Schedule))
    with pytest.raises(SpecError, match="no schedule named 'zzz'") as caught:
        parse("Tile(schedule=zzz)")
    assert "Uniform" in caught.value.hint
    assert "CleanUp" not in caught.value.hint


def test_numbers_that_are_no_literals() -> None:
    inside = Range(float("-inf"), 5)
    assert str(inside) == "Range(-inf, high=5)"
    assert read(str(inside), Schedule) == inside
    assert parse("Tile(rate=inf)") == (Tile(rate=float("inf")),)
    (one,) = parse(str(Tile(rate=float("nan"))))
    assert isinstance(one, Tile)
    assert one.rate != one.rate


def test_known_names_search_the_installed_packages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, because a package that takes the name of another class is refused."""
    scans, search = [], importlib.metadata.entry_points

    def count(**options: str) -> Any:
        scans.append(options)
        return search(**options)

    monkeypatch.setattr("importlib.metadata.entry_points", count)
    _declared.cache_clear()
    assert parse("CleanUp, Tile(Window(3))") == (CleanUp(), Tile(Window(3)))

    @dataclass(frozen=True)
    class DefinedLater(Tile):
        """As in a notebook."""

    assert parse("DefinedLater(Window(3))") == (DefinedLater(Window(3)),)
    assert len(scans) == 1


def test_specs_within_specs() -> None:
    one = Tile(Window(4), schedule=Uniform(3))
    assert set(one.specs()) == {one, Window(4), Uniform(3)}
    assert CleanUp().passes[0] in set(CleanUp().specs())


def test_a_module_of_passes_is_imported_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folds_here.py").write_text(MODULE.format("FoldHere"))
    (tmp_path / "breaks_here.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    import_module("folds_here")
    assert str(parse("FoldHere")[0]) == "FoldHere()"
    with pytest.raises(SpecError, match="cannot import nowhere_here: ModuleNotFoundError"):
        import_module("nowhere_here")
    with pytest.raises(SpecError, match="ZeroDivisionError"):
        import_module("breaks_here")


@pytest.mark.slow
def test_the_command_line_imports_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folds_there.py").write_text(MODULE.format("FoldThere"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    export = ["export", str(MODEL), "--passes", "FoldThere", "--out", "bundle"]
    assert main(export) != 0
    assert "no pass named 'FoldThere'" in capsys.readouterr().err
    assert main([*export, "--import", "folds_there"]) != 0
    assert "FoldThere.run" in capsys.readouterr().err  # found, and run
    assert main([*export, "--import", "folds_nowhere"]) != 0
    assert "cannot import folds_nowhere" in capsys.readouterr().err


@dataclass(frozen=True)
class Holds(Pass):
    """A pass with an option of any kind."""

    option: Any = None


@pytest.mark.parametrize("option", [None, 3, 0.5, "a", (1, (2, "b")), {"a": (1, None)}, Uniform(3), (Uniform(2),)])
def test_an_option_that_has_a_text_is_accepted(option: Any) -> None:
    assert parse(str(Holds(option))) == (Holds(option),)


@pytest.mark.parametrize(
    "option", [len, object(), ({"a": [print]},), range(3), Path("x")], ids=lambda o: type(o).__name__
)
def test_an_option_that_cannot_be_saved_is_refused_when_the_pass_is_made(option: Any) -> None:
    with pytest.raises(SpecError, match=r"option is .*, which has no text(.*\n)*.*Holds"):
        Holds(option)
