"""Passes as text: printed, parsed back, misspelt."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdgraph import Graph, Pass, Spec, parse
from sdgraph.errors import SpecError
from sdgraph.passes import CleanUp, InheritFeatures, PruneBlocks


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
        st.floats(allow_nan=False, allow_infinity=False),
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
        ("PruneBlocks(open('x'))", "no pass named 'open'"),
        ("PruneBlocks(1 + x)", "neither a literal nor a call"),
        ("__import__('os').system('true')", "neither a literal nor a call"),
        ("[].append", "neither a literal nor a call"),
        ("'CleanUp'", "is not a pass"),
        ("Window(3)", "is not a pass"),
        ("Tile(1, 2, 3, 4, 5)", "cannot construct Tile"),
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
