"""Pruned UNets of the small trained Stable Diffusion, and what tuning recovers.

    python benchmarks/tuning.py                                  # all ways of all presets
    python benchmarks/tuning.py --presets base --ways ours "BK-SDM's losses" --steps 1000
    python benchmarks/tuning.py --presets tiny --ways ours --frontier    # and at 2 to 25 steps, against the teacher
    python benchmarks/tuning.py --quick                          # a smoke test

All ways take the same number of optimizer steps of the same batch size. Quality is measured on held-out captions, every
caption with a noise of its own. Runs and images are kept in a folder, and the same command goes on where it was
stopped. The script writes JSON after every way, prints a table, and puts images of the ways that have some in the
folder side by side. Ways that the file has already are left as they are, so that a study may take several days or
machines.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import measure
import torch
from desk import Desk
from solvers import KARRAS
from trained import ROOT, load
from tuning_tables import report

import sdgraph

from recipes import FULL, PRESETS, RECIPES, Recipe  # isort: skip
from scenes.models import scheduler  # isort: skip
from scenes.student import RATE, SCENES, TRAINING  # isort: skip

RESULTS = Path(__file__).parent / "results" / "tuning"
SOLVERS = ("DDIM", KARRAS, "DPM++ 2M")
STEPS = (2, 3, 4, 6, 8, 10, 12, 15, 20, 25)
SAME = ("steps", "captions", "scenes", "rate", "sampling", "quick")  # what all ways of a file have in common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--ways", nargs="*", choices=RECIPES, help="default: all of base, and some of small and tiny")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate")
    parser.add_argument("--captions", type=int, default=512, help="held-out captions")
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes")
    parser.add_argument("--sampling", type=int, default=20, help="steps of DPM-Solver++ 2M Karras to compare at")
    parser.add_argument("--frontier", action="store_true", help="measure at 2 to 25 steps of three solvers as well")
    parser.add_argument("--times", action="store_true", help="measure the times again, of ways that are there as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="smoke test")
    parser.add_argument("--folder", type=Path, help="folder of the runs; default: in out/")
    parser.add_argument("--out", type=Path, help="JSON file, which is extended if it is there")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.captions, args.scenes, args.sampling = 8, 4, 64, 2
        args.presets, args.ways = args.presets[:1], ["untuned", "ours"] if args.ways is None else args.ways
    torch.set_num_threads(args.threads)
    args.folder = args.folder or ROOT / "out" / f"tuning{'-quick' * args.quick}"
    out = args.out or (args.folder if args.quick else RESULTS) / f"cpu-float32-{args.steps}-steps.json"
    result = begun(out, args)
    pipe = load()
    rows = functools.cache(lambda source: source(pipe, args.scenes, args.folder / "data"))
    pipe.unet.to(memory_format=torch.channels_last)  # faster by a tenth on a CPU
    teacher = sdgraph.GraphUNet(sdgraph.trace(pipe.unet))
    desk = Desk(pipe, teacher, args.folder / "images", args.captions)
    points = [(KARRAS, args.sampling)]
    if args.frontier:
        points += [(solver, steps) for solver in SOLVERS for steps in STEPS if (solver, steps) not in points]

    def kept_as(name: str) -> str:
        return name if name == "teacher" else f"{name}, {args.steps} steps"

    def missing(name: str) -> bool:
        return len(result["ways"].get(name, {"points": ()})["points"]) < len(points)

    def note(name: str, unet: Any, **facts: Any) -> None:
        """Measure a UNet, or its time alone if its images are measured, and write it down."""
        if missing(name):
            measured = [desk.figures(kept_as(name), unet, solver, steps) for solver, steps in points]
            size = {"parameters": sum(p.numel() for p in unet.parameters()), "macs": unet.graph.macs}
            command = f"python benchmarks/tuning.py {shlex.join(sys.argv[1:])}"
            circumstances = {**measure.circumstances("cpu"), "threads": args.threads, "command": command}
            result["ways"][name] = {**size, **facts, "points": measured, **circumstances}
            print(name, measured[0], flush=True)
        result["ways"][name] |= {"time": desk.time(unet), "timed on": measure.processor()}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")

    if missing("teacher") or args.times:
        note("teacher", teacher)
    for preset in args.presets:
        for way in FULL[preset] if args.ways is None else args.ways:
            for seed in args.seeds:
                name = f"{preset}, {way}{f', seed {seed}' * (seed > 0)}"
                if missing(name):
                    unet, seconds = trained(RECIPES[way], name, preset, seed, pipe, teacher, rows, args)
                    note(name, unet, losses=[str(loss) for loss in RECIPES[way].losses(pipe)], training=seconds)
                elif args.times:
                    note(name, RECIPES[way].untrained(teacher, preset))
    picture = args.folder / "images.png"
    shown = desk.sheet(map(kept_as, result["ways"]), *points[0], picture)
    rows = f"; the rows of {picture} are {', '.join(shown)}" if shown else ""
    print(f"\n{report(result)}\n\nwritten to {out}{rows}")


def begun(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the result that a file holds already, or an empty one.

    Raises:
        SystemExit: its ways were trained or measured otherwise.
    """
    same = {name: getattr(args, name) for name in SAME}
    if not out.exists():
        return {**same, "batch": TRAINING["train_batch_size"], "ways": {}}
    result: dict[str, Any] = json.loads(out.read_text())
    if any(result[name] != value for name, value in same.items()):
        raise SystemExit(f"{out} has ways with other settings, {[result[name] for name in SAME]}: pass another --out")
    return result


def trained(
    recipe: Recipe, name: str, preset: str, seed: int, pipe: Any, teacher: Any, rows: Any, args: argparse.Namespace
) -> tuple[Any, float]:
    """Return a student that was trained in one way, and the seconds of the clock since it was begun or resumed."""
    data, start = rows(recipe.data), time.monotonic()
    student = recipe.train(
        teacher, recipe.pruning(teacher, preset), recipe.passes, data,
        steps=args.steps, scheduler=scheduler(), out=args.folder / "runs" / re.sub(r"\W+", "-", f"{name}-{args.steps}"),
        losses=recipe.losses(pipe), learning_rate=args.rate, lr_warmup_steps=max(1, args.steps // 50), seed=seed,
        **{**TRAINING, **recipe.options},
    )  # fmt: skip
    seconds = time.monotonic() - start
    return (sdgraph.apply(student, list(recipe.finish)) if recipe.finish else student), seconds


if __name__ == "__main__":
    main()
