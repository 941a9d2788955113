"""The text of a graph: what people read, and what tells two graphs apart."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sdgraph
from sdgraph import Graph
from sdgraph.errors import PathError
from sdgraph.views.text import format_graph

from ..models import build


class Small(nn.Module):
    """A leaf, a module that is used twice, a free parameter, tuples, slices and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(8, 16), nn.SiLU())
        self.out = nn.Linear(16, 8, bias=False)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Any, h0: Any) -> Any:
        a, b = self.mix(x).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(a[:, None], b[:, None], h0[:, None])
        y = self.mix(y.reshape(x.shape[0], -1, 8))
        return torch.cat([self.out(y) * self.scale, x], dim=-1)


@pytest.fixture(scope="module")
def unet() -> Graph:
    return sdgraph.trace(build(layers_per_block=2))


@pytest.fixture(scope="module")
def pruned(unet: Graph) -> Graph:
    return sdgraph.apply(unet, "PruneBlocks('bk-sdm-small')", verify=False).graph


def bare(printed: str) -> str:
    """Return the text without the padding of the columns."""
    return re.sub(r"(?<=\S) {2,}", "  ", printed)


def statements(printed: str) -> list[str]:
    """The lines between inputs and return, without their columns."""
    body = printed.split("\n\n")[2].splitlines()
    return [re.split(r"(?<=\S) {2,}", line)[0] for line in body if not line.startswith("return")]


def full_paths(printed: str) -> list[str]:
    """Module paths of the lines of a text, read off the indentation."""
    stack: list[str] = []
    found = []
    for line in statements(printed):
        indent = (len(line) - len(line.lstrip())) // 2
        callee = re.sub(r".* = |\(.*|:$", "", line.strip())
        stack = [*stack[:indent], callee]
        found.append(".".join(stack))
    return found


def test_the_text_of_a_small_module() -> None:
    graph = sdgraph.trace_code(Small(), x=("B", "L", 8), h0=("B", "L", 8))
    assert bare(format_graph(graph)) == (
        "Graph: 20 nodes, 280 parameters, 124 k MACs at B=1, L=77\n"
        "free sizes: B, L\n"
        "\n"
        "inputs\n"
        "  x  B×L×8\n"
        "  h0  B×L×8\n"
        "\n"
        "t0 = mix(x)  Sequential  B×L×16  144  7.9 %\n"
        "v0 = chunk(t0, 2, dim=-1)  B×L×8\n"
        "h1 = v0[0][:, None]  B×1×L×8\n"
        "h2 = v0[1][:, None]  B×1×L×8\n"
        "h3 = h0[:, None]  B×1×L×8\n"
        "h4 = sdpa(h1, h2, h3)  B×1×L×8  76.2 %\n"
        "t1 = reshape(h4, B, -1, 8)  B×L×8\n"
        "t2 = mix(t1)  continued  B×L×16  7.9 %\n"
        "t3 = out(t2)  Linear  B×L×8  128  7.9 %\n"
        "t4 = mul(t3, scale)  B×L×8  8\n"
        "t5 = cat(t4, x, dim=-1)  B×L×16\n"
        "return t5"
    )


def test_one_region_prints_its_operations() -> None:
    graph = sdgraph.trace_code(Small(), x=("B", "L", 8), h0=("B", "L", 8))
    assert bare(format_graph(graph, within="mix")) == (
        "mix: Sequential, 4 nodes, 144 parameters, 15.8 % of 124 k MACs\n"
        "\n"
        "inputs\n"
        "  x  B×L×8  an input of the graph\n"
        "  %1  B×L×8  from reshape\n"
        "\n"
        "%2 = 0(x)  Linear(8, 16)  B×L×16  144  7.9 %\n"
        "%3 = 1(%2)  SiLU  B×L×16\n"
        "%4 = 0(%1)  Linear(8, 16)  B×L×16  7.9 %\n"
        "%5 = 1(%4)  SiLU  B×L×16\n"
        "return %3, %5"
    )


def test_a_resnet_reads_like_code(unet: Graph) -> None:
    lines = bare(format_graph(unet, within="down_blocks.1.resnets.0")).splitlines()
    assert lines[0].startswith("down_blocks.1.resnets.0: ResnetBlock2D, 14 nodes, ")
    assert lines[3] == "  %0  B×16×H/2×W/2  from down_blocks.0.downsamplers.0.conv"
    assert [line.split("  ")[0] for line in lines[6:]] == [
        "%2 = norm1(%0)",
        "%3 = nonlinearity(%2)",
        "%4 = conv1(%3)",
        "%5 = nonlinearity(%1)",
        "%6 = time_emb_proj(%5)",
        "%7 = %6[:, :, None, None]",
        "%8 = add(%4, %7)",
        "%9 = norm2(%8)",
        "%10 = nonlinearity(%9)",
        "%11 = dropout(%10)",
        "%12 = conv2(%11)",
        "%13 = conv_shortcut(%0)",
        "%14 = add(%13, %12)",
        "%15 = div(%14, 1.0)",
        "return %15",
    ]
    assert "Conv2d(16, 32, kernel_size=3, padding=1)" in lines[8]


