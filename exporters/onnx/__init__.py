"""The export to ONNX: `export`.

It imports `ort`, which checks what was written, and `bundle`.
"""

from .exporter import export
from .parity import ExportReport, Quantization
from .pipeline import PipelineReport, export_pipeline
from .quantize import Calibration, Quantize
from .request import check_target

__all__ = [
    "Calibration",
    "ExportReport",
    "PipelineReport",
    "Quantization",
    "Quantize",
    "check_target",
    "export",
    "export_pipeline",
]


def __dir__() -> list[str]:
    return __all__
