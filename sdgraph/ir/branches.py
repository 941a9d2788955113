"""Decisions of the traced code: the line that takes one, and those of diffusers that do not change values."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Collection, Mapping

# Decisions in diffusers' code whose two branches give the same values, by function and source line. The trace takes
# the branch of the generic (odd) sizes. If diffusers changes such a line the decision becomes a guard again, and calls
# on its other side are refused instead of answered wrongly.
EQUIVALENT_BRANCHES: Mapping[tuple[str, str], str] = {
    (
        "UNet2DConditionModel.forward",
        "if dim % default_overall_up_factor != 0:",
    ): "up-sampling to the size of the skip is up-sampling by two whenever the size divides",
    ("Upsample2D.forward", "if hidden_states.shape[0] >= 64:"): "contiguous() keeps the values",
    (
        "Upsample2D.forward",
        'if dtype == torch.bfloat16 and is_torch_version("<", "2.1"):',
    ): "the cast is for PyTorch before 2.1",
    (
        "Upsample2D.forward",
        "2 if output_size is None else max([f / s for f, s in zip(output_size, hidden_states.shape[-2:])])",
    ): "only feeds the choice of a contiguous() that keeps the values",
    (
        "Upsample2D.forward",
        "if hidden_states.numel() * scale_factor > pow(2, 31):",
    ): "contiguous() keeps the values",
}


def calling_line(inside: Collection[str]) -> tuple[str, str, str]:
    """Return the function, the source line and the place of the traced code that is running.

    Args:
        inside: names of the tracer's own modules, whose frames are skipped.
    """
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in inside or frame.f_code.co_filename.endswith("enum.py"):
        assert frame.f_back is not None
        frame = frame.f_back
    while frame.f_code.co_name in ("<listcomp>", "<genexpr>"):
        assert frame.f_back is not None
        frame = frame.f_back
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    file = "/".join(code.co_filename.split("/")[-2:])
    return code.co_qualname, line, f"{file}:{frame.f_lineno}"
