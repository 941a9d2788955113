"""Pruned UNets of the small trained Stable Diffusion, and what tuning recovers.

    python benchmarks/tuning.py                                  # all ways of all presets, untuned ones first
    python benchmarks/tuning.py --presets base --ways ours "BK-SDM's losses" --steps 1000
    python benchmarks/tuning.py --presets tiny --ways ours --frontier    # and at 4 to 25 steps, against the teacher
    python benchmarks/tuning.py --quick                          # a smoke test

All ways take the same number of optimizer steps on the same batches. Runs and images are kept in a folder, and the same
command goes on where it was stopped. Quality is measured on held-out captions, every caption with a noise of its own.
The script writes JSON and prints a table.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from tuning_tables import table

import sdgraph
from sdgraph.evaluation import metrics
from sdgraph.passes import PruneBlocks

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from recipes import FULL, PRESETS, RECIPES  # noqa: E402
from scenes.models import scheduler  # noqa: E402
from scenes.pipeline import load  # noqa: E402
from scenes.quality import Quality, held_out_captions  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "tuning"
BATCH = 32
SOLVERS: dict[str, Any] = {
    "DDIM": lambda config: DDIMScheduler.from_config(config),
    "DPM-Solver++ 2M Karras": lambda config: DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True),
}
STEPS = (4, 6, 8, 10, 12, 15, 20, 25)


@torch.no_grad()
def images(pipe: Any, unet: Any, solver: str, steps: int, count: int) -> tuple[np.ndarray, float]:
    """Return images (N, H, W, 3) in [0, 1] of held-out captions, and the seconds of the processor for an image."""
    own = pipe.unet, pipe.scheduler
    pipe.unet, pipe.scheduler = unet, SOLVERS[solver](scheduler().config)
    captions, made, begun = held_out_captions(count)[1], [], time.process_time()
    for first in range(0, count, 32):
        rows = range(first, min(first + 32, count))
        generators = [torch.Generator().manual_seed(row) for row in rows]
        texts = [captions[row] for row in rows]
        made.append(pipe(texts, generator=generators, num_inference_steps=steps, output_type="np").images)
    seconds = (time.process_time() - begun) / count
    pipe.unet, pipe.scheduler = own
    return np.concatenate(made), seconds


class Desk:
    """Measures UNets against the teacher, and keeps what it has measured.

    Args:
        pipe: the pipeline with the teacher.
        folder: where figures and images are kept.
        count: the number of held-out captions.
    """

    def __init__(self, pipe: Any, folder: Path, count: int) -> None:
        self.pipe, self.folder, self.count = pipe, folder, count
        self.quality, self.captions = Quality(), held_out_captions(count)[1]
        pipe.set_progress_bar_config(disable=True)

    def figures(self, name: str, unet: Any, solver: str, steps: int) -> dict[str, Any]:
        """Return the figures of a UNet at some steps of a solver."""
        kept = self._kept(name, solver, steps)
        if not kept.exists():
            made, seconds = images(self.pipe, unet, solver, steps, self.count)
            kept.parent.mkdir(parents=True, exist_ok=True)
            new = kept.with_suffix(".new")
            with new.open("wb") as stream:
                np.savez_compressed(stream, images=np.round(made * 255).astype(np.uint8), seconds=seconds)
            new.replace(kept)
        made = np.load(kept)["images"] / 255.0
        result = {"seconds": float(np.load(kept)["seconds"]), **self.quality(made, self.captions)}
        if name != "teacher":
            teacher = (
                np.load(self.folder / "measured" / f"teacher, {solver}, {steps}, {self.count}.npz")["images"] / 255.0
            )
            result["psnr"] = float(np.median([metrics.psnr(a, b) for a, b in zip(made, teacher, strict=True)]))
            result["ssim"] = metrics.ssim(made, teacher)
        return {"solver": solver, "steps": steps, **result}

    def _kept(self, name: str, solver: str, steps: int) -> Path:
        return self.folder / "measured" / f"{name}, {solver}, {steps}, {self.count}.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--ways", nargs="+", choices=RECIPES, help="default: all of base, and two of small and tiny")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--captions", type=int, default=512, help="held-out captions")
    parser.add_argument("--scenes", type=int, default=20_000, help="training scenes")
    parser.add_argument("--sampling", type=int, default=20, help="steps of DPM-Solver++ 2M Karras to compare at")
    parser.add_argument("--frontier", action="store_true", help="measure at 4 to 25 steps of two solvers as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="smoke test")
    parser.add_argument("--folder", type=Path, help="folder of the runs; default: in out/")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.captions, args.scenes, args.sampling = 2, 4, 64, 2
        args.presets, args.ways = args.presets[:1], (args.ways or ["ours"])[:1]
    torch.set_num_threads(args.threads)
    args.folder = args.folder or ROOT / "out" / f"tuning{'-quick' * args.quick}"
    pipe = load()
    desk = Desk(pipe, args.folder, args.captions)
    rows = functools.cache(lambda source: source(pipe, args.scenes, args.folder / "data"))
    pipe.unet.to(memory_format=torch.channels_last)  # faster by a tenth on a CPU
    teacher = sdgraph.GraphUNet(sdgraph.trace(pipe.unet))
    points = [("DPM-Solver++ 2M Karras", args.sampling)]
    if args.frontier:
        points += [(solver, steps) for solver in SOLVERS for steps in STEPS if (solver, steps) not in points]
    found = {"teacher": entry(desk, "teacher", teacher, points)}
    for preset in args.presets:
        student = sdgraph.apply(pipe.unet, [PruneBlocks(f"bk-sdm-{preset}")])
        found[f"{preset}, untuned"] = entry(desk, f"{preset}, untuned", student, points)
        for way in args.ways or FULL[preset]:
            recipe = RECIPES[way]
            for seed in args.seeds:
                name = f"{preset}, {way}{f', seed {seed}' * (len(args.seeds) > 1)}"
                tuned, report = sdgraph.tune(
                    student,
                    teacher,
                    rows(recipe.data),
                    scheduler=scheduler(),
                    steps=args.steps,
                    out=args.folder / "runs" / f"{preset}-{way}-{args.steps}-{seed}".replace(" ", "-").replace("'", ""),
                    losses=recipe.losses(pipe),
                    train_batch_size=BATCH,
                    learning_rate=args.rate,
                    lr_scheduler="cosine",
                    lr_warmup_steps=max(1, args.steps // 50),
                    proportion_empty_prompts=0.1,
                    use_ema=True,
                    ema_decay=0.995,
                    seed=seed,
                    checkpointing_steps=250,
                    validation_steps=10**9,
                    report_to="none",
                    **recipe.options,
                )
                found[name] = {
                    **entry(desk, f"{name}, {args.steps} steps, seed {seed}", tuned, points),
                    "losses": [str(loss) for loss in recipe.losses(pipe)],
                    "training seconds": float(report.column("seconds")[-1]),
                }
                print(name, found[name]["points"][0], flush=True)
    result = {
        "command": f"python benchmarks/tuning.py {shlex.join(sys.argv[1:])}",
        **measure.circumstances("cpu"),
        "threads": args.threads,
        **{name: getattr(args, name) for name in ("steps", "captions", "scenes", "rate", "seeds", "quick")},
        "batch": BATCH,
        "ways": found,
    }
    out = args.out or (args.folder if args.quick else RESULTS) / f"{result['date'][:10]}-cpu-float32-tuning.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}\n\nwritten to {out}")


def entry(desk: Desk, name: str, unet: sdgraph.GraphUNet, points: list[tuple[str, int]]) -> dict[str, Any]:
    """Return what is known of a UNet: its size, its cost, and its quality at all points."""
    return {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "macs": unet.graph.macs,
        "points": [desk.figures(name, unet, solver, steps) for solver, steps in points],
    }


if __name__ == "__main__":
    main()
