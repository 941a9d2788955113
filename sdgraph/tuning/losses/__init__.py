"""Losses: what training minimises, one frozen dataclass for each term.

They import `batch` and `noise_schedule` of `sdgraph.tuning`, and the layers below it.
"""

from .attention import AttentionMaps
from .base import Comparison, Loss
from .features import Features, Similarity
from .image import ImageFeatures, Wavelet
from .paths import Phased, Trajectory
from .prediction import Denoising, Guidance, Output, RoutingPrior

__all__ = [
    "AttentionMaps",
    "Comparison",
    "Denoising",
    "Features",
    "Guidance",
    "ImageFeatures",
    "Loss",
    "Output",
    "Phased",
    "RoutingPrior",
    "Similarity",
    "Trajectory",
    "Wavelet",
]
