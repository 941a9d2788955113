"""What a model is tuned on: tensors, a folder of images with captions, or prompts alone. It imports of `sdgraph.tuning`
only random numbers, digests and processes."""

from .base import Samples, Source
from .captions import MoreCaptions
from .dataset import unpacked
from .images import Images
from .prompts import Prompts
from .tensors import Tensors, as_source

__all__ = ["Images", "MoreCaptions", "Prompts", "Samples", "Source", "Tensors", "as_source", "unpacked"]
