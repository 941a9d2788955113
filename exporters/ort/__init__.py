"""The execution of an exported folder on ONNX Runtime: `ORTUNet`.

It imports `bundle`.
"""

from .parts import ORTVAE, ORTTextEncoder
from .pipeline import open_pipeline
from .unet import ORTUNet, load_pipeline

__all__ = ["ORTVAE", "ORTTextEncoder", "ORTUNet", "load_pipeline", "open_pipeline"]


def __dir__() -> list[str]:
    return __all__
