"""The layout of a diagram: down blocks on the left, up blocks on the right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .boxes import BAND, BOX_WIDTH, ENDS, GAP, INDENT, MIDDLE, ROW, WIDE, Box
from .units import BLOCK


class Layout:
    """Sets the places of boxes.

    Its `frames` are the blocks with the paths of their boxes. Its `flow` is the paths in the order of computation.

    Args:
        boxes: the boxes by path.
        up_blocks: the number of up blocks in the configuration, because the outermost may have been removed.
    """

    def __init__(self, boxes: Mapping[str, Box], up_blocks: int) -> None:
        self.boxes = boxes
        self.frames: list[tuple[str, list[str]]] = []
        blocks: dict[str, list[str]] = {}
        for path in self.boxes:
            match = BLOCK.match(path)
            if match:
                blocks.setdefault(match[0], []).append(path)
        downs = {int(b.split(".")[1]): _layer_rows(p) for b, p in blocks.items() if b.startswith("down")}
        ups = {int(b.split(".")[1]): _layer_rows(p) for b, p in blocks.items() if b.startswith("up")}
        outermost = max([*ups, up_blocks - 1])
        levels = max([*(d + 1 for d in downs), *(outermost - u + 1 for u in ups)], default=0)
        widest = max((len(r) for rows in (*downs.values(), *ups.values()) for r in rows), default=1)
        self.side = widest * (BOX_WIDTH + GAP)
        self.centre = self.side + INDENT * max(levels - 1, 0) + MIDDLE / 2
        y = 0.0
        entry = [path for path in ENDS[:1] if path in self.boxes]
        falling: list[list[str]] = []
        rising: list[list[str]] = []
        for level in range(levels):
            down, samplers = _split(downs.get(level, []))
            up = self._rising(level, ups.get(outermost - level, []))
            rows = max(len(down) + 1, len(up))
            self._sides(level, y, rows, [entry, *down], up)
            self._frame(f"down_blocks.{level}", down)
            self._frame(f"up_blocks.{outermost - level}", [[p for p in row if p not in ENDS] for row in up])
            falling, rising = [*falling, entry, *down], [*up, *rising]
            y -= ROW * rows + BAND
            entry = samplers  # they stand where the next level begins, beside the layer that takes their skip
        self._row(entry, INDENT * levels, y)
        middle = blocks.get("mid_block", [])
        self._row(middle, self.centre - (len(middle) * (BOX_WIDTH + GAP) - GAP) / 2, y - ROW * bool(entry))
        self._frame("mid_block", [middle])
        self._top()
        self.flow: list[str] = [path for row in [*falling, entry, middle, *rising] for path in row]

    def _rising(self, level: int, layers: list[list[str]]) -> list[list[str]]:
        """Return the rows of an up block, from below. The up-sampler, or the end of the U, is in the last row."""
        up, tail = _split(layers)
        if level == 0:
            tail = [*tail, *(path for path in ENDS[1:] if path in self.boxes)]
        return [*up[:-1], [*up[-1], *tail]] if up else [tail]

    def _sides(self, level: int, y: float, rows: int, down: list[list[str]], up: list[list[str]]) -> None:
        x = INDENT * level
        for i, row in enumerate(down):
            self._row(row, x, y - ROW * i)
        for i, row in enumerate(up):
            self._row(row, 2 * self.centre - x - self.side, y - ROW * (rows - 1 - i))
            if ENDS[1] in row:
                self.boxes[ENDS[1]].x += GAP  # it stands outside of the block's frame

    def _top(self) -> None:
        """Place the boxes outside of blocks, such as the embeddings, side by side above the skips."""
        rest = [b for b in self.boxes.values() if not BLOCK.match(b.path) and b.path not in ENDS]
        width = len(rest) * (WIDE + GAP) - GAP
        for i, box in enumerate(rest):
            box.x, box.y = self.centre - width / 2 + i * (WIDE + GAP), ROW * 1.35

    def _row(self, paths: list[str], x: float, y: float) -> None:
        for i, path in enumerate(paths):
            self.boxes[path].x, self.boxes[path].y = x + i * (BOX_WIDTH + GAP), y

    def _frame(self, block: str, rows: list[list[str]]) -> None:
        inside = [p for row in rows for p in row]
        if inside:
            self.frames.append((block, inside))


def _layer_rows(paths: Iterable[str]) -> list[list[str]]:
    """Return the units of a block in a row for every layer, and a last row for samplers."""
    rows: dict[int, list[str]] = {}
    for path in paths:
        _, _, index = path.rpartition(".")
        sampler = "sampler" in path
        rows.setdefault(1000 if sampler else int(index) if index.isdigit() else 0, []).append(path)
    return [sorted(rows[i], key=lambda p: ".resnets." not in p) for i in sorted(rows)]


def _split(rows: list[list[str]]) -> tuple[list[list[str]], list[str]]:
    """Return the rows of layers, and the samplers that follow them."""
    if rows and "sampler" in rows[-1][0]:
        return rows[:-1], rows[-1]
    return rows, []
