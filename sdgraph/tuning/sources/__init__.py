"""What a model is tuned on: tensors, a folder of images with captions, or prompts alone. It imports of `sdgraph.tuning`
only random numbers and digests."""

from .base import Samples, Source
from .images import Images
from .more_captions import MoreCaptions
from .prompts import Prompts
from .tensors import Tensors, as_source

__all__ = ["Images", "MoreCaptions", "Prompts", "Samples", "Source", "Tensors", "as_source"]
