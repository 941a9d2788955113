"""Training: a student learns from its teacher what a pass has lost. It may import every layer below the command line.

A `Source` gives rows, `Batches` turns the rows of a step into noised latents and captions, `TrainStep` compares what
teacher and student predict for them by its losses, and `sdgraph.tune` takes the steps and keeps the state.
"""

from ..runtime.feature_extractor import FeatureExtractor, Tap
from .batch import Batch, Batches
from .incubation import IncubationReport, assemble, chain, incubate
from .learned_pruning import LearnedPruning
from .learned_routing import LearnedRouting
from .losses import (
    AttentionMaps,
    Comparison,
    Denoising,
    Features,
    Guidance,
    ImageFeatures,
    Loss,
    Output,
    Phased,
    RoutingPrior,
    Similarity,
    Trajectory,
    Wavelet,
)
from .noise_schedule import NoiseSchedule
from .report import TuningReport
from .settings import Settings
from .sources import Guided, Images, MoreCaptions, Paths, Prompts, Samples, Source, Tensors, unpacked
from .train_step import DEFAULT
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
    "Guided",
    "ImageFeatures",
    "Images",
    "IncubationReport",
    "LearnedPruning",
    "LearnedRouting",
    "Loss",
    "MoreCaptions",
    "NoiseSchedule",
    "Output",
    "Paths",
    "Phased",
    "Prompts",
    "RoutingPrior",
    "Samples",
    "Settings",
    "Similarity",
    "Source",
    "Tap",
    "Tensors",
    "Trajectory",
    "TuningReport",
    "ValidationImages",
    "Wavelet",
    "assemble",
    "chain",
    "incubate",
    "unpacked",
]


def __dir__() -> list[str]:
    return __all__
