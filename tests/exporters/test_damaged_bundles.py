"""Damaged and forged bundles are refused before anything runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from sdgraph import errors
from sdgraph.exporters.bundle import manifest_file
from sdgraph.exporters.ort.providers import CPU
from sdgraph.exporters.ort.unet import ORTUNet

from .exports import Exported

pytestmark = pytest.mark.slow


@pytest.fixture
def damaged(exported: Callable[..., Exported], tmp_path: Path) -> Path:
    """A copy of an export, to damage."""
    return shutil.copytree(exported("sd15").directory, tmp_path / "copy")


def truncate(path: Path, share: float = 0.5) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])


def edit(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def edit_manifest(directory: Path, signed: bool = True, **changes: Any) -> None:
    """Change the manifest; with a hash that fits, as somebody who means harm would."""
    path = directory / "sdgraph.json"
    said = json.loads(path.read_text()) | changes
    if signed:
        said.pop("sha256")
        said["sha256"] = manifest_file.digest(said)
    path.write_text(json.dumps(said))


def edit_model(directory: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change the model, and the manifest's hash of it."""
    edit(directory / "model.onnx", change)
    manifest_file.write_manifest(manifest_file.read_manifest(directory), directory)


def set_place(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == key).value = value

    return change


def external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.external_data)


def set_dims(*dims: int) -> Callable[[onnx.ModelProto], None]:
    return lambda model: external(model).dims.__setitem__(slice(None), dims)


def set_kind(kind: int) -> Callable[[onnx.ModelProto], None]:
    return lambda model: setattr(external(model), "data_type", kind)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def forge(directory: Path, value: Any, *place: Any) -> None:
    """Put a value into the manifest, with a hash that fits."""
    said = json.loads((directory / "sdgraph.json").read_text())
    inner = said
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    edit_manifest(directory, **said)


def drop(directory: Path, field: str, name: str) -> None:
    said = json.loads((directory / "sdgraph.json").read_text())
    del said[field][name]
    edit_manifest(directory, **said)


def edit_config(directory: Path, **changes: Any) -> None:
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    forge(directory, hashlib.sha256(config.read_bytes()).hexdigest(), "files", "config.json")


def link(path: Path) -> None:
    """Move a file out of the folder, and link to it."""
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DATA = "model.onnx.data"

DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "no config": ("config.json cannot be read", lambda d: (d / "config.json").unlink()),
    "config no JSON": ("config.json is not JSON", lambda d: (d / "config.json").write_text("{")),
    "another config": ("config.json is not the file", lambda d: (d / "config.json").write_text('{"in_channels": 9}')),
    "no model": ("model.onnx is missing", lambda d: (d / "model.onnx").unlink()),
    "model cut": ("model.onnx is not the file", lambda d: truncate(d / "model.onnx")),
    "no weights": ("model.onnx.data is missing", lambda d: (d / "model.onnx.data").unlink()),
    "weights cut": ("model.onnx.data is not the file", lambda d: truncate(d / "model.onnx.data", 0.9)),
    "other weights": ("model.onnx.data is not the file", lambda d: flip(d / "model.onnx.data")),
    "no manifest": ("sdgraph.json cannot be read", lambda d: (d / "sdgraph.json").unlink()),
    "a strategy that is none": ("'import os' is no strategy", lambda d: forge(d, "import os", "quantization")),
    "manifest cut": ("sdgraph.json is not JSON", lambda d: truncate(d / "sdgraph.json")),
    "a recipe": ("not that of an export", lambda d: (d / "sdgraph.json").write_text('{"format": 1, "passes": []}')),
    "manifest edited": ("was edited", lambda d: edit_manifest(d, signed=False, opset=19)),
    "newer": ("format 4.*up to 1", lambda d: edit_manifest(d, format=4)),
    "bad inputs": ("is damaged", lambda d: edit_manifest(d, inputs=[{"name": "sample"}])),
    "code": (
        "is damaged",
        lambda d: edit_manifest(d, guards=[{"condition": "().__class__", "outcome": True, "where": ""}]),
    ),
    "a path": (r"is damaged.*variants\[0\]\.file", lambda d: edit_manifest(d, variants=[{"file": "../model.onnx"}])),
    "another file": ("no file name of a model", lambda d: forge(d, "passwd", "variants", 0, "file")),
    "files null": ("files: expected `object`, got `null`", lambda d: forge(d, None, "files")),
    "files a list": ("files: expected `object`, got `array`", lambda d: forge(d, ["model.onnx"], "files")),
    "a size beyond all": ("is no size", lambda d: forge(d, "H*999999999*999999999", "inputs", 0, "shape", 2)),
    "a large size": ("is no size", lambda d: forge(d, "H*999999999", "output", 2)),
    "a shift": ("is no size", lambda d: forge(d, "1<<999999999", "output", 2)),
    "no size at all": ("is no size", lambda d: forge(d, -1, "output", 1)),
    "format true": ("format: expected `int`, got `bool`", lambda d: forge(d, True, "format")),
    "format -1": ("format: expected `int` >= 1", lambda d: forge(d, -1, "format")),
    "macs a text": (r"variants\[0\]\.macs: expected `int`", lambda d: forge(d, "x", "variants", 0, "macs")),
    "weights without a hash": ("files: there is no hash of model.onnx.data", lambda d: drop(d, "files", DATA)),
    "config without a hash": ("files: there is no hash of config.json", lambda d: drop(d, "files", "config.json")),
    "other weights without a hash": ("x.data has no hash", lambda d: edit_model(d, set_place("location", "x.data"))),
    "in_channels": ("in_channels: expected `int`, got `str`", lambda d: edit_config(d, in_channels="x")),
    "many layers": ("layers_per_block: expected `int` <= 1000", lambda d: edit_config(d, layers_per_block=10**9)),
    "sample_size": ("sample_size: expected `array` of length >= 2", lambda d: edit_config(d, sample_size=[64])),
    "a graph elsewhere": ("model.onnx is a link out of its folder", lambda d: link(d / "model.onnx")),
    "data elsewhere": ("model.onnx.data is a link out of its folder", lambda d: link(d / DATA)),
    "a manifest elsewhere": ("sdgraph.json is a link out of its folder", lambda d: link(d / "sdgraph.json")),
    "another width": ("inputs are not those", lambda d: forge(d, 5, "inputs", 0, "shape", 1)),
    "a schedule": (
        "is damaged",
        lambda d: edit_manifest(d, values=[{"site": "x", "schedule": "open('x')", "forecast": 0, "shape": [1]}]),
    ),
    "a pass for a schedule": (
        "is damaged.*no schedule",
        lambda d: edit_manifest(d, values=[{"site": "x", "schedule": "CleanUp()", "forecast": 0, "shape": [1]}]),
    ),
    "no variants": ("is damaged", lambda d: edit_manifest(d, variants=[])),
    "other inputs": ("inputs are not those", lambda d: edit_manifest(d, given=["sample"])),
    "weights elsewhere": ("outside of the directory", lambda d: edit_model(d, set_place("location", "../x.data"))),
    "weights from the root": (
        "outside of the directory",
        lambda d: edit_model(d, set_place("location", "/etc/passwd")),
    ),
    "weights beyond the end": ("truncated", lambda d: edit_model(d, set_place("offset", str(1 << 40)))),
    "weights of another place": ("is damaged", lambda d: edit_model(d, set_place("offset", "-64"))),
    "more weights than there are": ("truncated", lambda d: edit_model(d, set_dims(1 << 40, 4))),
    "weights of no kind": ("is damaged", lambda d: edit_model(d, set_kind(99))),
    "no operator": (
        "ONNX Runtime refuses",
        lambda d: edit_model(d, lambda model: setattr(model.graph.node[5], "op_type", "Nothing")),
    ),
}


def refused(damaged: Path, name: str, provider: str) -> None:
    message, damage = DAMAGE[name]
    damage(damaged)
    with pytest.raises(errors.SavedError, match=f"(?s){message}") as caught:
        ORTUNet.from_pretrained(damaged, provider=provider)
    assert caught.value.hint
    assert caught.value.where


@pytest.mark.law("Damaged bundles are refused before anything runs.")
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_before_anything_runs(damaged: Path, name: str) -> None:
    refused(damaged, name, CPU)


@pytest.mark.parametrize("name", ["weights cut", "weights elsewhere", "another width", "no operator"])
def test_damaged_files_are_refused_on_every_provider(damaged: Path, provider: str, name: str) -> None:
    refused(damaged, name, provider)


def test_a_missing_directory_is_a_saved_error(tmp_path: Path) -> None:
    with pytest.raises(errors.SavedError, match="there is no folder"):
        ORTUNet.from_pretrained(tmp_path / "nothing")
