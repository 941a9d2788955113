"""How alike images are: PSNR and SSIM; LPIPS and CLIP score where the libraries and weights for them are there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..extra import imported

Images = NDArray[np.floating[Any]]
CLIP = "openai/clip-vit-base-patch16"


def psnr(a: Images, b: Images) -> float:
    """Peak signal-to-noise ratio in dB over all images `(N, H, W, C)` in [0, 1]; infinite if they are equal."""
    error = float(np.mean(np.square(a.astype(np.float64) - b)))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Images, b: Images) -> float:
    """Mean structural similarity of images `(N, H, W, C)` in [0, 1], each side at least 11 pixels.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", 2004: a Gaussian window of 11 pixels and σ = 1.5,
    K1 = 0.01, K2 = 0.03; each channel alone, positions where the window fits.
    """
    x, y = (torch.from_numpy(np.ascontiguousarray(images, dtype=np.float64)).permute(0, 3, 1, 2) for images in (a, b))
    N, C = x.shape[:2]
    offset = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offset**2) / (2 * 1.5**2))
    line /= line.sum()

    def blur(images: torch.Tensor) -> torch.Tensor:
        rows = F.conv2d(images.reshape(N * C, 1, *images.shape[2:]), line.view(1, 1, 11, 1))
        return F.conv2d(rows, line.view(1, 1, 1, 11))

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(similarity.mean())


def lpips(a: Images, b: Images) -> float:
    """Mean LPIPS distance (AlexNet) of images in [0, 1]; 0 is alike. Zhang et al., 2018, as torchmetrics has it.

    Raises:
        ExtraError: torchmetrics or torchvision is not installed.
    """
    imported("torchvision", "quality")
    metric = imported("torchmetrics.image.lpip", "quality").LearnedPerceptualImagePatchSimilarity(
        net_type="alex", normalize=True
    )
    for one, other in zip(a, b, strict=True):
        metric.update(_channels_first(one)[None], _channels_first(other)[None])
    return float(metric.compute())


def clip_score(images: Images, prompts: Sequence[str], model: str = CLIP) -> float:
    """Mean CLIP score of images in [0, 1] and their prompts: 100 times the cosine, at least 0. Hessel et al., 2021.

    Args:
        model: name on the hub, or folder, of a CLIP model and its processor, for transformers.
    Raises:
        ExtraError: transformers is not installed.
    """
    # not torchmetrics' CLIPScore, which release 1.9 cannot compute with transformers 5
    transformers = imported("transformers", "pipelines")
    clip = transformers.CLIPModel.from_pretrained(model).eval()
    processor = transformers.CLIPProcessor.from_pretrained(model)
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = np.round(255 * image).astype(np.uint8)
        with torch.no_grad():
            found = clip(**processor(text=[prompt], images=[pixels], return_tensors="pt", truncation=True))
        scores.append(100 * max(0.0, float(F.cosine_similarity(found.image_embeds, found.text_embeds))))
    return float(np.mean(scores))


def _channels_first(image: Images) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)).permute(2, 0, 1)
