"""Calls of diffusers pipelines: with another UNet, without a progress bar, and with checked arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import SdgraphError
from ..options import Misfit, described, fitted
from ..schedules import Steps

REFUSING = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError)


@contextlib.contextmanager
def with_unet(pipe: Any, unet: Any) -> Iterator[None]:
    """Return a context in which a pipeline has another UNet.

    Args:
        pipe: the pipeline.
        unet: the UNet; if None, the pipeline stays as it is.
    """
    if unet is None:
        yield
        return
    own, pipe.unet = pipe.unet, unet
    try:
        yield
    finally:
        pipe.unet = own


@contextlib.contextmanager
def without_bar(pipe: Any) -> Iterator[None]:
    """Hide the progress bar of a pipeline, and restore its settings afterwards.

    Args:
        pipe: the pipeline.
    """
    settings = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(settings or {}), "disable": True})
    try:
        yield
    finally:
        if settings is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = settings


def per_prompt(call: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the arguments of a pipeline for a list of prompts: a negative prompt holds for each of them.

    Args:
        call: the arguments.
        count: the number of prompts. Diffusers takes a text for one prompt only, and a list for a list.
    """
    return {
        name: [value] * count if name.startswith("negative_prompt") and isinstance(value, str) else value
        for name, value in call.items()
    }


def generate(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any], refusal: type[SdgraphError]
) -> Any:
    """Call a pipeline on prompts, each with a separate generator.

    Args:
        pipe: the pipeline.
        prompts: the N prompts.
        seeds: the N seeds of the generators.
        call: further arguments of the pipeline.
        refusal: the class of the error.
    Returns:
        the pipeline's output.
    Raises:
        SdgraphError: the pipeline refuses its arguments, or fails.
    """
    steps = call.get("num_inference_steps")
    try:
        fitted(steps, Steps | None)
    except Misfit:
        what = f"num_inference_steps is {steps!r}"
        raise refusal(what, where="num_inference_steps", hint=f"pass {described(Steps)}") from None
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        return pipe(prompt=list(prompts), generator=generators, **per_prompt(call, len(prompts)))
    except (SdgraphError, torch.OutOfMemoryError):
        raise
    except REFUSING as error:
        others = ", ".join(name for name in call if name != "output_type") or "no other arguments"
        raise refusal(
            f"the pipeline does not run on prompts and {others}: {error or type(error).__name__}",
            where=type(pipe).__name__,
            hint="pass what it needs besides prompts, such as image=..., and leave out what it does not have",
        ) from error
