"""Pruned UNets of the small trained Stable Diffusion, and the quality that tuning recovers.

    python -m benchmarks.tuning                                  # all methods of all presets
    python -m benchmarks.tuning --presets base --methods ours "BK-SDM's losses" --steps 1000
    python -m benchmarks.tuning --presets tiny --methods ours --frontier    # at 2 to 25 steps, against the teacher
    python -m benchmarks.tuning --quick                          # a smoke test

All methods take the same number of optimizer steps of the same batch size. Quality is measured on held-out captions,
each with a separate noise. Runs and images stay in a folder, and the same command continues an interrupted run. The
script writes JSON after every method, prints a table, and writes a sheet of the images. A file of results is extended
by the methods that it lacks, so that a study may take several days or machines; each has its own commit and command.
"""

from __future__ import annotations

import argparse
import functools
import re
import time
from pathlib import Path
from typing import Any

import torch

import sdgraph
from examples.scenes.models import scheduler
from examples.scenes.pipeline import load
from examples.scenes.student import RATE, SCENES, TRAINING

from .measuring.documents import report
from .measuring.evaluator import Evaluator
from .measuring.recipes import FULL, PRESETS, RECIPES, Recipe
from .measuring.record import ROOT, add_options, begin, begun, place, processor, record
from .measuring.solvers import KARRAS

SOLVERS = ("DDIM", KARRAS, "DPM++ 2M")
STEPS = (2, 3, 4, 6, 8, 10, 12, 15, 20, 25)
SAME = ("steps", "captions", "scenes", "rate", "sampling", "quick")  # what all methods of a file have in common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument(
        "--methods", nargs="*", choices=RECIPES, help="default: all of base, and some of small and tiny"
    )
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate")
    parser.add_argument("--captions", type=int, default=512, help="held-out captions")
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes")
    parser.add_argument("--sampling", type=int, default=20, help="steps of DPM-Solver++ 2M Karras to compare at")
    parser.add_argument("--frontier", action="store_true", help="measure at 2 to 25 steps of three solvers as well")
    parser.add_argument(
        "--times", action="store_true", help="measure the times again, of methods that are there as well"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="folder of the runs; default: in out/")
    add_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.captions, args.scenes, args.sampling = 8, 4, 64, 2
        args.presets, args.methods = args.presets[:1], ["untuned", "ours"] if args.methods is None else args.methods
    torch.set_num_threads(args.threads)
    args.folder = args.folder or ROOT / "out" / f"tuning{'-quick' * args.quick}"
    provenance = begin("tuning", "cpu", args.draft or args.quick)
    out = place(args, f"cpu-float32-tuning-{args.steps}-steps.json")
    same = {name: getattr(args, name) for name in SAME}
    result = begun(out, {"benchmark": "tuning", **same, "batch": TRAINING["train_batch_size"]})
    pipe = load()
    rows = functools.cache(lambda source: source(pipe, args.scenes, args.folder / "data"))
    pipe.unet.to(memory_format=torch.channels_last)  # faster by a tenth on a CPU
    teacher = sdgraph.GraphUNet(sdgraph.trace(pipe.unet))
    evaluator = Evaluator(pipe, teacher, args.folder / "images", args.captions)
    points = [(KARRAS, args.sampling)]
    if args.frontier:
        points += [(solver, steps) for solver in SOLVERS for steps in STEPS if (solver, steps) not in points]

    def kept_as(name: str) -> str:
        return name if name == "teacher" else f"{name}, {args.steps} steps"

    def missing(name: str) -> bool:
        return len(result["methods"].get(name, {"points": ()})["points"]) < len(points)

    def note(name: str, unet: Any, **facts: Any) -> None:
        """Measure a UNet, or only its time if its images are measured, and record it."""
        if missing(name):
            measured = [evaluator.figures(kept_as(name), unet, solver, steps) for solver, steps in points]
            size = {"parameters": sum(p.numel() for p in unet.parameters()), "macs": unet.graph.macs}
            result["methods"][name] = {**size, **facts, "points": measured, **provenance}
            print(name, measured[0], flush=True)
        result["methods"][name] |= {"time": evaluator.time(unet), "timed on": processor()}
        record(out, result)

    if missing("teacher") or args.times:
        note("teacher", teacher)
    for preset in args.presets:
        for method in FULL[preset] if args.methods is None else args.methods:
            for seed in args.seeds:
                name = f"{preset}, {method}{f', seed {seed}' * (seed > 0)}"
                if missing(name):
                    unet, seconds = trained(RECIPES[method], name, preset, seed, pipe, teacher, rows, args)
                    note(name, unet, losses=[str(loss) for loss in RECIPES[method].losses(pipe)], training=seconds)
                elif args.times:
                    note(name, RECIPES[method].untrained(teacher, preset))
    picture = args.folder / "images.png"
    shown = evaluator.sheet(map(kept_as, result["methods"]), *points[0], picture)
    rows = f"; the rows of {picture} are {', '.join(shown)}" if shown else ""
    print(f"\n{report(result)}\n\nwritten to {out}{rows}")


def trained(
    recipe: Recipe, name: str, preset: str, seed: int, pipe: Any, teacher: Any, rows: Any, args: argparse.Namespace
) -> tuple[Any, float]:
    """Return a student that was trained by a recipe, and the seconds of the clock since it was begun or resumed."""
    data, start = rows(recipe.data), time.monotonic()
    student = recipe.train(
        teacher, recipe.pruning(teacher, preset), recipe.passes, data,
        steps=args.steps, scheduler=scheduler(),
        output_dir=args.folder / "runs" / re.sub(r"\W+", "-", f"{name}-{args.steps}"),
        losses=recipe.losses(pipe), learning_rate=args.rate, lr_warmup_steps=max(1, args.steps // 50), seed=seed,
        **{**TRAINING, **recipe.options},
    )  # fmt: skip
    seconds = time.monotonic() - start
    return (sdgraph.apply(student, list(recipe.finish)) if recipe.finish else student), seconds


if __name__ == "__main__":
    main()
