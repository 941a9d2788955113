"""A replay gives the bits of the whole call, and computes only what comes after the removed region."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sdgraph
from sdgraph.redundancy.analysis import _removable
from sdgraph.redundancy.replay import Replay

from ..models import call_of

LEVELS = ("block", "layer", "unit")
PLENTY = 2**30


def replay(unet: sdgraph.GraphUNet, limit: int) -> Replay:
    calls = [unet.random_inputs({"B": 2, "H": 8, "W": 12, "L": 5}) for _ in range(2)]
    calls[1]["timestep"] = calls[1]["timestep"] // 2
    return Replay(unet, calls, list(_removable(unet.graph, LEVELS)[0]), limit)


@pytest.mark.law("The output of a call without a region has the same bits, whatever values of the whole UNet are kept.")
@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_replay_has_the_bits_of_the_whole_call(
    name: str, traced: Callable[[str], tuple[Any, sdgraph.GraphUNet]]
) -> None:
    whole = traced(name)[1]
    ways = [replay(whole, limit) for limit in (0, 60_000, PLENTY)]
    blocks = list(_removable(whole.graph, ("block", "unit"))[0])
    chosen = [*blocks[::4], blocks[-1]]
    couple = next((a, b) for a, b in itertools.pairwise(blocks) if not b.startswith(f"{a}."))
    for removed in [*((path,) for path in chosen), couple]:
        without = sdgraph.apply(whole, f"PruneBlocks({removed!r})", verify=False)
        with torch.no_grad():
            expected = [without.run(flat) for flat in ways[0].calls]
        for way in ways:
            assert all(map(torch.equal, way.run(without), expected)), removed


def operations(module: torch.fx.GraphModule) -> int:
    return sum(node.op.startswith("call_") for node in module.graph.nodes)


def test_a_late_region_costs_little(traced: Callable[[str], tuple[Any, sdgraph.GraphUNet]]) -> None:
    whole = traced("sd15")[1]
    everything = sum(node.op.startswith("call_") for node in whole.graph.fx.nodes)
    late = sdgraph.apply(whole, "PruneBlocks('up_blocks.1.attentions.1')", verify=False)
    early = sdgraph.apply(whole, "PruneBlocks('down_blocks.0.attentions.0')", verify=False)
    assert operations(replay(whole, PLENTY).rest(late.graph)[0]) < 0.05 * everything
    assert operations(replay(whole, PLENTY).rest(early.graph)[0]) < everything
    assert operations(replay(whole, 0).rest(late.graph)[0]) > 0.5 * everything


def test_kept_values_fit_into_the_limit(traced: Callable[[str], tuple[Any, sdgraph.GraphUNet]]) -> None:
    whole = traced("sd15")[1]
    for limit in (0, 5_000, 60_000):
        kept = [values or {} for values in replay(whole, limit)._recorded[1]]
        assert sum(value.nbytes for values in kept for value in values.values()) <= limit
        assert bool(kept[0]) == bool(limit)


def test_calls_with_residuals_of_a_control_net_are_replayed(
    traced: Callable[[str], tuple[Any, sdgraph.GraphUNet]],
) -> None:
    source, whole = traced("sd15")
    calls: list[Any] = []

    class Recorder(sdgraph.GraphUNet):
        def run(self, flat: Any) -> torch.Tensor:
            calls.append(dict(flat))
            return super().run(flat)

    skips = ((16, 8, 12), (16, 8, 12), (16, 4, 6), (32, 4, 6))
    residuals = tuple(torch.randn(2, *shape) for shape in skips)
    recorder = Recorder(whole.graph.copy())
    with torch.no_grad():
        recorder(
            **call_of(source),
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=torch.randn(2, 32, 4, 6),
        )
        recorder(**call_of(source))  # as after the last call that a ControlNet guides
    kept = Replay(whole, calls, ["mid_block"], PLENTY)
    without = sdgraph.apply(whole, "PruneBlocks('mid_block')", verify=False)
    with torch.no_grad():
        for output, flat in zip(kept.run(without), calls, strict=True):
            assert torch.equal(output, without.run(flat))
