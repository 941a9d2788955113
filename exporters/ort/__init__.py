"""The execution of an exported folder on ONNX Runtime: `ORTUNet`.

It imports `bundle`.
"""

from .unet import ORTUNet, load_pipeline

__all__ = ["ORTUNet", "load_pipeline"]


def __dir__() -> list[str]:
    return __all__
