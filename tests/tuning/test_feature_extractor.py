"""Features as further outputs of a graph: the values that hooks would see, and gradients that recomputing keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph.passes import InheritFeatures
from sdgraph.tuning import FeatureExtractor, Tap

from ..models import call_of

GIVEN = frozenset(("sample", "timestep", "encoder_hidden_states"))
PATHS = ("down_blocks.0", "mid_block.resnets.0", "up_blocks.1", "up_blocks.1.attentions.0.transformer_blocks.0.attn1")


def call() -> dict[str, Any]:
    return call_of_teacher | {"timestep": torch.tensor([3, 700])}


call_of_teacher: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _call(teacher: UNet2DConditionModel) -> None:
    call_of_teacher.update(call_of(teacher))


def test_outputs_are_those_of_the_modules(teacher: UNet2DConditionModel, teaching: sdgraph.GraphUNet) -> None:
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        return lambda _, __, out: seen.__setitem__(path, out[0] if isinstance(out, tuple) else out)

    hooks = [teacher.get_submodule(path).register_forward_hook(keep(path)) for path in PATHS]
    with torch.no_grad():
        expected = teacher(**call()).sample
        prediction, *values = FeatureExtractor(teaching, [Tap(path) for path in PATHS], GIVEN)(call())
    for hook in hooks:
        hook.remove()

    assert torch.equal(prediction, expected)
    for path, value in zip(PATHS, values, strict=True):
        assert torch.equal(value, seen[path]), path


def test_queries_and_keys_are_those_of_the_attention(
    teacher: UNet2DConditionModel, teaching: sdgraph.GraphUNet
) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    with torch.no_grad():
        _, query, key = FeatureExtractor(teaching, [Tap(path, "query"), Tap(path, "key")], GIVEN)(call())
        text = call()["encoder_hidden_states"]
        keys = teacher.get_submodule(path).to_k(text).unflatten(-1, (key.shape[1], -1)).transpose(1, 2)
    assert torch.equal(key, keys)
    assert query.shape[:2] == key.shape[:2]
    assert query.shape[-1] == key.shape[-1]


def test_sites_of_inheritance_are_computed(teacher: UNet2DConditionModel) -> None:
    inheriting = sdgraph.apply(teacher, [InheritFeatures.deep_cache(interval=3)])
    path = next(iter(inheriting.graph.sites))
    assert path
    with torch.no_grad():
        prediction, _ = FeatureExtractor(inheriting, [Tap("up_blocks.1")], GIVEN)(call())
        assert torch.equal(prediction, teacher(**call()).sample)


def test_recomputing_keeps_gradients_and_frees_memory(teacher: UNet2DConditionModel) -> None:
    unet = sdgraph.apply(teacher, []).train()
    gradients, kept = [], []
    for gradient_checkpointing in (False, True):
        observed = FeatureExtractor(unet, [Tap("mid_block")], GIVEN, gradient_checkpointing)
        size = 0

        def count(value: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            prediction, feature = observed(call())
        (prediction.square().mean() + feature.square().mean()).backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
        kept.append(size)
        unet.zero_grad()

    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < kept[0] / 2
