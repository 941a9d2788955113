"""The trained model of `examples/scenes`, which is no installed package."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from scenes.pipeline import GUIDANCE, load  # noqa: E402
from scenes.quality import Quality, held_out_captions, sheet  # noqa: E402

# The first are measured, the last are for fits and searches. Bounds of schedules were chosen on four more.
CAPTIONS = held_out_captions(2000)[1][4:]

__all__ = ["CAPTIONS", "GUIDANCE", "ROOT", "Quality", "load", "sheet"]
