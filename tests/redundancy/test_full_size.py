"""An analysis of Stable Diffusion 1.5 with random weights, for a few regions."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph.redundancy import analysis

from ..frontend.test_full_size import SD15

PATHS = ("mid_block", "up_blocks.3.resnets.2", "down_blocks.0.resnets.1")


@pytest.mark.full
def test_sizes_and_output_errors_of_stable_diffusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "LEVEL", {"layer": re.compile("|".join(map(re.escape, PATHS)))})
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD15).eval()
    found = sdgraph.analyse_unet(unet, levels=("layer",), calls=2)
    assert {one.path for one in found.removals} == set(PATHS)
    assert found.target is None
    whole = sdgraph.trace(unet)
    for one in found.removals:
        assert len(one.errors) == 2
        assert found.error(one) > 0
        pruned = sdgraph.apply(whole, f"PruneBlocks({one.path!r})", verify=False).graph
        assert one.macs == pytest.approx(1 - pruned.macs / whole.macs)
    by_path = {one.path: one for one in found.removals}
    assert by_path["mid_block"].parameters == pytest.approx(0.1128, abs=0.002)  # 97 of 860 million
    assert by_path["up_blocks.3.resnets.2"].parameters < 0.01
