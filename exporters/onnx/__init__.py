"""How an exported folder is written: `export`.

It imports `ort`, which checks what was written, and `bundle`.
"""

from .export import check_target, export
from .parity import ExportReport

__all__ = ["ExportReport", "check_target", "export"]
