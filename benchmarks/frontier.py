"""Quality against time of the small trained Stable Diffusion, for many methods of generating images.

    python -m benchmarks.frontier                       # solvers at 5 to 50 steps, published methods, and ours
    python -m benchmarks.frontier inheritance           # feature inheritance at 50 steps of DDIM
    python -m benchmarks.frontier attention             # global-regional attention, and token merging
    python -m benchmarks.frontier --quick               # a smoke test
    python -m benchmarks.frontier --device cuda --dtype float16
    python -m benchmarks.frontier --complete            # the figures of finished methods, on captions that all have

The images of every method stay in a folder, and the same command continues an interrupted run. The methods take turns,
some captions at a time, so that after each turn all methods have images of the same captions. Every caption has a
separate noise. On a CPU the time is that of the process, in one thread, so that other processes do not count.

The script writes JSON, a plot, a table, and the ten worst images of each method as a sheet.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import torch
from tqdm import tqdm

from sdgraph.errors import SdgraphError

from .measuring import plots
from .measuring.comparison import ImageStore, MethodImages, compare
from .measuring.documents import report
from .measuring.generator import Generator, Method, joined
from .measuring.methods import SETS
from .measuring.record import ROOT, add_options, begin, place, record


def chosen(args: argparse.Namespace) -> list[Method]:
    """Return the methods to compare; the first one is the reference."""
    reference, *methods = SETS[args.set](args.quick)
    return [reference, *(method for method in methods if args.solvers is None or method.solver in args.solvers)]


def prepare(args: argparse.Namespace) -> None:
    """Prepare a process that generates."""
    global _generator, _methods, _store
    if args.device == "cpu":
        torch.set_num_threads(1)
    _generator = Generator(args.folder, args.device, args.dtype, args.quick)
    _methods, _store = chosen(args), ImageStore(args.folder / "images", args.part)


def generate(task: tuple[int, int]) -> None:
    """Generate the images of a part of the captions: the first caption, and the number of the method."""
    first, number = task
    method = _methods[number]
    images, seconds = _generator.generate(method, range(first, first + _store.part))
    graph = getattr(_generator.unet(method), "graph", None)
    macs = None
    if graph is not None:
        try:
            macs = graph.timetable(method.steps).macs
        except SdgraphError:  # the schedule depends on the features
            macs = None
    passes = joined(graph.passes) if graph is not None else ""
    _store.write(method, first, MethodImages(images, (seconds,), passes, macs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", choices=SETS, default="plans", help="set of methods to compare")
    parser.add_argument("--images", type=int, default=256, help="held-out captions, each with an image by every method")
    parser.add_argument("--solvers", nargs="+", help="only the methods with these solvers; default: all")
    parser.add_argument("--part", type=int, default=8, help="captions of a turn, which are a batch")
    parser.add_argument("--jobs", type=int, default=1, help="processes that generate")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--complete", action="store_true", help="generate nothing: compare the finished methods")
    parser.add_argument("--folder", type=Path, help="folder of images, fits and searches; default: in out/")
    add_options(parser)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    provenance = begin("frontier", args.device, args.draft or args.quick)
    if args.quick:
        args.images, args.part = 2, 2
    kept = f"{args.set}-{args.device}-{args.dtype}-{args.part}{'-quick' * args.quick}"
    args.folder = args.folder or ROOT / "out" / "frontier" / kept
    methods, store = chosen(args), ImageStore(args.folder / "images", args.part)
    firsts = list(range(0, args.images, args.part))
    tasks = [(first, i) for first in firsts for i, each in enumerate(methods) if not store.file(each, first).exists()]
    if args.complete:
        methods = [method for method in methods if store.file(method, 0).exists()]
        firsts = [first for first in firsts if all(store.file(method, first).exists() for method in methods)]
        if len(methods) < 2 or not all(any(other.name == method.unit for other in methods) for method in methods):
            parser.error(f"too little is done in {args.folder}")
    elif tasks:
        with multiprocessing.get_context("spawn").Pool(args.jobs, prepare, (args,)) as pool:
            done = pool.imap_unordered(generate, tasks)
            for _ in tqdm(done, total=len(tasks), desc=args.set, unit="turn", smoothing=0.02):
                pass
    made = {method.name: store.read(method, firsts) for method in methods}
    result = {
        **provenance,
        "dtype": args.dtype,
        "images": len(firsts) * args.part,
        "batch": args.part,
        "quick": args.quick,
        "set": args.set,
        "reference": methods[0].name,
        "methods": compare(methods, made),
    }
    out = place(args, f"{torch.device(args.device).type}-{args.dtype}-{args.set}.json")
    record(out, result)
    plots.frontier(result, out.with_suffix(".svg"))
    plots.worst_images(methods, made, args.folder / "worst")
    print(f"\n{report(result)}\n\nwritten to {out}; the worst images to {args.folder / 'worst'}")


if __name__ == "__main__":
    main()
