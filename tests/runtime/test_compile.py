"""`torch.compile` of a UNet that inherits features."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

import sdgraph
from sdgraph import Graph
from sdgraph.passes import InheritFeatures


@pytest.mark.slow
def test_variants_compile_without_breaks(run: Callable[..., torch.Tensor], whole: Graph) -> None:
    """One compilation for each variant, whole, and none again over generations."""
    unet = sdgraph.apply(whole, InheritFeatures.deep_cache(3, branch=1))
    expected = run(unet)
    compiled = CompileCounter()
    unet.compile(backend=compiled, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(run(unet), expected)
        assert compiled.frame_count == 2
        run(unet, prompt="a blue star", steps=7)
    assert compiled.frame_count == 2
