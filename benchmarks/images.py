"""Images of a whole pipeline on every engine of this machine, with passes and without, as by `sdgraph bench`.

    python -m benchmarks.checkpoint out/sd15
    python -m benchmarks.images out/sd15 --threads 1

Every engine makes the images in a separate process, so that memory and the first image are those of a deployment.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdgraph.exporters.engines import compare

from .measuring.documents import report
from .measuring.record import ROOT, add_options, begin, place, record

SCENES = ROOT / "examples" / "scenes" / "model"
KARRAS = ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True})
PROMPT = "a large red circle above a small blue square"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", nargs="?", type=Path, default=SCENES, help="folder (default: the scenes model)")
    parser.add_argument("--passes", default="InheritFeatures.damped(2)", help="passes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="inference steps (default: %(default)s)")
    parser.add_argument("--side", type=int, default=256, help="pixels of a side of the images (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of all engines (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="processes for each way (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="timed images per process (default: %(default)s)")
    parser.add_argument("--without", nargs="*", default=[], help="engines to leave out")
    parser.add_argument("--name", default="images", help="name of the result (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    provenance = begin("images", "cpu", args.draft or args.quick)
    out = place(args, f"cpu-{args.name}.json")
    if args.quick:
        args.pipeline, args.steps, args.side = SCENES, 2, 64
        args.without = ["compiled", "ONNX Runtime", "OpenVINO"]
    comparison = compare(
        args.pipeline, args.passes, prompts=[PROMPT], steps=args.steps, call={"height": args.side, "width": args.side},
        scheduler=KARRAS, threads=args.threads, rounds=args.rounds, repeats=args.repeats, leave_out=args.without,
    )  # fmt: skip
    record(out, {**provenance, "threads": args.threads, **comparison.as_dict()})
    print(
        f"{comparison}\n\n{report({**provenance, 'threads': args.threads, **comparison.as_dict()})}\n\nwritten to {out}"
    )


if __name__ == "__main__":
    main()
