"""Validation: figures and images of the student between its steps, and where they are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TuningError
from ..evaluation.evaluate import evaluate
from ..options import Count, Index, NotNegative, check
from ..runtime.unet import GraphUNet

Validate = Callable[[GraphUNet, int], Mapping[str, Any]]


@dataclass(frozen=True)
class ValidationImages:
    """Generates images with the student in the place of the pipeline's UNet, for `validate` of `sdgraph.tune`.

    Args:
        pipe: the pipeline, whose UNet is the teacher. It is left as it was.
        prompts: the prompts, one image each.
        num_inference_steps: the steps of a generation.
        guidance_scale: the guidance; by default the pipeline's own.
        seed: the seed of all images.
    Example:
        `sdgraph.tune(..., validate=ValidationImages(pipe, ["a bowl of fruit"]))`
    """

    pipe: Any
    prompts: Sequence[str]
    num_inference_steps: Count = 20
    guidance_scale: NotNegative | None = None
    seed: Index = 0

    def __post_init__(self) -> None:
        check(self, TuningError, "ValidationImages")

    def __call__(self, unet: GraphUNet, step: int) -> dict[str, Any]:
        """Return PSNR in dB and SSIM of the student's images to the teacher's, and the images as a sheet.

        Args:
            unet: the student.
            step: the number of steps so far.
        """
        guidance: dict[str, Any] = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        steps = self.num_inference_steps
        evaluation = evaluate(
            self.pipe, unet, self.prompts, seeds=[self.seed], progress=False, num_inference_steps=steps, **guidance
        )
        sheet = evaluation.draw(rows=len(self.prompts))
        return {"psnr": evaluation.pairwise["psnr"], "ssim": evaluation.pairwise["ssim"], "validation": sheet}


def record(results: Mapping[str, Any], step: int, output_dir: Path, accelerator: Any) -> None:
    """Log the figures and images of a validation, and write the images to `output_dir/validation`.

    Args:
        results: the figures and PIL images by name, as `validate` of `sdgraph.tune` has returned them.
        step: the number of steps so far.
        output_dir: the folder of the run.
        accelerator: the accelerator, whose trackers log.
    Raises:
        TuningError: the results are something else, or an image cannot be written.
    """
    accelerator.log(figures_of(results), step)
    images = {name: image for name, image in results.items() if hasattr(image, "save")}
    for name, image in images.items():
        path = output_dir / "validation" / f"{name}-{step:06}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            image.save(path)
        except OSError as error:
            raise TuningError(
                f"an image of the validation cannot be written: {error.strerror or error}",
                where=str(path),
                hint="return PIL images in RGB; the same command goes on from the last step",
            ) from error
    for tracker in accelerator.trackers if images else ():
        if tracker.name == "tensorboard":
            stacked = {name: np.asarray(image.convert("RGB"))[None] for name, image in images.items()}
            tracker.log_images(stacked, step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):  # accelerate's, of which some take lists
            lists = tracker.name in ("wandb", "swanlab")
            tracker.log_images({name: [image] if lists else image for name, image in images.items()}, step)


def figures_of(results: object) -> dict[str, float]:
    """Return the figures of a validation.

    Raises:
        TuningError: it returns something else than figures and images by name.
    """
    hint = "return a dict of figures and PIL images by name, {} if there are none"
    if not isinstance(results, Mapping):
        raise TuningError(f"validate returns a {type(results).__name__}", where="validate", hint=hint)
    figures = {}
    for name, value in results.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]{1,200}", name):
            raise TuningError(f"validate returns something named {name!r}", where="validate", hint="use short names")
        if hasattr(value, "save"):
            continue
        try:
            figures[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(value).__name__
            raise TuningError(f"validate returns a {kind} as {name!r}", where="validate", hint=hint) from error
    return figures
