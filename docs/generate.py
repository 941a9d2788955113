"""What the documentation shows of a graph: the figure, and the text in README.md.

    python docs/generate.py

Stable Diffusion 1.5 at full size. Graphs do not look at weights, so its memory is asked for and never filled.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

import sdgraph

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
PASSES = "CleanUp, PruneBlocks('bk-sdm-base')"
SHOWN = "mid_block.attentions.0.transformer_blocks.0.attn2"
MARKED = re.compile(r"(<!-- text of a region -->\n).*?(<!-- end of text -->)", re.DOTALL)


def graphs() -> tuple[sdgraph.Graph, sdgraph.Graph]:
    """Stable Diffusion 1.5 before and after the passes."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    before = sdgraph.trace(unet.to_empty(device="cpu").eval())
    return before, sdgraph.apply(before, PASSES, verify=False).graph


def sample(graph: sdgraph.Graph) -> str:
    """What README.md has between its markers."""
    return f"    >>> print(unet.graph.text(within={SHOWN!r}))\n" + "".join(
        f"    {line}".rstrip() + "\n" for line in graph.text(within=SHOWN).splitlines()
    )


def main() -> None:
    before, after = graphs()
    after.picture(DOCS / "sd15-bk-sdm-base.svg", before=before)
    README.write_text(MARKED.sub(lambda match: match[1] + sample(after) + match[2], README.read_text()))


if __name__ == "__main__":
    main()
