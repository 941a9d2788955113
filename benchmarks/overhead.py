"""What sdgraph costs, and what pruning saves: on this machine, in one run.

    python benchmarks/overhead.py                                 # all cases on the CPU
    python benchmarks/overhead.py --device cuda --dtype float16   # on a GPU
    python benchmarks/overhead.py --quick                         # a minute: small models, few samples
    python benchmarks/overhead.py forward/sd15/32 apply/sdxl      # some cases

Cases are named `KIND/...`; each module of `benchmarks/cases` says what its kind measures and how. Each case runs in a
process of its own. The figures and every sample go to a JSON file, which `benchmarks/table.py` prints.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cases
import measure
import torch
from cases.settings import Settings
from table import report
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"


def run_all(names: list[str], settings: Settings) -> dict[str, Any]:
    done = []
    spawn = multiprocessing.get_context("spawn")  # each case starts with an empty memory, and CUDA does not fork
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for case in (bar := tqdm(names, unit="case")):
            bar.set_description(case)
            done.append(pool.submit(cases.run, case, settings).result())
    return {**measure.circumstances(settings.device), "settings": asdict(settings), "cases": done}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="of timing per case (120; 5 with --quick)")
    parser.add_argument("--at-least", type=int, help="samples of each call, whatever the time (9; 3 with --quick)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file (benchmarks/results/DATE-DEVICE.json; not with --quick)")
    chosen = parser.parse_args()

    settings = Settings(
        device=chosen.device,
        dtype=chosen.dtype,
        batch=chosen.batch,
        seconds=chosen.seconds or (5.0 if chosen.quick else 120.0),
        at_least=chosen.at_least or (3 if chosen.quick else 9),
        quick=chosen.quick,
    )
    result = run_all(chosen.cases or list(cases.QUICK if chosen.quick else cases.ALL), settings)
    name = f"{result['date'][:10]}-{torch.device(settings.device).type}-{settings.dtype}.json"
    out = chosen.out or (Path("out/bench") if chosen.quick else RESULTS) / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{report(result)}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
