"""The final latents of a pipeline, whose errors a search compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from torch import Tensor

from ..errors import SourceError, SpecError
from ..inheritance.attach import attach
from ..options import Bounds, Misfit, described, fitted
from ..runtime.pipelines import generate, with_unet
from ..runtime.unet import GraphUNet
from ..schedules import SamplingRun
from ..solvers import is_random, name_of

Images = Annotated[int, Bounds(ge=1, le=10_000)]
Array = np.ndarray[Any, np.dtype[np.float64]]


def check_request(where: str, pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
    """Refuse a search or a fit without a UNet or prompts, with random steps, or with an output type.

    Args:
        where: the name of the public function, for messages.
        pipe: the pipeline.
        prompts: the prompts to measure on.
        call: further arguments of the pipeline.
    Raises:
        SourceError: the pipeline has no UNet, or its solver adds random numbers.
        SpecError: there are no prompts, or the call sets the output type or has a wrong number of images.
    """
    if getattr(pipe, "unet", None) is None:
        raise SourceError(f"{type(pipe).__name__} has no UNet", where=where, hint="pass a pipeline with a UNet")
    if is_random(pipe.scheduler):
        raise SourceError(
            f"{name_of(pipe.scheduler)} adds random numbers at each step",
            where=where,
            hint="use a deterministic solver",
        )
    if not prompts:
        raise SpecError("there are no prompts to measure on", where=where, hint="pass 16 prompts or more")
    number = call.get("num_images_per_prompt")
    try:
        fitted(number, Images | None)
    except Misfit:
        hint = f"pass {described(Images)}"
        raise SpecError(f"num_images_per_prompt is {number!r}", where="num_images_per_prompt", hint=hint) from None
    if "output_type" in call:
        raise SpecError(f"{where} sets output_type itself", where=where, hint="leave it out: latents are compared")


def final_latents(
    pipe: Any, unet: GraphUNet, prompts: Sequence[str], seed: int, call: Mapping[str, Any]
) -> tuple[Tensor, SamplingRun]:
    """Generate with a UNet in the place of the pipeline's, attached to the scheduler.

    Args:
        pipe: the pipeline, which is left as it was.
        unet: the UNet.
        prompts: the prompts.
        seed: the seed of the first image's latents; the others count up from it.
        call: further arguments of the pipeline.
    Returns:
        The final latents, (images, channels, height, width), and the sampling run.
    """
    seeds = range(seed, seed + len(prompts) * int(call.get("num_images_per_prompt") or 1))
    with with_unet(pipe, unet), attach(pipe) as attachment:
        result = generate(pipe, prompts, seeds, {**call, "output_type": "latent"}, SpecError)
        return result.images, attachment.run


def relative_errors(latents: Tensor, reference: Tensor) -> Array:
    """Return the root mean square of the error of each image's latents, relative to its reference, (images,).

    Args:
        latents: the latents, (images, channels, height, width).
        reference: the reference latents, (images, channels, height, width).
    """
    off = (latents.double() - reference.double()).square().flatten(1).mean(1)
    errors: Array = (off / reference.double().square().flatten(1).mean(1)).sqrt().cpu().numpy()
    return errors


def typical(errors: Array) -> float:
    """Return the geometric mean of the errors of images, which differ by a factor of a hundred.

    Args:
        errors: the errors, (images,).
    """
    return float(np.exp(np.log(np.maximum(errors, 1e-300)).mean()))
