"""A heat map has a cell for every region, in the places of the U."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sdgraph.errors import SpecError
from sdgraph.redundancy.heat_map import _cells
from sdgraph.redundancy.redundancy import Redundancy, Removal

pytest.importorskip("matplotlib")

PATHS = (
    "down_blocks.0",
    "down_blocks.0.resnets.0",
    "down_blocks.0.attentions.0",
    *(f"down_blocks.0.attentions.0.transformer_blocks.{n}.{name}" for n in (0, 1) for name in ("attn1", "attn2", "ff")),
    "mid_block.resnets.0",
    "up_blocks.1.resnets.2",
    "up_blocks.0",
)


def redundancy(paths: tuple[str, ...], time: float | None = None) -> Redundancy:
    removals = tuple(
        Removal(path, "layer", 0.1, 0.05, time, errors=(number / 100,), similarity=0.5)  # the first error is 0
        for number, path in enumerate(paths)
    )
    fixed = {"down_blocks.1.resnets.0": "its output has another size than its input"}
    return Redundancy("0" * 32, None if time is None else "eager on cpu", 2, (9.0,), (1.0,), removals, fixed=fixed)


def test_every_region_has_a_cell_with_what_it_saves(tmp_path: Path) -> None:
    for time, text in ((None, "5.0%"), (0.25, "25.0%")):
        file = tmp_path / "map.svg"
        redundancy(PATHS, time).draw(file)
        drawn = file.read_text()
        for path in (*PATHS, "down_blocks.1.resnets.0", "mid_block", "up_blocks.1"):
            assert drawn.count(f'id="{path}"') == 1, path
        assert len(re.findall(re.escape(text), drawn)) == len(PATHS)
    before = file.read_bytes()
    redundancy(PATHS, 0.25).draw(file)
    assert file.read_bytes() == before


def test_cells_lie_in_a_u_and_do_not_overlap() -> None:
    cells = dict(_cells([*PATHS, "down_blocks.1.resnets.0"]))
    assert cells["down_blocks.0"][1] == cells["up_blocks.1"][1] > cells["down_blocks.1"][1] == cells["up_blocks.0"][1]
    assert cells["mid_block"][1] < cells["up_blocks.0"][1]
    assert cells["down_blocks.0"][0] < cells["mid_block"][0] < cells["up_blocks.0"][0]
    boxes = list(cells.values())
    for number, (x, y, w, h) in enumerate(boxes):
        for left, low, wide, tall in boxes[:number]:
            assert x + w <= left + 1e-9 or left + wide <= x + 1e-9 or y + h <= low + 1e-9 or low + tall <= y + 1e-9


def test_what_is_no_unet_is_not_drawn(tmp_path: Path) -> None:
    nothing = Redundancy("0" * 32, None, 2, (9.0,), (1.0,), redundancy(("conv_in",)).removals)
    with pytest.raises(SpecError, match="no region lies in a block"):
        nothing.draw(tmp_path / "map.svg")
    with pytest.raises(SpecError, match="cannot draw"):
        redundancy(PATHS).draw(tmp_path / "map.pdf")
