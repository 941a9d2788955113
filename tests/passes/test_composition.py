"""Passes compose: in every legal order with the same result; the others are refused with the reason."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import pytest
import torch

import sdgraph
from sdgraph import Graph, GraphUNet, Pass
from sdgraph.errors import SdgraphError
from sdgraph.passes import (
    Assemble,
    CleanUp,
    GRIAttention,
    HoistInvariants,
    InheritFeatures,
    MECondConv,
    Overparameterize,
    PruneBlocks,
    ShareWeights,
)
from sdgraph.schedules import Uniform

from ..models import build, call_of

PASSES: dict[str, Pass] = {
    "prune": PruneBlocks("bk-sdm-base"),
    "clean": CleanUp(),
    "experts": MECondConv("up_blocks.1.resnets.0.conv2", donors="copies"),
    "light experts": MECondConv("up_blocks.2.resnets.0.conv2", donors="copies", rank=2),
    "product": Overparameterize("down_blocks.*.resnets.0.conv1"),
    "branches": Overparameterize("**.attn2.to_v", kind="branches"),
    "share": ShareWeights((("up_blocks.0.resnets.0", "up_blocks.0.resnets.2"),)),
    "gri": GRIAttention(4, pool=2),
    "inherit": InheritFeatures("up_blocks.3.attentions.0", Uniform(2)),
    "hoist": HoistInvariants(),
}
COMMON = {"prune", "inherit"}  # pairs of others are tested with the long tests
ILLEGAL = {
    ("hoist", "prune"): "has the site",
}


def generation(unet: GraphUNet) -> list[torch.Tensor]:
    call = call_of(unet, H=16, W=16)
    with torch.no_grad():
        return [unet(**{**call, "timestep": t})[0] for t in (900, 600, 300)]


@pytest.fixture(scope="module")
def source() -> Graph:
    """The graph of a UNet with a place for each pass. Leave it as it is; passes do."""
    return sdgraph.trace(build("sd15-levels", sample_size=16))


@pytest.mark.law("Two passes compose in both orders, or one order is refused.")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [pytest.param(*pair, marks=() if COMMON & {*pair} else pytest.mark.long) for pair in combinations(PASSES, 2)],
)
def test_two_passes_in_both_orders(source: Graph, one: str, other: str) -> None:
    results = []
    for order in ((one, other), (other, one)):
        chain = [PASSES[name] for name in order]
        if order in ILLEGAL:
            with pytest.raises(SdgraphError, match=ILLEGAL[order]):
                sdgraph.apply(source, chain)
        else:
            results.append(generation(sdgraph.apply(source, chain, verify=False)))
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", PASSES)
def test_regions_that_any_pass_changed_are_assembled(source: Graph, name: str, tmp_path: Path) -> None:
    other = sdgraph.apply(build("sd15-levels", sample_size=16, seed=1), PASSES[name], verify=False)
    other.save_pretrained(tmp_path / "other")
    regions = ("conv_in", "time_embedding", "down_blocks.*", "mid_block", "up_blocks.*", "conv_norm_out", "conv_out")
    assembled = sdgraph.apply(source, [PASSES[name], Assemble(regions, str(tmp_path / "other"))], verify=False)
    assembled.save_pretrained(tmp_path / "assembled")
    for unet in (assembled, GraphUNet.from_pretrained(tmp_path / "assembled")):
        for found, expected in zip(generation(unet), generation(other), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.long
def test_all_passes_in_some_orders(source: Graph) -> None:
    draw = random.Random(0)
    orders = [draw.sample(list(PASSES), len(PASSES)) for _ in range(20)]
    legal = [order for order in orders if order.index("prune") < order.index("hoist")][:6]
    results = [generation(sdgraph.apply(source, [PASSES[n] for n in order], verify=False)) for order in legal]
    assert len(results) == 6
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
