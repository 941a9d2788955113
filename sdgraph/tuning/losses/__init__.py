"""Losses: what training minimises, one frozen dataclass for each term. They may import from `sdgraph.tuning` what
describes a batch, and from the layers below it."""

from .base import Comparison, Loss
from .features import Features
from .prediction import Denoising, Output

__all__ = ["Comparison", "Denoising", "Features", "Loss", "Output"]
