"""Sets of removals of the small trained Stable Diffusion: quality against time, before and after one short tuning.

    python -m benchmarks.pruning                                 # presets, random sets and every criterion
    python -m benchmarks.pruning --steps 200 --random 8          # a longer tuning, and more random sets
    python -m benchmarks.pruning --search 300                    # and the sets that a tuning learns in 300 steps
    python -m benchmarks.pruning --quick                         # a smoke test

Every set is measured as it is and after the same number of optimizer steps with the losses of `sdgraph.tune`. Criteria
choose at the time of bk-sdm-base and at a smaller one. The analysis, the runs and the images stay in a folder, the
result is written after every piece, and the same command goes on with what is missing. A predictor that learns from the
measured sets chooses the last one. Beside them stands the whole UNet with fewer steps in the same time.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from pathlib import Path
from typing import Any

import torch

import sdgraph
from examples.scenes.models import scheduler
from examples.scenes.pipeline import load
from examples.scenes.student import RATE, TRAINING, captions, drawn
from sdgraph import Redundancy
from sdgraph.errors import EditError, SpecError
from sdgraph.passes import PruneBlocks
from sdgraph.tuning import LearnedPruning

from .measuring import removal_sets
from .measuring.documents import report
from .measuring.evaluator import Evaluator
from .measuring.ranking import Ranker
from .measuring.recipes import RECIPES
from .measuring.record import ROOT, add_options, begin, begun, place, processor, record
from .measuring.removal_sets import CRITERIA, PRESETS, Calls
from .measuring.solvers import KARRAS
from .measuring.tables import distinct, features

SOLVERS = ("DDIM", KARRAS, "DPM++ 2M", "UniPC")
SAME = (
    "steps",
    "captions",
    "scenes",
    "rate",
    "sampling",
    "prompts",
    "calls",
    "gates",
    "weighings",
    "levels",
    "cost",
    "quick",
)
BASE = PRESETS[0]
CANDIDATES = 500  # random sets among which the predictor chooses
LEARNED = "LambdaRank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of every set")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--random", type=int, default=4, help="random sets of every budget")
    parser.add_argument("--budgets", type=float, nargs="*", default=[], help="default: that of bk-sdm-base, and 0.5")
    parser.add_argument("--cost", choices=("time", "macs"), default="time", help="what budgets are of")
    parser.add_argument("--captions", type=int, default=96, help="held-out captions")
    parser.add_argument("--scenes", type=int, default=4000, help="training scenes")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate")
    parser.add_argument("--sampling", type=int, default=10, help="steps of DPM-Solver++ 2M Karras to compare at")
    parser.add_argument("--prompts", type=int, default=8, help="captions of the analysis")
    parser.add_argument("--calls", type=int, default=6, help="calls of a generation that the analysis measures on")
    parser.add_argument("--gates", type=int, default=100, help="steps in which the gates of the analysis are learned")
    parser.add_argument("--search", type=int, default=0, help="steps in which a tuning learns one more set; 0: none")
    parser.add_argument("--levels", nargs="+", default=["block", "layer"], help="levels of the analysis")
    parser.add_argument("--weighings", type=int, default=60, help="random sets whose times say what removals save")
    parser.add_argument("--turns", type=int, default=20, help="timed calls of a set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="folder of the runs; default: in out/")
    add_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.captions, args.scenes, args.sampling, args.prompts, args.calls = 2, 4, 64, 2, 2, 2
        args.gates, args.levels, args.cost, args.budgets, args.random, args.turns = 2, ["block"], "macs", [0.98], 1, 4
        args.criteria, args.weighings = ["MACs only", "output error"], 4
    torch.set_num_threads(args.threads)
    args.folder = args.folder or ROOT / "out" / f"pruning{'-quick' * args.quick}"
    study = Study(args, begin("pruning", "cpu", args.draft or args.quick))
    study.run()
    print(f"\n{report(study.result)}\n\nwritten to {study.out}")


class Study:
    """The measurements of sets, each piece of which is recorded when it is there.

    Args:
        args: the options.
        provenance: that of what is measured now.
    """

    def __init__(self, args: argparse.Namespace, provenance: dict[str, Any]) -> None:
        self.args, self.provenance = args, provenance
        self.out = place(args, f"cpu-float32-pruning-{args.steps}-steps.json")
        same = {name: getattr(args, name) for name in SAME}
        self.result = begun(self.out, {"benchmark": "pruning", **same, "batch": TRAINING["train_batch_size"]})
        self.pipe = load()
        self.pipe.unet.to(memory_format=torch.channels_last)  # faster by a tenth on a CPU
        self.whole = sdgraph.GraphUNet(sdgraph.trace(self.pipe.unet))
        self.evaluator = Evaluator(self.pipe, self.whole, args.folder / "images", args.captions)
        self.found = self.analysis()
        self.calls = Calls(self.pipe, self.whole, captions(args.prompts), args.sampling, args.calls)

    def run(self) -> None:
        """Measure what is missing."""
        args, cost = self.args, self.args.cost
        self.measure("whole", (), "whole")
        for number, preset in enumerate(PRESETS[: 1 if args.quick else None]):
            paths = tuple(sdgraph.apply(self.whole, [PruneBlocks(preset)], verify=False).graph.removed)
            if number == 0:
                self.measure(preset, paths, "preset")
                budgets = args.budgets or [self.result["methods"][BASE][cost], 0.5]
                self.fewer_steps(budgets)
                self.choices(budgets[0])
            else:
                self.measure(preset, paths, "preset")
        for budget in budgets[1:]:
            self.choices(budget)
        self.learned(budgets[0])

    def analysis(self) -> Redundancy:
        """Return the analysis, whose times are those of the process and of sets, for less noise."""
        args, file = self.args, self.args.folder / "analysis.json"
        if not file.exists():
            sdgraph.analyse(
                self.pipe, captions(args.prompts), levels=args.levels, target=None, calls=args.calls,
                latents=not args.quick, gates=args.gates, pairs=True, folder=args.folder / "analysis",
                num_inference_steps=args.sampling,
            ).save(file)  # fmt: skip
        found, weighed = Redundancy.load(file), self.result.setdefault("weighed", [])
        if len(weighed) < args.weighings:
            sets = filter(self.fits_together, removal_sets.weighings(found))
            for paths in itertools.islice(sets, len(weighed), args.weighings):
                weighed.append([list(paths), self.evaluator.time(self.pruned(paths), turns=args.turns)])
                record(self.out, self.result)
        return removal_sets.weighed(found, weighed)

    def pruned(self, paths: tuple[str, ...]) -> sdgraph.GraphUNet:
        return sdgraph.apply(self.whole, [PruneBlocks(paths)] if paths else [], verify=False)

    def choices(self, budget: float) -> None:
        """Measure what every criterion chooses for a budget, and random sets that leave as much."""
        cost = self.args.cost
        for name in self.args.criteria:
            full = f"{name}, {cost} {budget:.2f}"
            if full in self.result["methods"] and "infeasible" in self.result["methods"][full]:
                continue
            try:
                paths = removal_sets.chosen(self.found, name, {cost: budget})
            except SpecError as error:
                self.result["methods"][full] = {"infeasible": error.hint, **self.provenance}
                record(self.out, self.result)
                continue
            if paths is not None:
                self.measure(full, paths, "criterion", budget)
        if self.args.search:
            self.measure(*self.searched(budget), "criterion", budget)
        for number in range(self.args.random):
            name = f"random {number}, {cost} {budget:.2f}"
            if name not in self.result["methods"]:
                sets = removal_sets.at_random(self.found, cost, budget, 1000 * round(100 * budget) + number)
                paths = next(filter(self.fits_together, itertools.islice(sets, 100)))
            else:
                paths = tuple(self.result["methods"][name]["paths"])
            self.measure(name, paths, "random", budget)

    def searched(self, budget: float) -> tuple[str, tuple[str, ...]]:
        """Return the name and the set that the first steps of a tuning learn. What else they learn is left out."""
        args = self.args
        name = f"learned in {args.search} steps, {args.cost} {budget:.2f}"
        if name in self.result["methods"]:
            return name, tuple(self.result["methods"][name]["paths"])
        budgets: dict[str, Any] = {args.cost: budget}
        tuned, _ = sdgraph.tune(
            self.whole, self.whole, drawn(self.pipe, args.scenes, args.folder / "data"), scheduler=scheduler(),
            learn_pruning=LearnedPruning(args.search, **budgets), max_train_steps=args.search + 1,
            losses=RECIPES["ours"].losses(self.pipe), learning_rate=args.rate, seed=0,
            output_dir=args.folder / "runs" / f"search-{args.search}-{args.cost}-{budget:.2f}",
            **{**TRAINING, "checkpointing_steps": 20},
        )  # fmt: skip
        return name, tuple(tuned.graph.removed)

    def fits_together(self, paths: tuple[str, ...]) -> bool:
        """Return whether regions can be removed together."""
        try:
            self.pruned(paths)
        except EditError:
            return False
        return True

    def measure(self, name: str, paths: tuple[str, ...], kind: str, budget: float | None = None) -> None:
        """Measure the pieces of a set that are missing: sizes, time, errors, and images without and after tuning."""
        methods = self.result["methods"]
        same = next((m for n, m in methods.items() if n != name and m.get("paths") == list(paths)), {})
        mine = methods.setdefault(name, {"paths": list(paths), "kind": kind, "budget": budget, **self.provenance})
        unet = self.pruned(paths)
        self.piece(mine, same, "parameters", lambda: sum(p.numel() for p in unet.parameters()))
        self.piece(mine, same, "macs", lambda: unet.graph.macs / self.whole.graph.macs)
        self.piece(mine, same, "time", lambda: self.evaluator.time(unet, turns=self.args.turns) if paths else 1.0)
        self.piece(mine, same, "timed on", processor)
        self.piece(mine, same, "error", lambda: self.calls.error(unet))
        if paths:
            mine |= removal_sets.predictions(self.found, paths)
            self.piece(mine, same, "untuned", lambda: self.images(unet))
            self.piece(mine, same, "tuned", lambda: self.images(self.tuned(paths), tuned=True))
        else:
            self.piece(mine, same, "untuned", lambda: self.images(self.whole))
        self.evaluated(name, mine)

    def evaluated(self, name: str, mine: dict[str, Any]) -> None:
        points = [mine.get(each, {}).get("psnr") for each in ("untuned", "tuned")]
        print(name, f"time {mine['time']:.3f}", "PSNR", points, flush=True)

    def piece(self, mine: dict[str, Any], same: dict[str, Any], name: str, code: Any) -> None:
        """Measure a piece unless it is there, also of another set with the same removals, and record it."""
        if name not in mine:
            mine[name] = same[name] if name in same else code()
            record(self.out, self.result)

    def images(self, unet: Any, tuned: bool = False) -> dict[str, Any]:
        """Return the figures of a UNet's images."""
        if unet is self.whole:
            return self.evaluator.figures("teacher", unet, KARRAS, self.args.sampling)
        name = f"{key(unet.graph.removed)}{f', {self.args.steps} steps' * tuned}"
        return self.evaluator.figures(name, unet, KARRAS, self.args.sampling)

    def tuned(self, paths: tuple[str, ...]) -> Any:
        """Return a set after the short tuning, which goes on where it was stopped."""
        args = self.args
        recipe = RECIPES["ours"]
        return recipe.train(
            self.whole, PruneBlocks(paths), (), drawn(self.pipe, args.scenes, args.folder / "data"),
            steps=args.steps, output_dir=args.folder / "runs" / f"{key(paths)}-{args.steps}",
            losses=recipe.losses(self.pipe), learning_rate=args.rate, lr_warmup_steps=max(1, args.steps // 50), seed=0,
            scheduler=scheduler(), **{**TRAINING, "checkpointing_steps": 20},
        )  # fmt: skip

    def fewer_steps(self, budgets: list[float]) -> None:
        """Measure the whole UNet with as many steps as fit into the time of each budget, by every solver."""
        for budget, solver in itertools.product(budgets, SOLVERS):
            steps = max(1, int(budget * self.args.sampling))
            name = f"{steps} steps of {solver}"
            mine = self.result["methods"].setdefault(
                name, {"kind": "steps", "budget": budget, "time": steps / self.args.sampling, **self.provenance}
            )
            self.piece(mine, {}, "untuned", lambda: self.evaluator.figures(
                "teacher", self.whole, solver, steps, (KARRAS, self.args.sampling)))  # noqa: B023  # fmt: skip
            self.evaluated(name, mine)

    def learned(self, budget: float) -> None:
        """Measure the set that a predictor chooses which has learned from all other sets."""
        name = f"{LEARNED}, {self.args.cost} {budget:.2f}"
        if name in self.result["methods"]:
            self.measure(name, tuple(self.result["methods"][name]["paths"]), "predictor", budget)
            return
        others = distinct(self.result["methods"].values())
        ranker = Ranker([features(m) for m in others], [m["tuned"]["psnr"] for m in others])
        sets = list(itertools.islice(removal_sets.at_random(self.found, self.args.cost, budget, 1), CANDIDATES))
        rows = [features({"paths": paths, **removal_sets.predictions(self.found, paths)}) for paths in sets]
        ranked = sorted(zip(ranker.scores(rows), sets, strict=True), key=lambda pair: -pair[0])
        paths = next(each for _, each in ranked if self.fits_together(each))
        self.measure(name, paths, "predictor", budget)


def key(paths: Any) -> str:
    """Return a short name of a set of removals."""
    return hashlib.sha256("\n".join(sorted(paths)).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
