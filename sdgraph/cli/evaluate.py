"""Compare a pipeline's images before and after a change.

  sdgraph evaluate stable-diffusion-v1-5/stable-diffusion-v1-5 "PruneBlocks('mid_block')" \\
      --prompts prompts.txt --seeds 0 1 --steps 25 --require psnr=20 ssim=0.7 --out evaluation

CHANGE is passes, or a folder of a UNet that was saved or exported. The same prompts and seeds are run before and after.
Exits with 1 if a figure misses its bound.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ..compiler.parse import parse
from ..errors import SpecError, did_you_mean
from ..evaluation.evaluate import PERCEPTUAL, evaluate
from ..evaluation.metrics import CLIP
from .arguments import DTYPES, bound, device, imports, positive, writes
from .sources import load_pipeline, load_unet, read_prompts

FIGURES = ("psnr", "ssim", "largest", "equal", *PERCEPTUAL)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", metavar="PIPELINE", help="folder of a diffusers pipeline, or its name on the hub")
    parser.add_argument("change", metavar="CHANGE", help="passes, or a folder of a saved or exported UNet")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="text file, one prompt per line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each prompt is run with each (default: 0)")
    parser.add_argument("--steps", type=positive, default=50, help="of the scheduler (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    parser.add_argument("--batch", type=positive, default=1, help="images per call (default: %(default)s)")
    parser.add_argument(
        "--require", type=bound, nargs="+", default=[], metavar="NAME=LEAST", help="as in psnr=30 ssim=0.9"
    )
    parser.add_argument("--at-most", type=bound, nargs="+", default=[], metavar="NAME=MOST", help="as in lpips=0.1")
    parser.add_argument("--perceptual", nargs="+", default=[], choices=PERCEPTUAL, help="further figures, downloaded")
    parser.add_argument("--clip", default=CLIP, metavar="MODEL", help="folder or name of the CLIP model (%(default)s)")
    parser.add_argument("--device", type=device, default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for evaluation.json and evaluation.png")
    writes(parser, "out")
    imports(parser)


def run(chosen: argparse.Namespace) -> None:
    bounds = dict(chosen.require), dict(chosen.at_most)
    for name in (*bounds[0], *bounds[1]):
        if name not in FIGURES:
            hint = did_you_mean(name, FIGURES) or f"there are {', '.join(FIGURES)}"
            raise SpecError(f"no figure {name!r} is measured", where="--require, --at-most", hint=hint)
    prompts = read_prompts(chosen.prompts)
    change = _change(chosen.change, chosen.dtype)
    pipe = load_pipeline(chosen.pipeline, chosen.dtype, chosen.device)
    guidance = {} if chosen.guidance is None else {"guidance_scale": chosen.guidance}
    asked = {*chosen.perceptual, *bounds[0], *bounds[1]}
    found = evaluate(
        pipe, change, prompts, seeds=chosen.seeds, batch=chosen.batch, clip=chosen.clip,
        perceptual=[name for name in PERCEPTUAL if name in asked], num_inference_steps=chosen.steps, **guidance,
    )  # fmt: skip
    print(found)
    if chosen.out is not None:
        found.save(chosen.out)
        print(f"written to {chosen.out}: evaluation.json, evaluation.png")
    found.require(**bounds[0], at_most=bounds[1])


def _change(text: str, dtype: str) -> Any:
    folder = Path(text).expanduser()
    if (folder / "model.onnx").is_file():
        from ..exporters.ort.unet import ORTUNet

        return ORTUNet.from_pretrained(folder)
    if folder.is_dir():
        return load_unet(text, dtype)
    if re.fullmatch(r"[\w.~-]*/[\w./-]*", text):
        raise SpecError(f"there is no folder {text}", where="CHANGE", hint="the folder of a UNet, or passes")
    return parse(text)
