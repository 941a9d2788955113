"""Stable Diffusion traced, pruned and exported to ONNX Runtime: what it costs, and what it does to images.

Nothing is downloaded: the pipeline is the small Stable Diffusion of `examples/scenes`, with the topology of
Stable Diffusion 1.5, trained on drawn scenes. With another checkpoint, `PROMPTS` and `load()` change, no more.

    python examples/demo.py --out out/demo
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it recommends torchvision, which nothing here needs

import numpy as np
import torch
from PIL import Image
from scenes.pipeline import load
from scenes.quality import Quality, held_out_captions
from tqdm import tqdm

import sdgraph
from sdgraph.exporters import onnx, ort

PASSES = "CleanUp, PruneBlocks('mid_block')"
STEPS, IMAGES = 25, 24
SHOWN = 8  # images in the picture
TURNS, BUDGET = 9, 20.0  # timed turns, and the seconds after which no further one is begun


def forward_seconds(unets: dict[str, Any], tokens: int, width: int) -> dict[str, list[float]]:
    """Seconds of one forward of each, taken in turns, so that whatever else the machine does hits all alike."""
    sample = torch.randn(2, 4, 16, 16)  # two samples: the prompt and the empty prompt of classifier-free guidance
    call: dict[str, Any] = {"timestep": 500, "encoder_hidden_states": torch.randn(2, tokens, width)}
    seconds: dict[str, list[float]] = {name: [] for name in unets}
    end = time.perf_counter() + BUDGET
    for turn in tqdm(range(TURNS + 1), desc="timing".rjust(18)):
        if time.perf_counter() > end and turn > 3:
            break
        for name, unet in unets.items():
            with torch.no_grad():
                start = time.perf_counter()
                unet(sample, **call)
            if turn > 0:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def same_threads() -> Any:
    """ONNX Runtime with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
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
    pruned = sdgraph.apply(source, PASSES)
    exported = onnx.export(pruned, out / "unet-onnx", overwrite=True)
    running = ort.ORTUNet.from_pretrained(
        out / "unet-onnx", provider="CPUExecutionProvider", session_options=same_threads()
    )
    unets = {"source, eager": source, "traced, no passes": traced, "pruned": pruned, "pruned, ONNX Runtime": running}

    quality = Quality()
    found = {
        name: sdgraph.evaluate(pipe, unet, captions, judge=quality, batch=8, num_inference_steps=STEPS)
        for name, unet in unets.items()
    }
    seconds = forward_seconds(unets, pipe.tokenizer.model_max_length, source.config.cross_attention_dim)
    for name in ("pruned", "traced, no passes"):
        found[name].save(out / name.partition(",")[0])
    picture({name: each.images[1] for name, each in found.items()}).save(out / "images.png")
    (out / "graph-before.txt").write_text(f"{traced.graph}\n")
    (out / "graph-after.txt").write_text(f"{pruned.graph}\n")
    for suffix in ("svg", "png"):
        pruned.graph.picture(out / f"graph.{suffix}", before=traced.graph)

    def row(name: str, nodes: str, graph: sdgraph.Graph) -> tuple[str, ...]:
        parameters = sum(p.numel() for p in graph.parameters().values())
        pairs = zip(seconds[name], seconds["source, eager"], strict=True)
        each = found[name]
        right = each.figures["shape and colour"][1], each.figures["place"][1]
        return (
            name,
            nodes,
            f"{parameters / 1e6:.2f} M",
            f"{graph.macs / 1e6:.0f}",
            f"{statistics.median(mine / eager for mine, eager in pairs):.2f}",
            f"{each.alike['psnr']:.1f} dB",
            *(f"{100 * share:.0f} %" for share in right),
        )

    rows = [
        ("UNet", "nodes", "parameters", "MMACs", "time/eager", "PSNR", "shape and colour", "place"),
        row("source, eager", "-", traced.graph),
        row("traced, no passes", f"{len(traced.graph.nodes)}", traced.graph),
        row("pruned", f"{len(pruned.graph.nodes)}", pruned.graph),
        row("pruned, ONNX Runtime", f"{exported.nodes}", pruned.graph),
    ]
    print(f"\npasses: {PASSES}\n\n{pruned.report}\n\nexport, against the one pruned in PyTorch:\n{exported}\n")
    print(f"pruned:\n{found['pruned']}\n\n{table(rows)}")
    turns, threads = len(seconds["pruned"]), torch.get_num_threads()
    print(
        f"""
MMACs: of one forward at batch 1. Time: median of {turns} forwards in turns, batch 2, {threads} thread(s).
PSNR: {IMAGES} images of {STEPS} steps against those of the source. Shape and colour, place: share of images in which
a classifier reads what the caption says. Nothing was trained after pruning.

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
