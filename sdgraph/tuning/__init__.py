"""Training: a student learns from its teacher what a pass has lost. It may import every layer below the command line.

A `Source` gives rows, `Batches` turns the rows of a step into noised latents and captions, teacher and student answer,
the losses compare the answers, and `tune` takes the step and keeps the state.
"""

from .batch import Batch, Batches
from .chain import chain
from .feature_extractor import FeatureExtractor, Tap
from .incubate import IncubationReport, assemble, incubate
from .losses import (
    AttentionMaps,
    Comparison,
    Denoising,
    Features,
    Guidance,
    ImageFeatures,
    Loss,
    Output,
    RoutingPrior,
    Similarity,
    Wavelet,
)
from .noise_schedule import NoiseSchedule
from .report import TuningReport
from .settings import Settings
from .sources import Images, MoreCaptions, Prompts, Samples, Source, Tensors, unpacked
from .tune import DEFAULT, tune
from .validation import ValidationImages

__all__ = [
    "DEFAULT",
    "AttentionMaps",
    "Batch",
    "Batches",
    "Comparison",
    "Denoising",
    "FeatureExtractor",
    "Features",
    "Guidance",
    "ImageFeatures",
    "Images",
    "IncubationReport",
    "Loss",
    "MoreCaptions",
    "NoiseSchedule",
    "Output",
    "Prompts",
    "RoutingPrior",
    "Samples",
    "Settings",
    "Similarity",
    "Source",
    "Tap",
    "Tensors",
    "TuningReport",
    "ValidationImages",
    "Wavelet",
    "assemble",
    "chain",
    "incubate",
    "tune",
    "unpacked",
]
