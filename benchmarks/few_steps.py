"""Students of a few calls: guidance folded in, trained on the teacher's paths, beside the teacher with fewer steps.

    python -m benchmarks.few_steps                                # 2 calls and 1 of the whole model, 2 of base
    python -m benchmarks.few_steps --students whole-2 --paths 6000 --steps 900
    python -m benchmarks.few_steps --quick                        # a smoke test

A student is a stage: a start, a loss, and a number of calls. All stages read paths that are recorded once. Images of
the same noise are compared with those of the teacher at 24 calls with guidance. Diversity is the variance of the
judge's features over seeds for a caption, as a share of the teacher's. Runs, paths and images stay in a folder, and the
same command continues an interrupted run; the script writes JSON after every student.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import sdgraph
from examples.scenes.models import scheduler
from examples.scenes.pipeline import GUIDANCE, load, load_student
from examples.scenes.student import TRAINING, captions
from sdgraph.tuning import Guided, Loss, Paths, Phased, Trajectory

from .measuring.evaluator import Evaluator
from .measuring.record import ROOT, add_options, begin, begun, place, record

GRID = 24
STEPS = (1, 2, 4, 8, GRID)
SAME = ("steps", "paths", "captions", "rate", "quick")  # what all students of a file have in common


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage: a number of calls, the student that it begins with, and its loss.

    Args:
        calls: the calls of the student.
        start: "teacher" or "base" for the shipped student, or the name of another stage.
        loss: the loss.
        points: the points of the paths that are rows, as for `Paths`.
    """

    calls: int
    start: str = "teacher"
    loss: Loss = Trajectory()  # noqa: RUF009  (frozen)
    points: str = "edges"


STAGES: Mapping[str, Stage] = {
    "whole-2": Stage(2),
    "whole-1": Stage(1),
    "base-2": Stage(2, "base"),
    "whole-2-phased": Stage(2, "whole-2", Phased(), "grid"),
    "whole-4": Stage(4),
    "whole-8": Stage(8),
    "base-1": Stage(1, "base"),
}
FIRST = ("whole-2", "whole-1", "base-2", "whole-2-phased")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", choices=STAGES, default=FIRST)
    parser.add_argument("--paths", type=int, default=1500, help="recorded paths")
    parser.add_argument("--steps", type=int, default=900, help="optimizer steps of a stage")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--captions", type=int, default=128, help="held-out captions")
    parser.add_argument("--teacher", type=int, nargs="+", default=STEPS, help="calls of the teacher to compare with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="folder of the runs; default: in out/")
    add_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.captions, args.paths, args.students, args.teacher = 2, 4, 8, args.students[:1], (2, GRID)
    torch.set_num_threads(args.threads)
    args.folder = args.folder or ROOT / "out" / f"few-steps{'-quick' * args.quick}"
    provenance = begin("few_steps", "cpu", args.draft or args.quick)
    out = place(args, f"cpu-float32-few-steps-{args.paths}-paths-{args.steps}-steps.json")
    same = {name: getattr(args, name) for name in SAME}
    result = begun(out, {"benchmark": "few_steps", **same, "batch": TRAINING["train_batch_size"]})
    pipe = load()
    pipe.unet.to(memory_format=torch.channels_last)
    teacher = sdgraph.GraphUNet(sdgraph.trace(pipe.unet))
    evaluator = Evaluator(pipe, teacher, args.folder / "images", args.captions)
    unguided = Evaluator(pipe, teacher, args.folder / "images", args.captions, guidance=1.0)
    paths = functools.partial(
        Paths, captions(args.paths), pipe, cache=args.folder / "paths", grid=GRID, guidance=Guided(GUIDANCE), batch=50
    )
    variance = functools.cache(lambda: variance_of(evaluator, teacher, GRID, args.quick))

    def note(name: str, unet: Any, calls: int, by: Evaluator = evaluator, **facts: Any) -> None:
        figures = by.figures(name, unet, "DDIM", calls, ("DDIM", GRID))
        facts["diversity"] = diversity = variance_of(by, unet, calls, args.quick) / variance()
        result["methods"][f"{name.split(',')[0]}, {calls} calls"] = {**facts, **figures, **provenance}
        print(name, calls, figures, f"diversity {diversity:.3f}", flush=True)
        record(out, result)

    for calls in args.teacher:
        if f"teacher, {calls} calls" not in result["methods"]:
            note("teacher", teacher, calls, evaluations=2 * calls)
        if f"teacher without guidance, {calls} calls" not in result["methods"]:
            note("teacher without guidance", teacher, calls, unguided, evaluations=calls)
    students: dict[str, Any] = {}

    def student(name: str) -> Any:
        if name not in students:
            students[name] = trained(name, STAGES[name])
        return students[name]

    def trained(name: str, stage: Stage) -> Any:
        first = {"teacher": lambda: teacher, "base": load_student}.get(stage.start, lambda: student(stage.start))()
        begin_time = time.monotonic()
        folder = args.folder / "runs" / f"{name}-{args.paths}-{args.steps}"
        unet, _ = sdgraph.tune(
            first, teacher, paths(calls=stage.calls, points=stage.points), scheduler=scheduler(), output_dir=folder,
            losses=[stage.loss], max_train_steps=args.steps, learning_rate=args.rate,
            lr_warmup_steps=max(1, args.steps // 50), **{**TRAINING, "proportion_empty_prompts": 0.0},
        )  # fmt: skip
        key = f"{name}, {args.paths} paths, {args.steps} steps"
        if f"{name}, {stage.calls} calls" not in result["methods"]:
            seconds = time.monotonic() - begin_time
            facts: dict[str, Any] = {
                "evaluations": stage.calls,
                "loss": str(stage.loss),
                "start": stage.start,
                "training": seconds,
            }
            note(key, unet, stage.calls, **facts)
        return unet

    for name in args.students:
        student(name)
    print(f"written to {out}")


@torch.no_grad()
def variance_of(evaluator: Evaluator, unet: Any, calls: int, quick: bool = False) -> float:
    """Return the variance of the judge's features over 16 seeds for a caption, the mean over 8 captions."""
    seeds, total = 4 if quick else 16, []
    for text in tqdm(evaluator.captions[: 2 if quick else 8], desc="diversity", disable=None):
        images = evaluator.images(unet, "DDIM", calls, [text] * seeds, range(1000, 1000 + seeds))
        features, _ = evaluator.quality.judge.look(np.round(255 * images).astype(np.uint8))
        total.append(float(features.var(0, ddof=1).sum()))
    return float(np.mean(total))


if __name__ == "__main__":
    main()
