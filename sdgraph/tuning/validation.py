"""Images of validation prompts: the teacher's and the student's, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TuningError
from ..evaluation.evaluate import evaluate
from ..options import Count, Index, NotNegative, check
from ..runtime.unet import GraphUNet


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
        """Return PSNR in dB and SSIM of the student's images to the teacher's, and the images as a sheet."""
        guidance: dict[str, Any] = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        steps = self.num_inference_steps
        evaluation = evaluate(
            self.pipe, unet, self.prompts, seeds=[self.seed], progress=False, num_inference_steps=steps, **guidance
        )
        sheet = evaluation.picture(rows=len(self.prompts))
        return {"psnr": evaluation.alike["psnr"], "ssim": evaluation.alike["ssim"], "validation": sheet}
