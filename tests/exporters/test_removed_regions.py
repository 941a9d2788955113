"""A region that is removed from an exported graph is gone as if the pruned UNet had been exported."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir
import pytest
import torch

import sdgraph
from sdgraph.exporters import onnx
from sdgraph.exporters.onnx import removed_regions
from sdgraph.exporters.onnx.removed_regions import RemovedRegions
from sdgraph.redundancy.analysis import _removable

from ..models import ONE_LEVEL, build

LEVELS = ("block", "layer", "unit")


@pytest.mark.long
@pytest.mark.law("An exported UNet without a region computes what the pruned UNet computes, within rounding.")
def test_every_region_of_an_export_is_removed_as_by_prune_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = sdgraph.apply(build(**ONE_LEVEL))
    flat = unet.random_inputs({"B": 2, "H": 8, "W": 12, "L": 5})
    paths = list(_removable(unet.graph, LEVELS)[0])
    left: dict[str, Counter[str]] = {}
    remove = removed_regions.remove

    def counted(model: onnx_ir.Model, stand_ins: list[tuple[str, str]]) -> None:
        remove(model, stand_ins)
        left[path] = Counter(node.op_type for node in model.graph)

    monkeypatch.setattr(removed_regions, "remove", counted)
    with RemovedRegions(unet, "CPUExecutionProvider").exported(paths, flat) as models, torch.no_grad():
        torch.testing.assert_close(models.run_without()(), unet.run(flat), atol=1e-4, rtol=1e-4)
        for path in paths:
            pruned = sdgraph.apply(unet, f"PruneBlocks({path!r})", verify=False)
            torch.testing.assert_close(models.run_without(path)(), pruned.run(flat), atol=1e-4, rtol=1e-4)
    last = sdgraph.apply(unet, f"PruneBlocks({paths[-1]!r})", verify=False)
    onnx.export(last, tmp_path / "bundle", progress=False)
    exported = Counter(node.op_type for node in onnx_ir.load(tmp_path / "bundle" / "model.onnx").graph)
    heavy = ("Conv", "MatMul", "Gemm", "Softmax", "LayerNormalization", "InstanceNormalization")
    assert {op: left[paths[-1]][op] for op in heavy} == {op: exported[op] for op in heavy}
