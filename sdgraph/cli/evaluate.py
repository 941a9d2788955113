"""Compare the images of a pipeline before and after a change of its UNet.

  sdgraph evaluate stable-diffusion-v1-5/stable-diffusion-v1-5 "PruneBlocks('mid_block')" \\
      --prompts prompts.txt --seeds 0 1 --steps 25 --require psnr=20 ssim=0.7 --out evaluation

CHANGE is passes as text, or the folder of a saved or exported UNet. Both sides generate the same prompts from the same
seeds. The exit status is 1 if a figure misses its bound.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ..errors import SpecError, did_you_mean
from .arguments import add_generation, add_imports, add_overwrite, add_pipeline, add_threads, bound, positive
from .sources import load_pipeline, load_unet, read_prompts

PERCEPTUAL = ("lpips", "clip")
FIGURES = ("psnr", "ssim", "largest", "equal", *PERCEPTUAL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    parser.add_argument("change", metavar="CHANGE", help="passes as text, or the folder of a saved or exported UNet")
    add_generation(parser)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="seeds for every prompt (default: 0)"
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="images per pipeline call (default: %(default)s)"
    )
    parser.add_argument(
        "--require", type=bound, nargs="+", default=[], metavar="NAME=MIN",
        help=f"smallest values of figures, such as psnr=30 ssim=0.9; the figures are {', '.join(FIGURES)}",
    )  # fmt: skip
    parser.add_argument(
        "--at-most", type=bound, nargs="+", default=[], metavar="NAME=MAX", help="largest values, such as lpips=0.1"
    )
    parser.add_argument(
        "--perceptual", nargs="+", default=[], choices=PERCEPTUAL, help="further figures, whose models are downloaded"
    )
    parser.add_argument(
        "--clip", metavar="MODEL", help="folder of a CLIP model, or its name on the hub (default: OpenAI's ViT-B/16)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for evaluation.json and evaluation.png")
    add_overwrite(parser, "out")
    add_threads(parser, "PyTorch", "ONNX Runtime")
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    from ..evaluation.evaluate import evaluate
    from ..evaluation.metrics import CLIP

    at_least, at_most = dict(args.require), dict(args.at_most)
    for name in (*at_least, *at_most):
        if name not in FIGURES:
            hint = did_you_mean(name, FIGURES) or f"the figures are {', '.join(FIGURES)}"
            raise SpecError(f"there is no figure named {name!r}", where="--require, --at-most", hint=hint)
    prompts = read_prompts(args.prompts)
    change = _change(args.change, args.dtype)
    pipe = load_pipeline(args.pipeline, args.dtype, args.device, args.variant)
    guidance = {} if args.guidance is None else {"guidance_scale": args.guidance}
    required = {*args.perceptual, *at_least, *at_most}
    evaluation = evaluate(
        pipe, change, prompts, seeds=args.seeds, batch=args.batch, clip=args.clip or CLIP,
        perceptual=[name for name in PERCEPTUAL if name in required], num_inference_steps=args.steps, **guidance,
    )  # fmt: skip
    print(evaluation)
    if args.out is not None:
        evaluation.save(args.out)
        print(f"written to {args.out}: evaluation.json, evaluation.png")
    evaluation.require(**at_least, at_most=at_most)


def _change(text: str, dtype: str) -> Any:
    """Load the UNet of a folder, or parse passes."""
    from ..compiler.parse import parse

    folder = Path(text).expanduser()
    if (folder / "model.onnx").is_file():
        from ..exporters.ort.unet import ORTUNet

        return ORTUNet.from_pretrained(folder)
    if folder.is_dir():
        return load_unet(text, dtype)
    if re.fullmatch(r"[\w.~-]*/[\w./-]*", text):
        raise SpecError(f"there is no folder {text}", where="CHANGE", hint="give the folder of a UNet, or passes")
    return parse(text)
