"""The files, the manifest and the report of an export, all of them or none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import sdgraph
from sdgraph import errors
from sdgraph.exporters.bundle import inspect
from sdgraph.exporters.bundle.describe import describe
from sdgraph.exporters.onnx import export, exporter
from sdgraph.inheritance.cache import always
from sdgraph.inheritance.plan import Plan
from sdgraph.schedules import SamplingRun

from ..models import CROSS
from .exports import Exported, inheriting

pytestmark = pytest.mark.slow


def test_files_hold_the_weights_once_under_their_names(exported: Callable[..., Exported]) -> None:
    made = exported("pruned")
    names = {path.name for path in made.directory.iterdir()}
    assert names == {"config.json", "model.onnx", "model.onnx.data", "sdgraph.json", "export.json"}
    model = onnx.load(made.directory / "model.onnx", load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, parameter in made.unet.named_parameters():
        found = [n for n in stored if n == name or n.startswith(f"{name}.")]
        assert len(found) == 1, name
        assert torch.Size(stored[found[0]].dims).numel() == parameter.numel()
    size = sum(p.numel() * p.element_size() for p in made.unet.parameters())
    assert sum((made.directory / name).stat().st_size for name in names - {"export.json"}) == made.report.file_bytes
    # Constants of the graph are a fixed cost: 2 % of a real UNet's weights is many megabytes.
    assert (made.directory / "model.onnx.data").stat().st_size <= 1.02 * size
    assert "/" + str(Path(torch.__file__).parent) not in (made.directory / "model.onnx").read_text(errors="ignore")


def test_manifest_and_report(exported: Callable[..., Exported]) -> None:
    made = exported("pruned")
    loaded = made.load()
    said = json.loads((made.directory / "sdgraph.json").read_text())
    assert said["version"] == sdgraph.__version__
    assert said["recipe"] == [str(p) for p in made.unet.graph.passes] != []
    assert (said["opset"], said["dtype"], said["format"]) == (20, "float32", 1)
    assert said["given"] == ["sample", "timestep", "encoder_hidden_states"]
    assert [each["file"] for each in said["variants"]] == ["model.onnx"]
    for name in ("config.json", "model.onnx", "model.onnx.data"):
        assert said["files"][name] == hashlib.sha256((made.directory / name).read_bytes()).hexdigest()
    session = loaded.backend.session(loaded.manifest.variants[0])
    assert [each.shape for each in session.get_inputs()] == [
        ["batch", 4, "height", "width"],
        ["timestep_batch"],
        ["batch", "sequence", CROSS],
    ]
    report = json.loads((made.directory / "export.json").read_text())
    assert made.report.as_dict() | {"format": 1, "comparisons": None} == report | {"comparisons": None}
    assert len(made.report.comparisons) == 2
    assert all(c.holds for c in made.report.comparisons)
    assert "difference" in str(made.report)
    assert "3x4x16x24" in str(made.report)


@pytest.mark.law("An export whose outputs are out of bounds writes nothing.")
def test_out_of_bounds_leaves_nothing(exported: Callable[..., Exported], tmp_path: Path) -> None:
    with pytest.raises(errors.ParityError, match="OUT OF BOUNDS") as caught:
        export(exported("sd15").unet, tmp_path / "deep" / "out", atol=0.0, rtol=0.0, progress=False)
    assert "sample" in caught.value.where
    assert list(tmp_path.iterdir()) == []


@pytest.mark.law("An export that fails leaves the existing directory.")
def test_an_existing_directory_survives_a_failure(
    exported: Callable[..., Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, target = exported("sd15").unet, tmp_path / "out"
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(errors.ExportError, match="directory exists"):
        export(unet, target)
    with pytest.raises(errors.ExportError, match="not an earlier export"):
        export(unet, target, overwrite=True)
    (target / "sdgraph.json").touch()

    def fail(*args: Any) -> Any:
        raise errors.ExportError("no")

    monkeypatch.setattr(exporter, "_export", fail)
    with pytest.raises(errors.ExportError, match="no"):
        export(unet, target, overwrite=True)
    assert {path.name for path in target.iterdir()} == {"mine", "sdgraph.json"}
    (report,) = [exported("sd15").report]
    monkeypatch.setattr(exporter, "_export", lambda *args: report)
    export(unet, target, overwrite=True)
    assert {path.name for path in target.iterdir()} == {"export.json"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["deep cache", "plan", "drift", "attention broadcast"])
def test_a_description_tells_of_calls_what_a_timetable_does(name: str) -> None:
    """Of exported graphs, `sdgraph inspect` says which serve which calls, without the UNet."""
    unet = inheriting(name)
    manifest = describe(unet, frozenset(), "portable", "variants", 20, 9)
    table, plan = unet.graph.timetable(9), Plan.of(SamplingRun(9), always(inspect.BundleCosts(manifest)))
    for call, possible in enumerate(plan.calls):
        served = {manifest.variant_for(reused)[0].macs for reused in possible}
        assert served == {v.macs for v in table.variants if call in v.calls}
    assert (plan.least, plan.most) == (table.least_macs, table.macs)
