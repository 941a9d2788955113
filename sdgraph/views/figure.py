"""Figures, written to SVG and PNG files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import written
from ..errors import SpecError
from ..extra import imported

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # labels stay text: small files that can be searched
    "svg.hashsalt": "sdgraph",
}


def check_figure_path(path: str | os.PathLike[str]) -> str:
    """Return the suffix of a figure's file, in lower case.

    Args:
        path: the file.

    Raises:
        ExtraError: matplotlib is not installed.
        SpecError: the suffix is neither `.svg` nor `.png`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise SpecError(
            f"cannot draw a {suffix or 'file without suffix'}", where=str(path), hint="name it .svg or .png"
        )
    imported("matplotlib", "plots")
    return suffix


@contextmanager
def save_figure(path: str | os.PathLike[str]) -> Iterator[Figure]:
    """Yield a matplotlib figure, and write it to a file when the block ends.

    There is no window and no global figure, and the same drawing gives the same bytes.

    Args:
        path: the file, `.svg` or `.png`.

    Raises:
        ExtraError: matplotlib is not installed.
        SpecError: the suffix is neither `.svg` nor `.png`.
    """
    suffix = check_figure_path(path)
    matplotlib = imported("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's style would change the picture
        matplotlib.rcParams.update(STYLE)
        figure = Figure()
        FigureCanvasAgg(figure)
        yield figure
        metadata = {"Date": None, "Creator": None} if suffix == ".svg" else {"Software": None}
        with written(path) as file:
            figure.savefig(file, format=suffix[1:], dpi=150, metadata=metadata)
