"""Metrics of images: PSNR and SSIM, and LPIPS and CLIP score, which need further libraries and downloaded weights."""

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
    """Compute the peak signal-to-noise ratio over all images.

    Args:
        a: images (N, H, W, C) in [0, 1]; or a single image (H, W, C).
        b: images of the same shape.
    Returns:
        The ratio in dB; infinite if the images are equal.
    """
    error = float(np.mean(np.square(a.astype(np.float64) - b)))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Images, b: Images) -> float:
    """Compute the mean structural similarity, with a Gaussian window of 11 pixels and σ = 1.5, K1 = 0.01, K2 = 0.03.

    Channels are compared separately, at the positions where the window fits into the image.

    Args:
        a: images (N, H, W, C) in [0, 1], at least 11 pixels high and wide.
        b: images of the same shape.
    Returns:
        The mean over positions, channels and images; 1 if the images are equal.
    Source:
        Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
        2004.
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
    """Compute the mean LPIPS distance with AlexNet's features, by torchmetrics.

    Args:
        a: images (N, H, W, 3) in [0, 1].
        b: images of the same shape.
    Returns:
        The mean over the images; 0 if the images are equal.
    Raises:
        ExtraError: torchmetrics or torchvision is not installed.
    Source:
        Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.
    """
    imported("torchvision", "quality")
    metric = imported("torchmetrics.image.lpip", "quality").LearnedPerceptualImagePatchSimilarity(
        net_type="alex", normalize=True
    )
    for image, other in zip(a, b, strict=True):
        metric.update(_channels_first(image)[None], _channels_first(other)[None])
    return float(metric.compute())


def clip_score(images: Images, prompts: Sequence[str], model: str = CLIP) -> float:
    """Compute the mean CLIP score of images and their prompts: 100 times the cosine of their embeddings, at least 0.

    Args:
        images: images (N, H, W, 3) in [0, 1].
        prompts: the N prompts.
        model: the folder of a CLIP model and its processor for transformers, or its name on the hub.
    Returns:
        The mean over the images.
    Raises:
        ExtraError: transformers is not installed.
    Source:
        Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", 2021.
    """
    # torchmetrics 1.9 has a CLIPScore that fails with transformers 5
    transformers = imported("transformers", "pipelines")
    clip = transformers.CLIPModel.from_pretrained(model).eval()
    processor = transformers.CLIPProcessor.from_pretrained(model)
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = np.round(255 * image).astype(np.uint8)
        with torch.no_grad():
            output = clip(**processor(text=[prompt], images=[pixels], return_tensors="pt", truncation=True))
        scores.append(100 * max(0.0, float(F.cosine_similarity(output.image_embeds, output.text_embeds))))
    return float(np.mean(scores))


def _channels_first(image: Images) -> torch.Tensor:
    """(H, W, C) to a float32 tensor (C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)).permute(2, 0, 1)
