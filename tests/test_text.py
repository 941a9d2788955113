"""Text files: readers take UTF-8 with or without a byte-order mark, and name a file of another encoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sdgraph import errors, text
from sdgraph.cli import configuration, sources
from sdgraph.plan_search.costs import seconds_of
from sdgraph.plan_search.evaluator import Measurements
from sdgraph.tuning import train_state
from sdgraph.tuning.sources.image_folder import captioned
from sdgraph.untrusted import read_json

from .photos import write_images

MARK, NAME = "\ufeff", "ü\u2028"
CONFIG = {"pretrained_model_name_or_path": "m", "output_dir": NAME, "prompts": "p", "max_train_steps": 1}


def _toml(values: dict[str, object]) -> str:
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())


def _captions(path: Path) -> str:
    write_images(path.parent, 1)
    return captioned(path.parent)[0].caption


def _measured(path: Path) -> str:
    found = Measurements(path.parent, path.name.encode())
    written = found._path
    assert written is not None
    written.write_bytes(path.read_bytes())
    return NAME if "ü" in str(Measurements(path.parent, path.name.encode())._known) else ""


# A reader: the name of its file, a text with NAME in it, and how NAME is read.
READERS: dict[str, tuple[str, str, Callable[[Path], str]]] = {
    "captions": ("0.txt", NAME, _captions),
    "table": ("metadata.jsonl", json.dumps({"file_name": "0.png", "text": NAME}, ensure_ascii=False), _captions),
    "CSV": ("metadata.csv", f'file_name,text\n0.png,"{NAME}"', _captions),
    "prompts": ("prompts.txt", f"{NAME}x\n", lambda path: sources.read_prompts(path)[0].removesuffix("x")),
    "TOML": ("tune.toml", _toml(CONFIG), lambda path: configuration.read(path)[0].output_dir),
    "JSON": ("tune.json", json.dumps(CONFIG, ensure_ascii=False), lambda path: configuration.read(path)[0].output_dir),
    "saved": ("sdgraph.json", json.dumps({"name": NAME}, ensure_ascii=False), lambda path: read_json(path, "")["name"]),
    "checkpoint": (
        "state.json",
        json.dumps(
            {name: kind() for name, kind in train_state.RECORD.items()}
            | {"format": 1, "step": 1, "seconds": 0.5, "identity": {"name": NAME}},
            ensure_ascii=False,
        ),
        lambda path: train_state.read(path.parent)["identity"]["name"],
    ),
    "costs": (
        "times.json",
        json.dumps({"format": 1, "reused": {NAME: []}, "variants": {NAME: 2.0}}, ensure_ascii=False),
        lambda path: NAME * int(seconds_of(path)(frozenset()) == 2),
    ),
    "measurements": ("known", json.dumps({"format": 1, "numbers": {NAME: [1.0]}}, ensure_ascii=False), _measured),
}


@pytest.mark.parametrize("reader", READERS)
def test_files_are_utf8_with_or_without_a_mark(reader: str, tmp_path: Path) -> None:
    file, content, read = READERS[reader]
    expected = NAME.strip() if file == "0.txt" else NAME
    for mark in ("", MARK):
        (tmp_path / file).write_text(mark + content, encoding="utf-8", newline="")
        assert read(tmp_path / file) == expected
    for encoding in ("latin-1", "utf-16", "utf-16-le", "utf-32-be"):
        (tmp_path / file).write_bytes(content.replace("\u2028", "").encode(encoding))
        with pytest.raises(
            errors.SdgraphError,
            match=r"\.\w+ cannot be read: it is not UTF-8 at byte \d+, in line \d+(.|\n)*save it as UTF-8",
        ):
            read(tmp_path / file)


def test_lines_end_as_editors_end_them() -> None:
    assert text.lines("a\rb\r\nc\n\nd\u2028e\x0cf") == ["a", "b", "c", "", "d\u2028e\x0cf"]


def test_a_name_that_occurs_twice_is_no_json() -> None:
    with pytest.raises(ValueError, match="'a' occurs twice"):
        text.from_json('[{"a": 1, "b": 2, "a": 3}]')