def test_the_u_is_visible(unet: Graph) -> None:
    lines = bare(str(unet)).splitlines()
    assert lines[0].startswith("UNet2DConditionModel: 598 nodes, ")
    assert lines[0].endswith(" at B=1, H=8, W=8, L=77")
    assert lines[1] == "free sizes: B, H, W, L; H/2 is half of H, rounded up"
    assert any(line.startswith("  h1 = resnets.0(h0, e3)  ResnetBlock2D  B×16×H×W  ") for line in lines)
    assert any(line.startswith("  h2 = attentions.0(h1, encoder_hidden_states)  Transformer2DModel") for line in lines)
    skips = [re.findall(r"h\d+'*", line.split("=")[1]) for line in lines if "= cat(" in line]
    assert [skip for _, skip in skips] == ["h7''", "h6'", "h5'", "h4''", "h2'", "h0'"]
    assert "h0', h2', h4'', h5', h6', h7'' = each + down_block_additional_residual_0…5" in lines
    assert len(lines) < 60


def test_optional_residuals_are_one_line_per_list(unet: Graph, pruned: Graph) -> None:
    lines = bare(format_graph(unet)).splitlines()
    assert lines[3 : lines.index("", 3)] == [
        "inputs",
        "  sample  B×4×H×W",
        "  timestep  B  1 serves the batch",
        "  encoder_hidden_states  B×L×24",
        "  down_block_additional_residual_0…5  as what they are added to  optional",
        "  down_intrablock_additional_residual_0…2  as what they are added to  optional",
        "  mid_block_additional_residual  optional",
    ]
    assert "  down_block_additional_residual_0…5  as what they are added to  optional, 2 unused" in bare(
        format_graph(pruned)
    )


def test_removed_regions_are_listed(pruned: Graph) -> None:
    printed = bare(format_graph(pruned))
    assert "passes: PruneBlocks('bk-sdm-small')" in printed
    listed = printed.split("removed\n")[1].splitlines()
    assert [line.split()[0] for line in listed] == list(pruned.removed)
    assert "  mid_block  by PruneBlocks('bk-sdm-small')" in listed


def test_what_a_removed_resnet_leaves_is_told(unet: Graph) -> None:
    graph = sdgraph.apply(unet, "PruneBlocks('down_blocks.1.resnets.0')", verify=False).graph
    assert bare(format_graph(graph)).endswith("by PruneBlocks('down_blocks.1.resnets.0') (conv_shortcut left)")


def test_equal_graphs_print_equal_text(unet: Graph, pruned: Graph) -> None:
    again = sdgraph.trace(build(layers_per_block=2, seed=5))
    for depth in (1, 2, 3, 5):
        assert format_graph(again, depth) == format_graph(unet, depth)
    copy = unet.copy()
    for node in copy.fx.nodes:
        if node.op not in ("placeholder", "output"):
            node.name = f"other_{node.name}"
    assert format_graph(copy) == format_graph(unet)
    assert format_graph(pruned) != format_graph(unet)


@pytest.mark.parametrize("depth", [2, 3, 4, 5, 7])
def test_every_region_appears_once(unet: Graph, depth: int) -> None:
    modules = [path for path in full_paths(format_graph(unet, depth)) if path in unet.classes]
    once = [path for path in modules if not isinstance(unet.weights.get(path), nn.Module)]  # a leaf has a line per call
    assert len(once) == len(set(once))
    opened = {path for path in modules if any(other.startswith(f"{path}.") for other in modules)}
    for path in unet.paths():
        above = [m for m in modules if path == m or path.startswith(f"{m}.")]
        assert path in modules or (above and max(above, key=len) not in opened), path


def test_depth_opens_what_has_parts(unet: Graph) -> None:
    assert [p for p in full_paths(format_graph(unet, 2)) if "blocks" in p] == [
        "down_blocks.0",
        "down_blocks.1",
        "up_blocks.0",
        "up_blocks.1",
    ]
    assert "return" not in format_graph(unet, 1)
    assert "down_blocks.0.attentions.0.transformer_blocks.0" in full_paths(format_graph(unet, 4))
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2" in full_paths(format_graph(unet, 5))


def test_an_input_may_have_the_name_of_a_value() -> None:
    graph = sdgraph.trace_code(lambda h0: h0.sin().cos(), h0=("B", 4, "H", "W"))
    assert statements(format_graph(graph)) == ["h1 = sin(h0)", "h2 = cos(h1)"]


def test_an_unknown_path_is_refused_with_the_nearest(unet: Graph) -> None:
    with pytest.raises(PathError, match=r"down_blocks\.0\.resnets\.1"):
        format_graph(unet, within="down_blocks.0.resnet.1")
