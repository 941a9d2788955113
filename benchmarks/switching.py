"""Mixes of UNets over the calls of the small trained Stable Diffusion: quality against time, beside their parts.

    python -m benchmarks.switching             # all images that are missing, and their figures
    python -m benchmarks.switching --times     # and the times, in turns: on a machine that does nothing else
    python -m benchmarks.switching --quick     # a smoke test

The parts are the whole UNet (the teacher), the tuned student of the examples, the teacher without the regions that an
analysis chooses, and the teacher with inherited features, each at several steps of several solvers. The mixes let the
teacher compute the first calls, the last ones, or every other one, and a part the rest. Every image has its own noise,
the same for all methods. The result is written after every method, and the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sdgraph
from examples.scenes.pipeline import load, load_student
from examples.scenes.student import captions
from sdgraph import Redundancy
from sdgraph.passes import InheritFeatures, PruneBlocks
from sdgraph.schedules import ByCall, InTurns, MemberSchedule

from .measuring import plots
from .measuring.documents import report
from .measuring.evaluator import Evaluator
from .measuring.record import ROOT, add_options, begin, begun, place, processor, record
from .measuring.solvers import KARRAS, SOLVERS
from .measuring.timing import spent

SAME = ("captions", "prompts", "quick")
CONVERGED = KARRAS, 50
SHARES = (0.25, 0.5, 0.75)  # of the calls that the first UNet of a mix computes
MIXED = {"DDIM": (4, 6, 8), "DPM++ 2M": (8, 10, 12)}  # the best solvers at these numbers of steps
PLAIN = {"DDIM": (2, 3, 4, 5, 6, 8), "DPM++ 2M": (4, 5, 6, 8, 10, 12, 15), "UniPC": (4, 6, 8, 10, 12), KARRAS: (8, 10)}
MASKS = {"light-mask": 0.9, "lighter-mask": 0.8}  # multiply-accumulates that are left
INHERITING = {"DeepCache": InheritFeatures.deep_cache(2), "damped": InheritFeatures.damped(2)}
ROWS = 16  # samples of a timed call


@dataclass(frozen=True)
class Method:
    """One way of generating the images.

    Args:
        what: the name of the UNet, or of the mix.
        kind: "teacher", "student", "masked", "inheriting" or "mix"; all but the last are parts.
        solver: the name of the solver.
        steps: the number of its steps, each of which is a call.
        members: the name of the UNet that computes each call, in order.
        schedule: the schedule of a mix.
    """

    what: str
    kind: str
    solver: str
    steps: int
    members: tuple[str, ...]
    schedule: MemberSchedule | None = None

    @property
    def name(self) -> str:
        return f"{self.what}, {self.steps} steps of {self.solver}"


def methods(quick: bool) -> Iterator[Method]:
    """Yield all methods: for each solver the parts before their mixes, and masks last, which need an analysis."""
    plain, mixed = ({"DDIM": (2, 4)}, {"DDIM": (4,)}) if quick else (PLAIN, MIXED)
    for solver, steps in plain.items():
        some = {solver: mixed[solver]} if solver in mixed else {}
        for what in ("teacher", "student"):
            yield from (Method(what, what, solver, n, (what,) * n) for n in steps)
        yield from mixes("student", some)
        for what in INHERITING:
            yield from (Method(what, "inheriting", solver, n, (what,) * n) for n in some.get(solver, ()))
    for what in MASKS:
        for solver, steps in mixed.items():
            yield from (Method(what, "masked", solver, n, (what,) * n) for n in steps)
        yield from mixes(what, mixed, shares=(0.5,))


def mixes(part: str, grid: dict[str, tuple[int, ...]], shares: tuple[float, ...] = SHARES) -> Iterator[Method]:
    """Yield the mixes of the teacher and a part: each first for a share of the calls, and both in turns."""
    for solver, steps in grid.items():
        for n in steps:
            for first, second in (("teacher", part), (part, "teacher")):
                for count in dict.fromkeys(round(share * n) for share in shares):
                    if 0 < count < n:
                        names = (first,) * count + (second,) * (n - count)
                        what = f"{count} {first}, {n - count} {second}"
                        yield Method(what, "mix", solver, n, names, ByCall((first, second), (count,)))
                names = tuple((first, second)[call % 2] for call in range(n))
                yield Method(f"{first} and {part if first == 'teacher' else 'teacher'} in turns", "mix", solver, n,
                             names, InTurns((first, second)))  # fmt: skip


class Study:
    """The measurements of methods, each of which is recorded when it is there.

    Args:
        args: the options.
        provenance: that of what is measured now.
    """

    def __init__(self, args: argparse.Namespace, provenance: dict[str, Any]) -> None:
        self.args, self.provenance = args, provenance
        self.out = place(args, "cpu-float32-switching.json")
        same = {name: getattr(args, name) for name in SAME}
        self.result = begun(self.out, {"benchmark": "switching", **same, "converged": list(CONVERGED)})
        self.pipe = load()
        self.pipe.unet.to(memory_format=torch.channels_last)  # faster by a tenth on a CPU
        teacher = sdgraph.GraphUNet(sdgraph.trace(self.pipe.unet))
        self.evaluator = Evaluator(self.pipe, teacher, args.folder / "images", args.captions)
        student = load_student().to(memory_format=torch.channels_last)
        self.unets = {"teacher": teacher, "student": student}
        self.unets |= {name: sdgraph.apply(teacher, passes) for name, passes in INHERITING.items()}

    @cached_property
    def masks(self) -> dict[str, tuple[str, ...]]:
        """Return the regions that each mask leaves out: those with the least output error for its budget."""
        args, file = self.args, self.args.folder / "analysis.json"
        if not file.exists():
            sdgraph.analyse(
                self.pipe, captions(args.prompts), levels=["layer"], target=None, calls=2 if args.quick else 6,
                folder=args.folder / "analysis", num_inference_steps=10,
            ).save(file)  # fmt: skip
        found = Redundancy.load(file)
        return {name: found.cheapest(macs=macs, unet=self.unets["teacher"]).paths for name, macs in MASKS.items()}

    def images(self) -> None:
        """Measure the images of all methods that are missing."""
        for method in methods(self.args.quick):
            masked = sorted({*method.members} & {*MASKS})
            mine = self.result["methods"].setdefault(method.name, {
                "kind": method.kind, "what": method.what, "solver": method.solver, "steps": method.steps,
                "schedule": str(method.schedule or ""), "left out": {name: list(self.masks[name]) for name in masked},
                **self.provenance,
            })  # fmt: skip
            if "converged" not in mine:
                unet, key = self.unet(method), method.what
                figures = partial(self.evaluator.figures, key, unet, method.solver, method.steps)
                mine["converged"] = figures(CONVERGED)
                mine["same"] = figures().get("psnr")
                record(self.out, self.result)
                shown, psnr = mine["converged"]["shape and colour"], mine["converged"]["psnr"]
                print(f"{method.name}: {100 * shown:.1f} % of the captions, {psnr:.1f} dB", flush=True)

    def unet(self, method: Method) -> Any:
        """Return the UNet of a method."""
        if method.schedule is None:
            return self.only(method.members[0])
        return sdgraph.switch({name: self.only(name) for name in dict.fromkeys(method.members)}, method.schedule)

    def only(self, name: str) -> Any:
        """Return a UNet that is no mix."""
        if name in MASKS and name not in self.unets:
            self.unets[name] = sdgraph.apply(self.unets["teacher"], [PruneBlocks(self.masks[name])])
        return self.unets[name]

    def times(self) -> None:
        """Measure the times, in calls of the teacher, of all methods that have images.

        Those of a mix are added up over its calls; a whole generation of one shows what else a switch takes.
        """
        measured = [method for method in methods(self.args.quick) if method.name in self.result["methods"]]
        turns, known = 4 if self.args.quick else 30, self.result.setdefault("calls", {"teacher": 1.0})
        for name in dict.fromkeys(n for m in measured if m.kind in ("student", "masked") for n in m.members):
            known[name] = self.evaluator.time(self.only(name), ROWS, turns)
        record(self.out, self.result)
        switched = sdgraph.switch(
            {each: self.unets[each] for each in ("teacher", "student")}, "InTurns(('teacher', 'student'))"
        )
        self.result["switched"] = self.generation(switched, 8, turns) / (4 + 4 * known["student"])
        inheriting: dict[tuple[str, int], float] = {}
        for method in measured:
            mine = self.result["methods"][method.name]
            if method.kind != "inheriting":
                mine["time"] = sum(known[name] for name in method.members)
            else:
                key = method.what, method.steps
                if key not in inheriting:
                    inheriting[key] = self.generation(self.unets[method.what], method.steps, max(4, turns // 4))
                mine["time"] = inheriting[key]
            mine["timed on"] = processor()
            record(self.out, self.result)

    @torch.no_grad()
    def generation(self, unet: Any, calls: int, turns: int) -> float:
        """Return the time of all calls of a generation, in calls of the teacher, as medians of turns."""
        config, draw = self.pipe.unet.config, torch.Generator().manual_seed(0)
        latents = torch.randn(ROWS, config.in_channels, config.sample_size, config.sample_size, generator=draw)
        text = torch.randn(ROWS, self.pipe.tokenizer.model_max_length, config.cross_attention_dim, generator=draw)
        scheduler = SOLVERS["DDIM"](self.pipe.scheduler.config)
        scheduler.set_timesteps(calls)

        def run(one: Any) -> None:
            with one.expecting(scheduler.timesteps):
                for timestep in scheduler.timesteps:
                    one(latents, timestep, text)

        pairs = [(unet, self.unets["teacher"])[::each] for each in (1, -1)]
        found = []
        for turn in range(turns + 2):
            first, second = pairs[turn % 2]
            took = {id(first): spent(partial(run, first), "cpu"), id(second): spent(partial(run, second), "cpu")}
            found.append((took[id(unet)], took[id(self.unets["teacher"])]))
        mine, its = np.median(found[2:], axis=0)
        return float(calls * mine / its)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=128, help="held-out captions")
    parser.add_argument("--prompts", type=int, default=8, help="captions of the analysis that chooses masks")
    parser.add_argument("--times", action="store_true", help="make no images, and measure the times of those there are")
    parser.add_argument("--folder", type=Path, help="folder of the images; default: in out/")
    add_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.captions, args.prompts = 4, 2
    torch.set_num_threads(1)
    args.folder = args.folder or ROOT / "out" / f"switching{'-quick' * args.quick}"
    study = Study(args, begin("switching", "cpu", args.draft or args.quick))
    if args.quick or not args.times:
        study.images()
    if args.quick or args.times:
        study.times()
        plots.mixes(study.result, study.out.with_suffix(".svg"))
        print(f"\n{report(study.result)}\n\nwritten to {study.out}")


if __name__ == "__main__":
    main()
