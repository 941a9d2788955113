"""The data that a model is tuned on: tensors, a folder of images with captions, or prompts alone.

They import `random_numbers`, `processes` and `noise_schedule` of `sdgraph.tuning`, and the layers below it.
"""

from .base import Samples, Source
from .captions import MoreCaptions
from .dataset import unpacked
from .images import Images
from .paths import Guided, Paths
from .prompts import Prompts
from .tensors import Tensors, as_source

__all__ = [
    "Guided",
    "Images",
    "MoreCaptions",
    "Paths",
    "Prompts",
    "Samples",
    "Source",
    "Tensors",
    "as_source",
    "unpacked",
]
