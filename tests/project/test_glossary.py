"""The glossary: each word has one sentence, and links to the one class or function that stands for it."""

import ast
import re

import pytest

from ..documents import ROOT

PAGE = ROOT / "docs/glossary.md"
ROWS = re.findall(r"^\| ([a-z ]+) \| (.+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)[1:]
WORDS = (
    "site, call, generation, sampling run, position, plan, computed, reused, bypassed, variant, feature cache, "
    "generation tracker, backend, schedule, forecast, contract, region, guard, bundle, teacher, student"
)


def test_the_glossary_has_every_word_once() -> None:
    words = [word for word, _, _ in ROWS]
    assert len(words) == len(set(words))
    assert set(WORDS.split(", ")) <= set(words)


@pytest.mark.parametrize(("word", "meaning", "link"), ROWS, ids=[word for word, _, _ in ROWS])
def test_a_word_has_one_sentence_and_one_class_or_function(word: str, meaning: str, link: str) -> None:
    assert word in meaning.lower()
    assert re.fullmatch(r"[A-Z][^.]*\.", meaning)
    found = re.fullmatch(r"\[`(\w+)`\]\(\.\./(\S+)\)", link)
    assert found is not None
    module = ast.parse((ROOT / found[2]).read_text())
    names = [n.name for n in module.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assert names.count(found[1]) == 1


def test_the_readme_links_to_the_glossary() -> None:
    assert "docs/glossary.md" in (ROOT / "README.md").read_text()
