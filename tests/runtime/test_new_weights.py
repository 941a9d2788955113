"""Weights that passes make of the old ones come back from a saved folder."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import sdgraph
from sdgraph import Chain, Graph, GraphUNet, Pass
from sdgraph.errors import (
    ModeError,
    SavedError,
)

from ..models import answer, call_of


@dataclass(frozen=True)
class LowRank(Pass):
    """Weights by SVD, cat and mul, in a new module, as parameters, and by `copy_`."""

    rank: int = 4

    def run(self, graph: Graph) -> None:
        path = "mid_block.attentions.0.proj_in"
        old = graph.module(path)
        weight = old.weight.detach().flatten(1)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        new = nn.Sequential(
            nn.Conv2d(weight.shape[1], self.rank, 1, bias=False, device=weight.device, dtype=weight.dtype),
            nn.Conv2d(self.rank, weight.shape[0], 1, device=weight.device, dtype=weight.dtype),
        )
        with torch.no_grad():
            new[0].weight.copy_(v[: self.rank, :, None, None])
            new[1].weight.copy_((u * s)[:, : self.rank, None, None])
            new[1].bias = nn.Parameter(torch.cat([old.bias[:1], old.bias[1:].mul(1)]))
        graph.replace(path, new)
        gain = graph.add_parameter("conv_out.gain", graph.tensor("conv_norm_out.weight").mean().reshape(1))
        graph.insert_after(graph.output, lambda x, g: x * g, gain)


@dataclass(frozen=True)
class HalveLast(Pass):
    """Only the numbers of the last weights change."""

    def run(self, graph: Graph) -> None:
        new = copy.deepcopy(graph.module("conv_out"))
        new.weight = nn.Parameter(new.weight / 2)
        graph.add_module("conv_out", new)


@dataclass(frozen=True)
class MakesOnCpu(Pass):
    def run(self, graph: Graph) -> None:
        old = graph.module("conv_out")
        new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)
        with torch.no_grad():
            new.weight.copy_(old.weight / 2)
        graph.replace("conv_out", new)


@pytest.mark.slow
@pytest.mark.parametrize("one", [LowRank(), HalveLast(), Chain((HalveLast(), LowRank()))])
def test_weights_made_of_weights_come_back(unet: UNet2DConditionModel, one: Pass, tmp_path: Path) -> None:
    made = sdgraph.apply(unet, [one])
    assert made.report.passes[0].difference > 0
    made.save_pretrained(tmp_path / "unet")
    call = call_of(unet)
    assert torch.equal(answer(GraphUNet.from_pretrained(tmp_path / "unet"), call), answer(made, call))


@pytest.mark.slow
def test_weights_copied_into_modules_on_another_device_are_named_when_saving(
    unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    with pytest.raises(ModeError, match=r"device=weight\.device") as caught:
        sdgraph.apply(unet, [MakesOnCpu()]).save_pretrained(tmp_path / "unet")
    assert "test_new_weights.py:" in caught.value.where


@pytest.mark.slow
def test_a_pass_of_the_running_script_is_told_when_saving(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "import sdgraph, tests.models\n"
        "@dataclass(frozen=True)\n"
        "class Twice(sdgraph.Pass):\n"
        "    def run(self, graph):\n"
        "        graph.insert_after(graph.output, lambda x: x * 2)\n"
        "sdgraph.apply(tests.models.build(), [sdgraph.Chain((Twice(),))], verify=False).save_pretrained('saved')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "script.py:7: UserWarning: Twice is defined in the script that runs" in done.stderr
    with pytest.raises(SavedError, match="no pass named 'Twice'"):
        GraphUNet.from_pretrained(tmp_path / "saved")
