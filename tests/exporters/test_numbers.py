"""Exported UNets give eager's numbers at sizes not seen, in unmodified pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
)

from sdgraph import errors

from ..models import answer, build, call_of
from ..pipelines import POOLED, PROMPT, large, make, plain, vae
from .exports import CLOSE, RESIDUALS, Exported

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["sd15", "pruned"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 1, "H": 8, "W": 24, "L": 77, "timestep": 999},
        {"B": 3, "H": 13, "W": 9, "L": 2, "timestep": torch.tensor([1, 500, 998])},
        {"B": 2, "H": 17, "W": 16, "L": 1, "timestep": 3.75},
        {"B": 65, "H": 2, "W": 3, "L": 3, "timestep": torch.tensor(20)},
    ],
    ids=["wide", "odd, a timestep each", "half odd, between steps", "large batch"],
)
def test_gives_eagers_numbers_at_sizes_not_seen(
    exported: Callable[..., Exported], provider: str, name: str, sizes: dict[str, Any]
) -> None:
    made = exported(name)
    call = call_of(made.unet, **sizes)
    torch.testing.assert_close(answer(made.load(provider=provider), call), answer(made.unet, call), **CLOSE)


@pytest.mark.long
def test_inputs_of_other_architectures(exported: Callable[..., Exported], provider: str) -> None:
    made = exported("sdxl")
    loaded = made.load(provider=provider)
    for ids in (6, 5):
        call = call_of(made.unet, B=3, H=11, W=8)
        call["added_cond_kwargs"] = {
            "text_embeds": torch.randn(3, 16 + (6 - ids) * 8),
            "time_ids": torch.randint(0, 1024, (3, ids)),
        }
        torch.testing.assert_close(answer(loaded, call), answer(made.unet, call), **CLOSE)


def test_optional_inputs_are_taken_when_exported(exported: Callable[..., Exported], provider: str) -> None:
    made = exported("controlled")
    loaded = made.load(provider=provider)
    call = call_of(made.unet, B=3, H=9, W=14)
    call["timestep_cond"] = call["timestep_cond"][:1]  # one for the whole batch
    call["class_labels"] = torch.tensor([4])
    down = [torch.randn(3, 16, 9, 14), torch.randn(3, 16, 9, 14), torch.randn(3, 16, 5, 7), torch.randn(3, 32, 5, 7)]
    control = dict(zip(RESIDUALS, (tuple(down), torch.randn(3, 32, 5, 7)), strict=True))
    torch.testing.assert_close(answer(loaded, call | control), answer(made.unet, call | control), **CLOSE)
    with pytest.raises(errors.CallError, match="exported with it"):
        loaded(**call)
    with pytest.raises(errors.CallError, match=r"expected \(3, 16, 5, 7\)"):
        loaded(**call | control | {RESIDUALS[0]: (*down[:2], down[0], down[3])})


@pytest.mark.long
def test_half_precision(exported: Callable[..., Exported], provider: str) -> None:
    made = exported("half")
    call = call_of(made.unet, B=1, H=13, W=9)
    result = answer(made.load(provider=provider), call)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result, answer(made.unet, call), rtol=2e-2, atol=5e-3)
    with pytest.raises(errors.CallError, match=r"is torch\.float32, the UNet is torch\.float16"):
        made.load()(**call | {"sample": call["sample"].float()})


ODD = {"height": 72, "width": 88}  # with latents of 9 by 11, which no level divides


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(steps_offset=1, clip_sample=False), EulerDiscreteScheduler(steps_offset=1)],
    ids=["DDIM", "Euler"],
)
def test_stands_in_for_the_unet_of_a_pipeline(exported: Callable[..., Exported], provider: str, scheduler: Any) -> None:
    made = exported("sd15")
    pipe = plain("StableDiffusionPipeline", build("sd15"), vae=vae(levels=4), scheduler=scheduler)
    expected = make(pipe, {**PROMPT, **ODD}, steps=4)
    pipe.unet = made.load(provider=provider)
    torch.testing.assert_close(make(pipe, {**PROMPT, **ODD}, steps=4), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_stands_in_for_the_unet_of_an_sdxl_pipeline(exported: Callable[..., Exported]) -> None:
    made = exported("sdxl")
    pipe = large("StableDiffusionXLPipeline", made.unet, vae=vae(levels=4), scheduler=EulerDiscreteScheduler())
    call = {**PROMPT, **POOLED, **ODD}
    expected = make(pipe, call, steps=4)
    pipe.unet = made.load()
    torch.testing.assert_close(make(pipe, call, steps=4), expected, rtol=1e-3, atol=1e-3)


def test_the_source_is_left_as_it_was(exported: Callable[..., Exported]) -> None:
    made = exported("sd15")
    assert not made.unet.training
    call = call_of(made.unet)
    torch.testing.assert_close(answer(made.unet, call), answer(build("sd15"), call), rtol=0, atol=0)
