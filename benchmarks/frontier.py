"""Quality against time of the small trained Stable Diffusion, for many ways of generating images.

    python benchmarks/frontier.py                       # solvers at 5 to 50 steps, published methods, and ours
    python benchmarks/frontier.py inheritance           # feature inheritance at 50 steps of DDIM
    python benchmarks/frontier.py attention             # global-regional attention, and token merging
    python benchmarks/frontier.py --quick               # a smoke test
    python benchmarks/frontier.py --device cuda --dtype float16
    python benchmarks/frontier.py --complete            # the figures of what is done, on captions that all ways have

The images of every way are kept in a folder, and the same command goes on where it was stopped. The ways take turns,
some captions at a time, so that after each turn all ways have images of the same captions. Every caption has a noise of
its own. On a CPU the time is that of the process, in one thread, so that other processes do not count.

The script writes JSON, a plot, a table, and the ten worst images of each way as a sheet.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drawing
import measure
import numpy as np
import torch
from compared import Kept, figures
from studio import Images, Studio, Way, file_name, joined
from table import report
from tqdm import tqdm
from trained import ROOT
from ways import SETS

RESULTS = Path(__file__).parent / "results"
DEPTH = 65535  # of the kept images, whose rounding is far below all differences


@dataclass(frozen=True)
class Shelf:
    """The kept images of all ways, a file for each way and part of the captions.

    Args:
        folder: of the files.
        part: the number of captions of a file.
    """

    folder: Path
    part: int

    def file(self, way: Way, first: int) -> Path:
        return self.folder / f"{first:04d}" / f"{file_name(way.name)}.npz"

    def keep(self, way: Way, first: int, images: Images, **facts: Any) -> None:
        """Write a file as a whole."""
        file = self.file(way, first)
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        with new.open("wb") as stream:
            np.savez_compressed(stream, images=np.round(DEPTH * images).astype(np.uint16), **facts)
        new.replace(file)

    def read(self, way: Way, firsts: list[int]) -> Kept:
        """Return the images and times of a way."""
        parts = [np.load(self.file(way, first)) for first in firsts]
        images = np.concatenate([part["images"] for part in parts]) / np.float32(DEPTH)
        return Kept(images, tuple(float(part["seconds"]) for part in parts), str(parts[0]["passes"]))


def chosen(settings: argparse.Namespace) -> list[Way]:
    """Return the ways to compare; the first one is the reference."""
    reference, *ways = SETS[settings.ways](settings.quick)
    return [reference, *(way for way in ways if settings.solvers is None or way.solver in settings.solvers)]


def begin(settings: argparse.Namespace) -> None:
    """Prepare a process that generates."""
    global _studio, _ways, _shelf
    if settings.device == "cpu":
        torch.set_num_threads(1)
    _studio = Studio(settings.folder, settings.device, settings.dtype, settings.quick)
    _ways, _shelf = chosen(settings), Shelf(settings.folder / "images", settings.part)


def generate(task: tuple[int, int]) -> None:
    """Generate the images of a part of the captions in one way, by numbers."""
    first, number = task
    way = _ways[number]
    images, seconds = _studio.generate(way, range(first, first + _shelf.part))
    graph = getattr(_studio.unet(way), "graph", None)
    _shelf.keep(way, first, images, seconds=seconds, passes=joined(graph.passes) if graph else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="?", choices=SETS, default="plans", help="ways to compare")
    parser.add_argument("--images", type=int, default=256, help="held-out captions, each with an image in every way")
    parser.add_argument("--solvers", nargs="+", help="only the ways of these solvers; default: all")
    parser.add_argument("--part", type=int, default=8, help="captions of a turn, which are a batch")
    parser.add_argument("--jobs", type=int, default=1, help="processes that generate")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--complete", action="store_true", help="generate nothing: compare the ways that are done")
    parser.add_argument("--quick", action="store_true", help="smoke test with few images, ways and steps")
    parser.add_argument("--folder", type=Path, help="folder to keep images, fits and searches in; default: in out/")
    parser.add_argument("--out", type=Path, help="JSON file; the plot is written beside it")
    args = parser.parse_args()
    if args.quick:
        args.images, args.part = 2, 2
    kept = f"{args.ways}-{args.device}-{args.dtype}-{args.part}{'-quick' * args.quick}"
    args.folder = args.folder or ROOT / "out" / "frontier" / kept
    ways, shelf = chosen(args), Shelf(args.folder / "images", args.part)
    firsts = list(range(0, args.images, args.part))
    tasks = [(first, i) for first in firsts for i, way in enumerate(ways) if not shelf.file(way, first).exists()]
    if args.complete:
        ways = [way for way in ways if shelf.file(way, 0).exists()]
        firsts = [first for first in firsts if all(shelf.file(way, first).exists() for way in ways)]
        if len(ways) < 2 or not all(any(other.name == way.unit for other in ways) for way in ways):
            parser.error(f"too little is done in {args.folder}")
    elif tasks:
        with multiprocessing.get_context("spawn").Pool(args.jobs, begin, (args,)) as pool:
            done = pool.imap_unordered(generate, tasks)
            for _ in tqdm(done, total=len(tasks), desc=args.ways, unit="turn", smoothing=0.02):
                pass
    images = {way.name: shelf.read(way, firsts) for way in ways}
    result = {
        **measure.circumstances(args.device),
        "dtype": args.dtype,
        "images": len(firsts) * args.part,
        "batch": args.part,
        "quick": args.quick,
        "set": args.ways,
        "reference": ways[0].name,
        "ways": figures(ways, images),
    }
    name = f"{result['date'][:10]}-{torch.device(args.device).type}-{args.dtype}-{args.ways}.json"
    out = args.out or (ROOT / "out" / "bench" if args.quick else RESULTS) / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    drawing.plot(result, out.with_suffix(".svg"))
    drawing.sheets(ways, images, args.folder / "worst")
    print(f"\n{report(result)}\n\nwritten to {out}; the worst images to {args.folder / 'worst'}")


if __name__ == "__main__":
    main()
