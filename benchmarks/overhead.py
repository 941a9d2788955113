"""The costs of sdgraph and the savings of its passes: on this machine, in one run.

    python -m benchmarks.overhead                                 # all cases on the CPU
    python -m benchmarks.overhead --device cuda --dtype float16   # on a GPU
    python -m benchmarks.overhead --quick                         # a minute: small models, few samples
    python -m benchmarks.overhead forward/sd15/32 apply/sdxl      # some cases

Cases are named `KIND/...`, after the modules of `benchmarks/measuring/cases`. Each case runs in a separate process. The
figures and every sample go to a JSON file, which `python -m benchmarks.report` prints. Finished cases are kept until
then: after an error the same command continues.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .measuring import cases
from .measuring.cases.settings import Settings
from .measuring.documents import report
from .measuring.record import DRAFTS, add_options, begin, place, record


def run_all(names: list[str], settings: Settings, finished: Path, commit: str) -> list[dict[str, Any]]:
    """Return the figures of cases; those that are finished are kept, so that the same command continues after an error.

    Args:
        names: the names of the cases.
        settings: the settings of the measurement.
        finished: the file of finished cases.
        commit: the commit that is measured; figures of another one are not taken.
    """
    request = {"commit": commit, "settings": asdict(settings)}
    kept = json.loads(finished.read_text()) if finished.exists() else {}
    done = {case["case"]: case for case in kept.get("cases", ()) if kept.items() >= request.items()}
    spawn = multiprocessing.get_context("spawn")  # each case starts with an empty memory, and CUDA does not fork
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for name in (bar := tqdm(names, unit="case")):
            bar.set_description(name)
            if name not in done:
                done[name] = pool.submit(cases.run, name, settings).result()
                record(finished, {**request, "cases": list(done.values())})
    return [done[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="time of measuring, per case (120; 5 with --quick)")
    parser.add_argument("--at-least", type=int, help="least number of samples of each call (9; 3 with --quick)")
    parser.add_argument("--name", default="unets", help="end of the name of the file, DEVICE-DTYPE-NAME.json")
    add_options(parser)
    args = parser.parse_args()

    provenance = begin("overhead", args.device, args.draft or args.quick)
    settings = Settings(
        device=args.device,
        dtype=args.dtype,
        batch=args.batch,
        seconds=args.seconds or (5.0 if args.quick else 120.0),
        at_least=args.at_least or (3 if args.quick else 9),
        quick=args.quick,
    )
    names = args.cases or list(cases.QUICK if args.quick else cases.ALL)
    out = place(args, f"{torch.device(args.device).type}-{args.dtype}-{args.name}.json")
    finished = DRAFTS / f"{out.stem}.cases.json"
    measured = run_all(names, settings, finished, provenance["commit"])
    result = {**provenance, "settings": asdict(settings), "cases": measured}
    record(out, result)
    finished.unlink(missing_ok=True)
    print(f"\n{report(result)}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
