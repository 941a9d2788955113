"""Damaged folders are refused before anything runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS

from sdgraph import GraphUNet
from sdgraph.errors import SavedError


def recipe(folder: Path, **changes: Any) -> None:
    file = folder / "sdgraph.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop(folder: Path, field: str) -> None:
    file = folder / "sdgraph.json"
    said = json.loads(file.read_text())
    del said[field]
    file.write_text(json.dumps(said))


def config(folder: Path, **changes: Any) -> None:
    """Change the configuration, and the recipe's hash of it, as somebody who means harm would."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    files = json.loads((folder / "sdgraph.json").read_text())["files"]
    recipe(folder, files=files | {"config.json": hashlib.sha256(file.read_bytes()).hexdigest()})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.law("Damaged files are refused before anything runs.")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: truncate(f / WEIGHTS), "not the one that was saved"),
        (lambda f: flip(f / WEIGHTS), "not the one that was saved"),
        (lambda f: flip(f / "config.json"), "not the one that was saved"),
        (lambda f: (f / WEIGHTS).unlink(), "the file is missing"),
        (lambda f: (f / "config.json").unlink(), "the file is missing"),
        (lambda f: (f / "sdgraph.json").unlink(), "is a UNet of diffusers, not a UNet that sdgraph saved"),
        (lambda f: truncate(f / "sdgraph.json"), "is not JSON"),
        (lambda f: (f / "sdgraph.json").write_text("[]"), "not a JSON object"),
        (lambda f: recipe(f, weights="../../etc/passwd"), "weights: a name of another form"),
        (lambda f: recipe(f, weights="/etc/passwd"), "weights: a name of another form"),
        (lambda f: recipe(f, weights=".."), "weights: a name of another form"),
        (lambda f: recipe(f, files={"../x": "0" * 64}), "files: a name of another form"),
        (lambda f: recipe(f, files=None), "files: expected `object`, got `null`"),
        (lambda f: recipe(f, files=[WEIGHTS]), "files: expected `object`, got `array`"),
        (lambda f: recipe(f, format=True), "format: expected `int`, got `bool`"),
        (lambda f: recipe(f, format=-1), "format: expected `int` >= 1"),
        (lambda f: recipe(f, variants=[]) or drop(f, "passes"), "an exported directory"),
        (lambda f: drop(f, "passes"), "missing required field `passes`"),
        (lambda f: config(f, in_channels="x"), "in_channels: expected `int`, got `str`"),
        (lambda f: config(f, block_out_channels=[10**9]), "block_out_channels.*expected `int` <="),
        (lambda f: config(f, layers_per_block=10**9), "layers_per_block: expected `int` <= 1000"),
        (lambda f: recipe(f, source={"act_fn": 3}), "do not give a graph"),
        (lambda f: recipe(f, source={"in_channels": "x"}), "in_channels: expected `int`, got `str`"),
        (lambda f: recipe(f, source={}), "gives another graph|do not give a graph"),
        (lambda f: recipe(f, source=[]), "source: expected `object`, got `array`"),
        (lambda f: recipe(f, names={"conv_in.weight": "elsewhere"}), "the weights do not fit"),
        (lambda f: recipe(f, names={"conv_in.weight": "conv_out.weight"}), "the weights do not fit"),
        (lambda f: recipe(f, names={"conv_in.weight": 3}), "names.*expected `str`"),
        (lambda f: recipe(f, files={}), "no checksum of"),
        (lambda f: recipe(f, format=99), "upgrade sdgraph"),
        (lambda f: recipe(f, passes="CleanUp()"), "passes: expected `array`, got `str`"),
        (lambda f: recipe(f, passes=["Unheard()"]), "no pass named 'Unheard'"),
        (lambda f: recipe(f, passes=["CleanUp()"]), "gives another graph"),
        (lambda f: recipe(f, dtype="load"), "dtype: invalid enum value 'load'"),
    ],
)
def test_damage_is_refused(folder: Path, damage: Any, words: str) -> None:
    damage(folder)
    with pytest.raises(SavedError, match=words) as caught:
        GraphUNet.from_pretrained(folder)
    assert caught.value.where
    assert caught.value.hint


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SavedError, match="a link out of its folder"):
        GraphUNet.from_pretrained(folder)


def test_fields_of_a_newer_version_are_ignored(folder: Path) -> None:
    passes = GraphUNet.from_pretrained(folder).graph.passes
    recipe(folder, colour="green")
    assert GraphUNet.from_pretrained(folder).graph.passes == passes
