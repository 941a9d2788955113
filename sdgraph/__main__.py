"""sdgraph's command line. `sdgraph COMMAND --help` says more; `python -m sdgraph` is the same."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import SdgraphError, SpecError
from .spec import parse

SEARCH = """
Find at which calls of a generation features are computed anew, so that it costs the least quality within a budget.

Each CANDIDATE is an InheritFeatures pass whose schedule is replaced by the one that is found, for example

  sdgraph search stable-diffusion-v1-5 "InheritFeatures.deep_cache()" --prompts prompts.txt --budget 0.4

To extrapolate: "InheritFeatures('up_blocks.-1.resnets.-1', part='entry', forecast=1)".
Measurements are kept in --folder: a stopped search goes on there, and another budget costs one generation.
"""
EXPORT = """
Apply passes to a UNet and write it for ONNX Runtime: one graph for each kind of call, one file of weights.

  sdgraph export stable-diffusion-v1-5 --passes "CleanUp, InheritFeatures.deep_cache(3)" --out unet-ort

Nothing appears in --out unless every graph agrees with PyTorch.
"""
INSPECT = "Say what an exported directory holds: its graphs, what they inherit and when, its files."
BENCH = "Time an exported directory: each graph, and whole generations, on random inputs."


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 for what cannot be done, which is said on stderr."""
    parser = argparse.ArgumentParser(prog="sdgraph", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _search_options(_command(commands, "search", _search, "find a schedule for feature inheritance", SEARCH))
    _export_options(_command(commands, "export", _export, "apply passes and write for ONNX Runtime", EXPORT))
    _inspect_options(_command(commands, "inspect", _inspect, "say what an exported directory holds", INSPECT))
    _bench_options(_command(commands, "bench", _bench, "time an exported directory", BENCH))
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except (SdgraphError, OSError) as error:
        print(f"sdgraph: {error}", file=sys.stderr)
        return 2
    return 0


def _command(commands: Any, name: str, run: Any, brief: str, text: str) -> Any:
    kind = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=brief, description=text, formatter_class=kind)
    parser.set_defaults(run=run)
    return parser


def _write(path: Path | None, plain: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plain, indent=1) + "\n")


# -- search -----------------------------------------------------------------------------------------------------------


def _search_options(parser: Any) -> None:
    parser.add_argument("pipeline", help="directory of a diffusers pipeline, or its name on the hub")
    parser.add_argument("candidates", nargs="+", metavar="CANDIDATE", help="a pass; several lie beside each other")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt per line; 16 to 32 of them")
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

    from .search import search

    candidates = parse(", ".join(chosen.candidates))
    prompts = [line.strip() for line in chosen.prompts.read_text().splitlines() if line.strip()]
    if not prompts:
        raise SpecError("there are no prompts in it", where=str(chosen.prompts), cure="one prompt per line")
    pipe = DiffusionPipeline.from_pretrained(chosen.pipeline).to(chosen.device, getattr(torch, chosen.dtype))
    pipe.set_progress_bar_config(disable=True)
    guidance = {} if chosen.guidance is None else {"guidance_scale": chosen.guidance}
    found = search(
        pipe, candidates, prompts, budget=chosen.budget, seed=chosen.seed, reach=chosen.reach, folder=chosen.folder,
        num_inference_steps=chosen.steps, **guidance,
    )  # fmt: skip
    print(found)
    _write(chosen.out, found.as_dict())
    if chosen.picture:
        chosen.picture.parent.mkdir(parents=True, exist_ok=True)
        found.timetable.picture(chosen.picture)


# -- export -----------------------------------------------------------------------------------------------------------


def _export_options(parser: Any) -> None:
    parser.add_argument("source", help="directory of a pipeline or a UNet, or the name of one on the hub")
    parser.add_argument(
        "--passes", default="", help="such as \"PruneBlocks('bk-sdm-base'), InheritFeatures.deep_cache(3)\""
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to be made")
    parser.add_argument("--artefact", default="portable", choices=("portable", "cuda"), help="cuda: fused operators")
    parser.add_argument("--layout", default="variants", choices=("variants", "single"), help="single: one file")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    parser.add_argument("--calls", type=int, default=50, help="of the UNet per generation (default: %(default)s)")
    parser.add_argument("--inputs", nargs="*", default=(), help="optional inputs, as mid_block_additional_residual")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def _export(chosen: argparse.Namespace) -> None:
    import torch

    from .apply import apply
    from .exporters.onnx import check_target, export

    check_target(chosen.overwrite, chosen.out)  # before minutes are spent
    unet = apply(_unet(chosen.source, getattr(torch, chosen.dtype)), chosen.passes)
    if unet.graph.passes:
        print(unet.report)
    options = {name: getattr(chosen, name) for name in ("artefact", "layout", "calls", "inputs", "overwrite")}
    print(export(unet, chosen.out, **options))


def _unet(source: str, dtype: Any) -> Any:
    """A UNet from its own directory, or from that of a pipeline; diffusers' or ours."""
    from diffusers import UNet2DConditionModel

    from .unet import GraphUNet

    folder = Path(source) / "unet" if (Path(source) / "model_index.json").exists() else Path(source)
    if (folder / "config.json").exists() and (folder / "sdgraph.json").exists():
        return GraphUNet.from_pretrained(folder, torch_dtype=dtype)
    if (folder / "config.json").exists():
        return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype)
    if folder.exists():
        raise SpecError("there is neither a pipeline nor a UNet", where=source, cure="a directory with config.json")
    return UNet2DConditionModel.from_pretrained(source, subfolder="unet", torch_dtype=dtype)


# -- inspect and bench ------------------------------------------------------------------------------------------------


def _inspect_options(parser: Any) -> None:
    parser.add_argument("directory", type=Path)
    parser.add_argument("--calls", type=int, default=50, help="of the generation to show (default: %(default)s)")
    parser.add_argument("--no-verify", action="store_true", help="do not compare files with their hashes")


def _inspect(chosen: argparse.Namespace) -> None:
    from .exporters.contents import contents

    print(contents(chosen.directory, chosen.calls, verify=not chosen.no_verify))


def _bench_options(parser: Any) -> None:
    parser.add_argument("directory", type=Path)
    parser.add_argument("--calls", type=int, default=20, help="of a generation (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the latents (default: the model's)")
    parser.add_argument("--batch", type=int, default=2, help="guidance doubles that of the images (default: 2)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--provider", help="of ONNX Runtime (default: CUDA where there is a device, else the CPU)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")


def _bench(chosen: argparse.Namespace) -> None:
    from .exporters.bench import bench
    from .exporters.ort import ORTUNet

    unet = ORTUNet.from_pretrained(chosen.directory, provider=chosen.provider)
    figures = bench(unet, chosen.calls, chosen.size, chosen.batch, chosen.repeats)
    print(figures)
    _write(chosen.out, figures.as_dict())


if __name__ == "__main__":
    sys.exit(main())
