"""How an exported folder is run on ONNX Runtime: `ORTUNet`.

It imports `bundle`.
"""

from .unet import ORTUNet

__all__ = ["ORTUNet"]
