"""Compare the images of a pipeline before and after a change.

  sdgraph evaluate stable-diffusion-v1-5/stable-diffusion-v1-5 "PruneBlocks('mid_block')" \\
      --prompts prompts.txt --seeds 0 1 --steps 25 --require psnr=20 ssim=0.7 --out evaluation
  sdgraph evaluate stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt --steps 12 --reference-steps 25

CHANGE is passes, a file of them, or the folder of a saved or exported UNet. The images after the change are compared
with those of the reference, from the same prompts and seeds. The reference is the pipeline itself, with the same steps
and scheduler, unless the --reference options say otherwise. The exit status is 1 if a figure misses its bound.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from ..errors import SpecError, did_you_mean
from ..progress import note
from .arguments import add_imports, add_overwrite, add_pipeline, add_provider, add_threads, bound, positive, seed
from .generation import add_generation, call_of, check_graph_size, check_scheduler, check_size, made_scheduler
from .plans import PASSES, Given, read_passes
from .sources import load_bundle, load_pipeline, load_unet, read_prompts

PERCEPTUAL = ("lpips", "clip")
FIGURES = ("psnr", "ssim", "largest", "equal", *PERCEPTUAL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    parser.add_argument(
        "change", nargs="?", metavar="CHANGE", help=f"{PASSES}; or the folder of a saved or exported UNet",
    )  # fmt: skip
    add_generation(parser)
    parser.add_argument(
        "--reference", metavar="CHANGE",
        help="what to compare with, named as CHANGE is; a tuned UNet is compared with its teacher, for example "
        "(default: the UNet of the pipeline)",
    )  # fmt: skip
    parser.add_argument(
        "--reference-steps", type=positive, metavar="N", help="inference steps of the reference (default: --steps)"
    )
    parser.add_argument(
        "--reference-scheduler", metavar="NAME", help="scheduler of the reference (default: --scheduler)"
    )
    parser.add_argument(
        "--seeds", type=seed, nargs="+", default=[0], metavar="SEED", help="seeds for every prompt (default: 0)"
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
    add_provider(parser, "the fastest that is installed, by the kind of processor")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for evaluation.json and evaluation.png")
    add_overwrite(parser, "out")
    add_threads(parser, "PyTorch", "ONNX Runtime")
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    from ..evaluation.evaluate import evaluate
    from ..evaluation.metrics import CLIP
    from ..runtime.apply import apply
    from ..runtime.unet import GraphUNet
    from ..solvers import name_of

    at_least, at_most = dict(args.require), dict(args.at_most)
    for name in (*at_least, *at_most):
        if name not in FIGURES:
            hint = did_you_mean(name, FIGURES) or f"the figures are {', '.join(FIGURES)}"
            raise SpecError(f"there is no figure named {name!r}", where="--require, --at-most", hint=hint)
    if args.change is None and (args.reference, args.reference_steps, args.reference_scheduler) == (None,) * 3:
        raise SpecError(
            "there is nothing to compare", where="CHANGE",
            hint="name a change, such as passes, or other steps with --reference-steps, or another --reference",
        )  # fmt: skip
    exported = [text for text in (args.change, args.reference) if text and (Path(text) / "model.onnx").is_file()]
    if (args.provider is not None or args.precision is not None) and not exported:
        hint = "export the UNet, and evaluate the folder"
        raise SpecError("a provider of ONNX Runtime runs exported UNets", where="--provider, --precision", hint=hint)
    prompts = read_prompts(args.prompts)
    passes, reference_passes = _passes(args.change), _passes(args.reference)
    passes.check_steps(args.steps)
    call = call_of(args, passes.steps)
    reference_steps = args.reference_steps or call["num_inference_steps"]
    reference_passes.check_steps(reference_steps)
    check_scheduler(args.scheduler, args.pipeline, call["num_inference_steps"])
    reference_scheduler = args.reference_scheduler or args.scheduler
    check_scheduler(reference_scheduler, args.pipeline, reference_steps, "--reference-scheduler")
    for side in (passes, reference_passes):
        check_size(args, args.pipeline, side.passes)
    change, reference = (_loaded(text, args) for text in (args.change, args.reference))
    for unet in (change, reference):
        check_graph_size(args, args.pipeline, unet)
    pipe = load_pipeline(args.pipeline, args.dtype, args.device, args.variant)
    for side in (passes, reference_passes):
        side.check_unet(pipe.unet.config)
    own = pipe.scheduler
    pipe.scheduler = made_scheduler(args.scheduler, own)
    first = copy.copy(pipe)
    first.scheduler = made_scheduler(reference_scheduler, own, "--reference-scheduler")
    if reference_passes.passes:
        first.unet = apply(pipe.unet, reference_passes.passes)
    elif reference is not None:
        first.unet = reference
    after = pipe if args.change is None else passes.passes if change is None else change
    passes.check_solver(name_of(pipe.scheduler))
    reference_passes.check_solver(name_of(first.scheduler))
    if args.reference is None and passes.passes and isinstance(pipe.unet, GraphUNet):
        applied = ", ".join(map(str, pipe.unet.graph.passes)) or "no passes"
        note(f"the reference is the UNet of {args.pipeline} itself ({applied}); --reference names another")
    required = {*args.perceptual, *at_least, *at_most}
    evaluation = evaluate(
        first, after, prompts, pipe=pipe, seeds=args.seeds, batch=args.batch, clip=args.clip or CLIP,
        perceptual=[name for name in PERCEPTUAL if name in required],
        before_call={"num_inference_steps": reference_steps}, **call,
    )  # fmt: skip
    if args.out is not None:
        evaluation.save(args.out)
    print(evaluation)
    if evaluation.alike["equal"] == 1:
        print("the images are equal: both sides compute the same")
    if args.out is not None:
        print(f"written to {args.out}: evaluation.json, evaluation.png")
    evaluation.require(**at_least, at_most=at_most)


def _passes(text: str | None) -> Given:
    """Return the passes that a change consists of; none if it is the folder of a UNet."""
    return Given(()) if text is None or Path(text).expanduser().is_dir() else read_passes(text, folders=True)


def _loaded(text: str | None, args: argparse.Namespace) -> Any:
    """Return the UNet of a folder; None if a change is no folder."""
    if text is None or not Path(text).expanduser().is_dir():
        return None
    if (Path(text).expanduser() / "model.onnx").is_file():
        return load_bundle(text, args.provider, args.precision)
    return load_unet(text, args.dtype).to(args.device)
