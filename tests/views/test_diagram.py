"""The picture of a UNet: that it is a picture, and that it shows what was done."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import sdgraph
from sdgraph import Graph
from sdgraph.errors import ExtraError, PathError, SpecError
from sdgraph.views.drawing import draw_graph

from ..models import build

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def unet() -> Graph:
    return sdgraph.trace(build(layers_per_block=2))


def pruned(unet: Graph, *passes: str) -> Graph:
    return sdgraph.apply(unet, passes, verify=False).graph.copy()


def drawn(path: Path) -> tuple[dict[str, str], str]:
    """Of an SVG: the state of each box by module path, and all its text."""
    root = ET.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    ids = [element.get("id", "") for element in root.iter()]
    states = dict(i.split(":") for i in ids if ":" in i and not i.startswith("legend"))
    assert states.keys() <= set(ids)  # each label belongs to a box
    return states, " ".join("".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text"))


def test_every_unit_is_a_box(unet: Graph, tmp_path: Path) -> None:
    draw_graph(unet, tmp_path / "unet.svg")
    states, words = drawn(tmp_path / "unet.svg")
    units = {p for p in unet.paths() if p.split(".")[-2:-1] in (["resnets"], ["attentions"], ["upsamplers"])}
    assert units <= states.keys()
    assert {"conv_in", "conv_out", "time_embedding"} <= states.keys()
    assert set(states.values()) == {"kept"}
    assert f"{len(unet.nodes)} nodes" in words
    assert "down_blocks.0" in words
    assert "A ×1" in words


def test_what_was_removed_is_a_ghost(unet: Graph, tmp_path: Path) -> None:
    after = pruned(unet, "CleanUp", "PruneBlocks('bk-sdm-small')")
    draw_graph(after, tmp_path / "small.svg", before=unet)
    states, words = drawn(tmp_path / "small.svg")
    removed = {path for path, state in states.items() if state == "removed"}
    inside_mid = {"mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"}
    assert removed == (after.removed.keys() - {"mid_block"}) | inside_mid
    assert set(states.values()) == {"kept", "removed"}  # the clean-up changed no unit
    assert f"{len(unet.nodes)} → {len(after.nodes)} nodes" in words
    assert "mid_block  removed" in words
    assert "rewired skip" in words
    assert "PruneBlocks('bk-sdm-small')" in words


def test_what_was_changed_and_inserted_is_marked(unet: Graph, tmp_path: Path) -> None:
    after = pruned(unet, "PruneBlocks('down_blocks.0.attentions.0.transformer_blocks.0.attn1')")
    up = after.region("up_blocks.0.upsamplers.0")
    after.rewire(up.output, after.insert(torch.relu, up.output, path="up_blocks.0.extra.0"))
    middle = after.region("mid_block").output
    after.rewire(middle, after.insert(torch.sin, middle, path=""))
    draw_graph(after, tmp_path / "changed.svg", before=unet)
    states, words = drawn(tmp_path / "changed.svg")
    changed = {path: state for path, state in states.items() if state != "kept"}
    assert changed == {"down_blocks.0.attentions.0": "changed", "up_blocks.0.extra.0": "inserted"}
    assert "inserted between the boxes: 1 sin" in words


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15-levels", "sdxl", "no-mid", "upscaler"])
def test_all_shapes_of_unet(name: str, tmp_path: Path) -> None:
    unet = sdgraph.trace(build(name))
    draw_graph(unet, tmp_path / "unet.svg")
    states, _ = drawn(tmp_path / "unet.svg")
    assert len(states) > 10


@pytest.mark.slow
def test_whole_levels_may_be_gone(tmp_path: Path) -> None:
    unet = sdgraph.trace(build("sd15-levels"))
    tiny = pruned(unet, "PruneBlocks('bk-sdm-tiny')")
    draw_graph(tiny, tmp_path / "alone.svg")
    assert "removed" not in drawn(tmp_path / "alone.svg")[0].values()
    draw_graph(tiny, tmp_path / "both.svg", before=unet)
    states, words = drawn(tmp_path / "both.svg")
    assert states["down_blocks.3.resnets.0"] == states["up_blocks.0.upsamplers.0"] == "removed"
    assert "up_blocks.0  removed" in words


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_graph_gives_the_same_file(unet: Graph, tmp_path: Path, suffix: str) -> None:
    import matplotlib

    draw_graph(unet, tmp_path / f"one{suffix}")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):  # whatever the user's style
        draw_graph(unet, tmp_path / f"two{suffix}")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_a_png_is_one(unet: Graph, tmp_path: Path) -> None:
    draw_graph(unet, str(tmp_path / "unet.PNG"))
    assert (tmp_path / "unet.PNG").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_another_suffix_is_refused(unet: Graph, tmp_path: Path) -> None:
    for name in ("unet.jpg", "unet"):
        with pytest.raises(SpecError, match=r"\.svg or \.png"):
            draw_graph(unet, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_is_no_unet_is_refused(tmp_path: Path) -> None:
    graph = sdgraph.trace_code(torch.sin, x=("B", 4))
    with pytest.raises(PathError, match="no down_blocks"):
        draw_graph(graph, tmp_path / "sine.svg")


def test_without_matplotlib_the_extra_is_named(unet: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ExtraError, match=r"pip install -e '\.\[plots\]'"):
        draw_graph(unet, tmp_path / "unet.svg")
