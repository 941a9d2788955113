"""Trace a Stable Diffusion, prune it, tune it, inherit features, export to ONNX Runtime, and compare time and images.

Nothing is downloaded: the pipeline is the small Stable Diffusion of `examples/scenes`, which has the topology of Stable
Diffusion 1.5 and was trained on drawn scenes. Tuning takes more than an hour, so the demo loads its result, which is in
`examples/scenes/student`; `make student` computes it. For another checkpoint, replace `load()`, `load_student()` and
the captions.

    python examples/demo.py --out out/demo
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it recommends torchvision, which is not needed here

import numpy as np
import torch
from PIL import Image
from scenes.pipeline import load, load_student
from scenes.quality import Quality, held_out_captions

import sdgraph
from sdgraph.exporters import onnx, ort
from sdgraph.views.format import format_table

PRUNE = "PruneBlocks('bk-sdm-base')"
INHERIT = "HoistInvariants, InheritFeatures('up_blocks.3.resnets.2', part='entry', schedule=Uniform(3), forecast=1)"
STEPS, IMAGES = 25, 24
SHOWN = 8  # images per row of the picture


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = format_table(rows).splitlines()
    return "\n".join([lines[0], "-" * len(max(lines, key=len)), *lines[1:]])


def picture(sides: dict[str, np.ndarray]) -> Image.Image:
    """Draw the first images (N, H, W, 3) in [0, 1] of every side as a row, three times as large."""
    rows = np.concatenate([np.concatenate(list(images[:SHOWN]), 1) for images in sides.values()])
    return Image.fromarray((255 * rows).round().astype(np.uint8).repeat(3, 0).repeat(3, 1))


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pipe = load()
    source = pipe.unet
    _, captions = held_out_captions(IMAGES)

    traced = sdgraph.apply(source, [])
    pruned = sdgraph.apply(source, PRUNE)
    tuned = load_student()  # pruned in the same way, and tuned
    inheriting = sdgraph.apply(tuned, INHERIT)
    exported = onnx.export(inheriting, out / "unet-onnx", overwrite=True)
    same_threads = {"intra_op_num_threads": torch.get_num_threads()}
    on_onnx_runtime = ort.ORTUNet.from_pretrained(
        out / "unet-onnx",
        provider="CPUExecutionProvider",
        session_options=same_threads,
    )
    unets = {
        "source, eager": source,
        "traced, no passes": traced,
        "pruned": pruned,
        "pruned, tuned": tuned,
        "tuned, inheriting": inheriting,
        "the same, ONNX Runtime": on_onnx_runtime,
    }

    quality = Quality()
    evaluations = {
        name: sdgraph.evaluate(pipe, unet, captions, judge=quality, batch=8, num_inference_steps=STEPS)
        for name, unet in unets.items()
    }
    for folder, name in {"tuned": "pruned, tuned", "traced": "traced, no passes"}.items():
        evaluations[name].save(out / folder)
    picture({name: evaluation.images[1] for name, evaluation in evaluations.items()}).save(out / "images.png")
    (out / "graph-before.txt").write_text(f"{traced.graph}\n")
    (out / "graph-after.txt").write_text(f"{pruned.graph}\n")
    for suffix in ("svg", "png"):
        pruned.graph.draw(out / f"graph.{suffix}", before=traced.graph)

    def row(name: str, nodes: str, graph: sdgraph.Graph) -> tuple[str, ...]:
        parameters = sum(p.numel() for p in graph.parameters().values())
        evaluation = evaluations[name]
        source_seconds, seconds = evaluation.seconds
        correct = evaluation.figures["shape and colour"][1], evaluation.figures["place"][1]
        return (
            name,
            nodes,
            f"{parameters / 1e6:.2f} M",
            f"{graph.timetable(STEPS).macs / STEPS / 1e6:.0f}",
            f"{seconds / source_seconds:.2f}",
            f"{evaluation.pairwise['psnr']:.1f} dB",
            *(f"{100 * share:.0f} %" for share in correct),
        )

    rows = [
        ("UNet", "nodes", "parameters", "MMACs", "time/eager", "PSNR", "shape and colour", "place"),
        row("source, eager", "-", traced.graph),
        row("traced, no passes", f"{len(traced.graph.nodes)}", traced.graph),
        row("pruned", f"{len(pruned.graph.nodes)}", pruned.graph),
        row("pruned, tuned", f"{len(tuned.graph.nodes)}", tuned.graph),
        row("tuned, inheriting", f"{len(inheriting.graph.nodes)}", inheriting.graph),
        row("the same, ONNX Runtime", f"{sum(exported.nodes.values())}", inheriting.graph),
    ]
    print(f"\npruned by {PRUNE}\n\n{pruned.report}\n\nexport, compared with PyTorch:\n{exported}\n")
    print(f"inheriting by {INHERIT}\n\n{inheriting.graph.timetable(STEPS)}\n")
    print(f"pruned, tuned:\n{evaluations['pruned, tuned']}\n\n{table(rows)}")
    print(
        f"""
MMACs: million multiply-accumulates of a UNet call at batch 1, the mean over the steps. Time/eager: time of whole images
relative to the source, with {torch.get_num_threads()} thread(s). PSNR: {IMAGES} images of {STEPS} steps, compared with
those of the source. Shape and colour, place: share of images in which a classifier recognises what the caption
says. The model card of the tuned UNet, with 1,000 images: examples/scenes/student/README.md.

{out}/
  images.png                            {SHOWN} images for each row of the table
  tuned/, traced/                       evaluation.json, and evaluation.png: before, after, difference
  graph.svg, graph.png                  the graph with the removed layers marked
  graph-before.txt, graph-after.txt     the graph as text
  unet-onnx/                            the exported UNet"""
    )
    if evaluations["traced, no passes"].pairwise["equal"] != 1:
        raise SystemExit("the images of the traced UNet differ from the source's: this is a defect, please report it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results (out/demo)")
    torch.set_num_threads(1)  # operations this small gain nothing from more threads, and lose much on busy cores
    main(parser.parse_args().out)
