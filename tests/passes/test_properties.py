"""Any list of passes on any tiny architecture: a working UNet, or an error of ours; never a changed source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

import sdgraph
from sdgraph import Graph, GraphUNet
from sdgraph.compiler.runner import run_pass
from sdgraph.errors import SdgraphError
from sdgraph.passes import CleanUp, PruneBlocks

from ..models import answer, call_of

NAMES = ("sd15", "sdxl", "upscaler", "no-mid")


def digest(unet: UNet2DConditionModel) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in unet.parameters())).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_prune_works_or_is_refused(
    name: str, traced: Callable[[str], tuple[UNet2DConditionModel, GraphUNet]]
) -> None:
    unet, whole = traced(name)
    before = digest(unet)
    paths = [p for p in whole.graph.paths() if p.startswith(("down_blocks", "mid_block", "up_blocks"))]
    worked: list[Graph] = []

    @settings(max_examples=12)
    @given(st.lists(st.sampled_from(paths), min_size=1, max_size=4, unique=True), st.sampled_from((-1, 0, 1)))
    def check(chosen: list[str], clean: int) -> None:
        graph = whole.graph
        passes = [PruneBlocks(tuple(chosen))]
        if clean >= 0:
            passes.insert(clean, CleanUp())  # type: ignore[arg-type]
        try:
            for one in passes:
                graph, report = run_pass(one, graph, verify=False)
                assert report.after.parameters == sum(p.numel() for p in graph.parameters().values())
        except SdgraphError:
            return
        worked.append(graph)
        pruned = GraphUNet(graph.copy())
        assert not set(chosen) & {p for p in graph.paths() if "resnets" not in p}
        for sizes in ({"B": 2}, {"B": 1, "H": 5, "W": 11, "L": 2}):
            call = call_of(unet, **sizes)
            out = answer(pruned, call)
            assert out.shape == call["sample"][:, : unet.config.out_channels].shape
            assert out.isfinite().all()

    check()
    assert worked, "every prune was refused"
    assert digest(unet) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_clean_up_commutes_with_pruning(
    name: str, traced: Callable[[str], tuple[UNet2DConditionModel, GraphUNet]]
) -> None:
    unet, whole = traced(name)
    prune = PruneBlocks("*_blocks.*.attentions.*")
    one = sdgraph.apply(whole, [CleanUp(), prune], verify=False)
    two = sdgraph.apply(whole, [prune, CleanUp()], verify=False)
    only = sdgraph.apply(whole, [prune], verify=False)
    call = call_of(unet)
    assert torch.equal(answer(one, call), answer(only, call))
    assert torch.equal(answer(two, call), answer(only, call))
    assert len(one.graph.nodes) == len(two.graph.nodes)
