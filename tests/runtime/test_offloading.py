"""accelerate's offloading hooks on a GraphUNet."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module

import sdgraph
from sdgraph.errors import ModeError

from ..models import answer, build, call_of


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_offloading_hooks(name: str) -> None:
    unet = build(name)
    graph, call = sdgraph.apply(unet), call_of(unet)
    expected = answer(unet, call)
    cpu_offload(graph, execution_device=torch.device("cpu"))
    assert graph.conv_in.weight.is_meta
    assert torch.equal(expected, answer(graph, call))
    remove_hook_from_module(graph, recurse=True)
    assert torch.equal(expected, answer(graph, call))
    _, hook = cpu_offload_with_hook(graph, execution_device=torch.device("cpu"))
    assert torch.equal(expected, answer(graph, call))
    hook.remove()
    assert torch.equal(expected, answer(unet, call))


def test_a_weight_that_sequential_offloading_cannot_bring_is_refused() -> None:
    unet = build(time_embedding_type="fourier")
    graph, call = sdgraph.apply(unet), call_of(unet)
    cpu_offload(graph, execution_device=torch.device("cpu"))
    with pytest.raises(ModeError, match=r"(?s)time_proj.weight.*enable_model_cpu_offload"):
        answer(graph, call)
    remove_hook_from_module(graph, recurse=True)
    _, hook = cpu_offload_with_hook(graph, execution_device=torch.device("cpu"))
    assert torch.equal(answer(unet, call), answer(graph, call))
    hook.remove()


@pytest.mark.parametrize("passes", ["", "HoistInvariants", "InheritFeatures.deep_cache(interval=2)"])
def test_calls_on_the_meta_device_give_shapes(passes: str) -> None:
    graph = sdgraph.apply(build(), passes, verify=False).to("meta")
    call = call_of(graph)
    call = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    for _ in range(2):
        found = answer(graph, call)
        assert found.is_meta
        assert found.shape == call["sample"].shape
