"""Masks by call: one set of weights, of which every call leaves out what its mask says."""

from __future__ import annotations

import pytest
import torch

import sdgraph
from sdgraph import MasksByCall, errors
from sdgraph.runtime.switch import tensors_of
from sdgraph.schedules import ByTimestep, SamplingRun
from sdgraph.spec import read

from ..models import ONE_LEVEL, answer, build, call_of

LIGHT = ("up_blocks.0.resnets.1",)


@pytest.fixture(scope="module")
def whole() -> sdgraph.GraphUNet:
    """A small UNet. Leave it as it is."""
    return sdgraph.apply(build(**ONE_LEVEL, layers_per_block=1), (), verify=False)


def test_a_call_leaves_out_what_its_mask_says_and_weights_are_held_once(whole: sdgraph.GraphUNet) -> None:
    masks = MasksByCall(((), LIGHT), ByTimestep(("whole", "light"), (500,)))
    assert read(str(masks), MasksByCall) == masks
    switched, call = masks.switch(whole), call_of(whole)
    pruned = sdgraph.apply(whole, f"PruneBlocks({LIGHT!r})", verify=False)
    for timestep, expected in ((900, whole), (100, pruned)):
        changed = {**call, "timestep": torch.full_like(torch.as_tensor(call["timestep"]), timestep)}
        assert torch.equal(answer(switched, changed), answer(expected, changed))
    held = {tensor.data_ptr() for _, tensor in tensors_of(switched) if tensor.numel()}
    assert len(held) == len({tensor.data_ptr() for _, tensor in tensors_of(whole) if tensor.numel()})


def test_equal_intervals_cover_all_timesteps_once() -> None:
    masks = MasksByCall.in_equal_intervals(LIGHT, (), ("mid_block",))
    names = [masks.schedule.member(0, timestep, SamplingRun()) for timestep in range(999, -1, -1)]
    assert [names.count(f"mask-{n}") for n in range(3)] == [333, 333, 334]
    assert names == sorted(names)
    assert masks.masks == {"mask-0": LIGHT, "mask-1": (), "mask-2": ("mid_block",)}


def test_routes_become_a_schedule() -> None:
    left_out = {"a": (), "b": LIGHT, "c": ("mid_block",)}
    masks = MasksByCall.routed(left_out, ("b", "b", "a", "b"), 1000)
    assert masks == MasksByCall((LIGHT, ()), ByTimestep(("b", "a", "b"), (500.0, 250.0)))
    assert MasksByCall.routed(left_out, ("c",), 1000).masks == {"c": ("mid_block",)}


def test_what_makes_no_masks_is_refused(whole: sdgraph.GraphUNet) -> None:
    schedule = ByTimestep(("whole", "light"), (500,))
    with pytest.raises(errors.SpecError, match="1 sets of regions for 2 masks"):
        MasksByCall(((),), schedule)
    with pytest.raises(errors.SpecError, match="0 masks"):
        MasksByCall.in_equal_intervals()
    with pytest.raises(errors.SpecError, match="2 masks for 1 timesteps"):
        MasksByCall.in_equal_intervals((), LIGHT, num_train_timesteps=1)
    with pytest.raises(errors.SourceError, match="switch of several already"):
        MasksByCall(((), LIGHT), schedule).switch(MasksByCall(((), LIGHT), schedule).switch(whole))
    with pytest.raises(errors.PathError, match="no module"):
        MasksByCall(((), ("up_blocks.7",)), schedule).switch(whole)
