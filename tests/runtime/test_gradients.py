"""Calls with gradients, of inputs and of weights, give those of the source."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sdgraph
from sdgraph.passes import HoistInvariants, InheritFeatures

from ..models import call_of


@pytest.mark.law("Gradients of a trace are those of its source.")
@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["sample", "encoder_hidden_states"])
@pytest.mark.parametrize(
    "passes", [InheritFeatures("up_blocks.-1.resnets.-1", part="entry"), HoistInvariants()], ids=["inherit", "hoist"]
)
def test_gradients_of_inputs_are_the_sources(wanted: str, passes: Any, unet: Any, caplog: Any) -> None:
    """With frozen weights: guidance by gradients, inversion of the prompt."""
    frozen = copy.deepcopy(unet).requires_grad_(False)
    unet = sdgraph.apply(frozen, passes)
    call = call_of(unet)
    with torch.no_grad():  # an ordinary call of the same generation comes before
        unet(**{**call, "timestep": 9})
    call[wanted].requires_grad_(True)
    for timestep in (8, 7, 6):
        expected, found = (
            torch.autograd.grad(each(**{**call, "timestep": timestep}).sample.square().sum(), call[wanted])[0]
            for each in (frozen, unet)
        )
        assert torch.equal(expected, found)
    assert "gradients are on" in caplog.text


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp's own
def test_forward_derivatives_are_the_sources(unet: Any) -> None:
    frozen = copy.deepcopy(unet).requires_grad_(False)
    unet, call = sdgraph.apply(frozen, InheritFeatures("up_blocks.-1.resnets.-1", part="entry")), call_of(unet)
    tangent = torch.randn_like(call["sample"])
    for timestep in (8, 7):

        def of_latents(unet: Any, timestep: int = timestep) -> Callable[[Tensor], Tensor]:
            return lambda latents: unet(**{**call, "sample": latents, "timestep": timestep}).sample

        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivatives
            expected, found = (
                torch.func.jvp(of_latents(each), (call["sample"],), (tangent,))[1] for each in (frozen, unet)
            )
        assert torch.allclose(expected, found, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(unet(**call).sample, frozen(**call).sample)


def test_weights_are_copied_when_gradients_come_and_not_before(unet: Any) -> None:
    result, call = sdgraph.apply(unet), call_of(unet)
    before = {n: p.detach().clone() for n, p in unet.named_parameters()}
    shared = {n: p.data_ptr() for n, p in unet.named_parameters()}
    output = result(**call).sample
    assert {n: p.data_ptr() for n, p in result.named_parameters()} == shared  # a call without no_grad copies nothing
    output.sum().backward()
    torch.optim.SGD(result.parameters(), 0.1).step()
    assert all(torch.equal(before[n], p) for n, p in unet.named_parameters())
    assert not torch.equal(result(**call).sample, unet(**call).sample)


def test_gradients_by_autograd_and_a_step_by_hand(unet: Any) -> None:
    result, call = sdgraph.apply(unet), call_of(unet)
    before = unet.conv_out.weight.detach().clone()
    weight = result.get_parameter("conv_out.weight")
    (gradient,) = torch.autograd.grad(result(**call).sample.sum(), weight)
    with torch.no_grad():
        weight -= gradient
    assert torch.equal(unet.conv_out.weight, before)
