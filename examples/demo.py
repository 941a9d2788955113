"""Stable Diffusion traced, pruned, exported to ONNX Runtime, inheriting: what it costs, and what it does to images.

Nothing is downloaded: the pipeline is the small Stable Diffusion of `examples/scenes`, with the topology of
Stable Diffusion 1.5, trained on drawn scenes. With another checkpoint, `load()` and the captions change, no more.

    python examples/demo.py --out out/demo
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it recommends torchvision, which nothing here needs

import numpy as np
import torch
from PIL import Image
from scenes.pipeline import load
from scenes.quality import Quality, held_out_captions

import sdgraph
from sdgraph.exporters import onnx, ort
from sdgraph.views.format import columns

PRUNE = "CleanUp, PruneBlocks(('mid_block', 'up_blocks.3.attentions.1'))"
INHERIT = "HoistInvariants, InheritFeatures('up_blocks.3.resnets.2', part='entry', schedule=Uniform(3), forecast=1)"
STEPS, IMAGES = 25, 24
SHOWN = 8  # images in the picture


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = columns(rows).splitlines()
    return "\n".join([lines[0], "-" * len(max(lines, key=len)), *lines[1:]])


def picture(sides: dict[str, np.ndarray]) -> Image.Image:
    """A row of images (N, H, W, 3) in [0, 1] for each side, three times as large."""
    rows = np.concatenate([np.concatenate(list(images[:SHOWN]), 1) for images in sides.values()])
    return Image.fromarray((255 * rows).round().astype(np.uint8).repeat(3, 0).repeat(3, 1))


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pipe = load()
    source = pipe.unet
    _, captions = held_out_captions(IMAGES)

    traced = sdgraph.apply(source, [])
    pruned = sdgraph.apply(source, PRUNE)
    inheriting = sdgraph.apply(traced, INHERIT)
    exported = onnx.export(pruned, out / "unet-onnx", overwrite=True)
    same_threads = {"intra_op_num_threads": torch.get_num_threads()}
    running = ort.ORTUNet.from_pretrained(
        out / "unet-onnx",
        provider="CPUExecutionProvider",
        session_options=same_threads,
    )
    unets = {
        "source, eager": source,
        "traced, no passes": traced,
        "pruned": pruned,
        "pruned, ONNX Runtime": running,
        "inheriting": inheriting,
    }

    quality = Quality()
    found = {
        name: sdgraph.evaluate(pipe, unet, captions, judge=quality, batch=8, num_inference_steps=STEPS)
        for name, unet in unets.items()
    }
    for name in ("pruned", "traced, no passes"):
        found[name].save(out / name.partition(",")[0])
    picture({name: each.images[1] for name, each in found.items()}).save(out / "images.png")
    (out / "graph-before.txt").write_text(f"{traced.graph}\n")
    (out / "graph-after.txt").write_text(f"{pruned.graph}\n")
    for suffix in ("svg", "png"):
        pruned.graph.picture(out / f"graph.{suffix}", before=traced.graph)

    def row(name: str, nodes: str, graph: sdgraph.Graph) -> tuple[str, ...]:
        parameters = sum(p.numel() for p in graph.parameters().values())
        each = found[name]
        eager, mine = each.seconds
        right = each.figures["shape and colour"][1], each.figures["place"][1]
        return (
            name,
            nodes,
            f"{parameters / 1e6:.2f} M",
            f"{graph.timetable(STEPS).macs / STEPS / 1e6:.0f}",
            f"{mine / eager:.2f}",
            f"{each.alike['psnr']:.1f} dB",
            *(f"{100 * share:.0f} %" for share in right),
        )

    rows = [
        ("UNet", "nodes", "parameters", "MMACs", "time/eager", "PSNR", "shape and colour", "place"),
        row("source, eager", "-", traced.graph),
        row("traced, no passes", f"{len(traced.graph.nodes)}", traced.graph),
        row("pruned", f"{len(pruned.graph.nodes)}", pruned.graph),
        row("pruned, ONNX Runtime", f"{sum(exported.nodes.values())}", pruned.graph),
        row("inheriting", f"{len(inheriting.graph.nodes)}", inheriting.graph),
    ]
    print(f"\npruned by {PRUNE}\n\n{pruned.report}\n\nexport, against the one pruned in PyTorch:\n{exported}\n")
    print(f"inheriting by {INHERIT}\n\n{inheriting.graph.timetable(STEPS)}\n")
    print(f"pruned:\n{found['pruned']}\n\n{table(rows)}")
    print(
        f"""
MMACs: of a forward at batch 1, the mean over the steps. Time: of whole images, the two sides in turns, with
{torch.get_num_threads()} thread(s). PSNR: {IMAGES} images of {STEPS} steps against those of the source. Shape and
colour, place: share of images in which a classifier reads what the caption says. Nothing was trained after pruning.

{out}/
  images.png                            {SHOWN} images of each, a row of the table per row
  pruned/, traced/                      evaluation.json, and evaluation.png: before, after, difference
  graph.svg, graph.png                  the graph, and what was removed
  graph-before.txt, graph-after.txt     the graph as text
  unet-onnx/                            the exported model"""
    )
    if found["traced, no passes"].alike["equal"] != 1:
        raise SystemExit("the traced UNet does not equal the source: this is a defect, please report it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for what it makes (out/demo)")
    torch.set_num_threads(1)  # operations this small gain nothing from more, and lose much where cores are busy
    main(parser.parse_args().out)
