"""The command line: `sdgraph COMMAND --help`, or `python -m sdgraph COMMAND --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import SdgraphError, SpecError
from .search import search
from .spec import parse

SEARCH = """
Find at which calls of a generation features are computed anew, so that it costs the least quality within a budget.

Each CANDIDATE is an InheritFeatures pass whose schedule is replaced by the one that is found, for example

  sdgraph search stable-diffusion-v1-5 "InheritFeatures.deep_cache()" --prompts prompts.txt --budget 0.4

To extrapolate: "InheritFeatures('up_blocks.-1.resnets.-1', part='entry', forecast=1)". 
Measurements are kept in --folder: a stopped search goes on there, and another budget costs one generation.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 for what cannot be done, which is said on stderr."""
    parser = argparse.ArgumentParser(prog="sdgraph", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _search_command(commands)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except (SdgraphError, OSError) as error:
        print(f"sdgraph: {error}", file=sys.stderr)
        return 2
    return 0


def _search_command(commands: Any) -> None:
    parser = commands.add_parser(
        "search",
        help="find a schedule for feature inheritance",
        description=SEARCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_search)
    parser.add_argument("pipeline", help="directory of a diffusers pipeline, or its name on the hub")
    parser.add_argument("candidates", nargs="+", metavar="CANDIDATE", help="a pass; several lie beside each other")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt per line; 4 to 8 suffice")
    parser.add_argument("--budget", type=float, required=True, help="multiply-accumulates, as a share of all")
    parser.add_argument("--steps", type=int, default=50, help="of the scheduler (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    parser.add_argument("--reach", type=int, default=10, help="most calls between refreshes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--folder", type=Path, default=Path("out/search"), help="of measurements (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the passes, their timetable and errors")
    parser.add_argument("--picture", type=Path, help="SVG or PNG file for a picture of calls against sites")


def _search(chosen: argparse.Namespace) -> None:
    import torch
    from diffusers import DiffusionPipeline

    candidates = parse(", ".join(chosen.candidates))
    prompts = [line.strip() for line in chosen.prompts.read_text().splitlines() if line.strip()]
    if not prompts:
        raise SpecError("there are no prompts in it", where=str(chosen.prompts), cure="one prompt per line")
    pipe = DiffusionPipeline.from_pretrained(chosen.pipeline, torch_dtype=getattr(torch, chosen.dtype))
    pipe = pipe.to(chosen.device)
    pipe.set_progress_bar_config(disable=True)
    guidance = {} if chosen.guidance is None else {"guidance_scale": chosen.guidance}
    found = search(
        pipe, candidates, prompts, budget=chosen.budget, seed=chosen.seed, reach=chosen.reach, folder=chosen.folder,
        num_inference_steps=chosen.steps, **guidance,
    )  # fmt: skip
    print(found)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(found.as_dict(), indent=1) + "\n")
    if chosen.picture:
        chosen.picture.parent.mkdir(parents=True, exist_ok=True)
        found.timetable.picture(chosen.picture)


if __name__ == "__main__":
    sys.exit(main())
