"""The export to ONNX: `export`.

It imports `ort`, which checks what was written, and `bundle`.
"""

from .exporter import export
from .parity import ExportReport, Quantization
from .quantize import Calibration, Quantize
from .request import check_target

__all__ = ["Calibration", "ExportReport", "Quantization", "Quantize", "check_target", "export"]


def __dir__() -> list[str]:
    return __all__
