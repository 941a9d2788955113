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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..errors import SpecError, did_you_mean
from ..progress import note
from .arguments import add_imports, add_number, add_output, add_pipeline, add_provider, add_threads, bound, seed
from .generation import add_generation, call_of, check_graph_size, check_scheduler, check_size, made_scheduler
from .plans import PASSES, RequestedPasses, read_passes
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
        help="passes or a folder to compare with, in the form of CHANGE, such as the teacher of a tuned UNet "
        "(default: the UNet of the pipeline)",
    )  # fmt: skip
    add_number(parser, "--reference-steps", "inference steps of the reference (default: --steps)")
    parser.add_argument(
        "--reference-scheduler", metavar="NAME", help="scheduler of the reference (default: --scheduler)"
    )
    parser.add_argument(
        "--seeds", type=seed, nargs="+", default=[0], metavar="SEED", help="seeds for every prompt (default: 0)"
    )
    add_number(parser, "--batch", "images per pipeline call", default=1)
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
    add_output(parser, "--out", "DIR", "folder for evaluation.json and evaluation.png")
    add_threads(parser, "PyTorch", "ONNX Runtime")
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    from ..evaluation.evaluate import evaluate
    from ..evaluation.metrics import CLIP
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
    change, reference = _Side.of(args.change), _Side.of(args.reference)
    if (args.provider is not None or args.precision is not None) and not (change.exported or reference.exported):
        hint = "export the UNet, and evaluate the folder"
        raise SpecError("a provider of ONNX Runtime runs exported UNets", where="--provider, --precision", hint=hint)
    prompts = read_prompts(args.prompts)
    call = call_of(args, change.requested)
    reference_steps = args.reference_steps or call["num_inference_steps"]
    reference_scheduler = args.reference_scheduler or args.scheduler
    reference.requested.check_steps(reference_steps)
    check_scheduler(reference_scheduler, args.pipeline, reference_steps, "--reference-scheduler")
    check_size(args, args.pipeline, reference.requested.passes)
    unets = [side.loaded(args) for side in (change, reference)]
    pipe = load_pipeline(args.pipeline, args.dtype, args.device, args.variant)
    for side in (change, reference):
        side.requested.check_unet(pipe.unet.config)
    own = pipe.scheduler
    pipe.scheduler = made_scheduler(args.scheduler, own)
    before = copy.copy(pipe)
    before.scheduler = made_scheduler(reference_scheduler, own, "--reference-scheduler")
    before.unet = reference.unet(pipe, unets[1])
    change.requested.check_solver(name_of(pipe.scheduler))
    reference.requested.check_solver(name_of(before.scheduler))
    if args.reference is None and change.requested.passes and isinstance(pipe.unet, GraphUNet):
        applied = ", ".join(map(str, pipe.unet.graph.passes)) or "no passes"
        note(f"the reference is the UNet of {args.pipeline} itself ({applied}); --reference names another")
    after = pipe if args.change is None else change.requested.passes if unets[0] is None else unets[0]
    required = {*args.perceptual, *at_least, *at_most}
    evaluation = evaluate(
        before, after, prompts, pipe=pipe, seeds=args.seeds, batch=args.batch, clip=args.clip or CLIP,
        perceptual=[name for name in PERCEPTUAL if name in required],
        before_call={"num_inference_steps": reference_steps}, **call,
    )  # fmt: skip
    if args.out is not None:
        evaluation.save(args.out)
    print(evaluation)
    if evaluation.pairwise["equal"] == 1:
        print("the images are equal: both sides compute the same")
    if args.out is not None:
        print(f"written to {args.out}: evaluation.json, evaluation.png")
    evaluation.require(**at_least, at_most=at_most)


@dataclass(frozen=True)
class _Side:
    """One side of a comparison, as CHANGE or --reference names it.

    Args:
        requested: the passes; none if the side is the folder of a UNet, or the UNet of the pipeline.
        folder: the folder of a saved or exported UNet, or None.
    """

    requested: RequestedPasses
    folder: str | None = None

    @classmethod
    def of(cls, text: str | None) -> Self:
        """Return the side that a text names; without one, the UNet of the pipeline."""
        if text is None or Path(text).expanduser().is_dir():
            return cls(RequestedPasses(()), text)
        return cls(read_passes(text, folders=True))

    @property
    def exported(self) -> bool:
        """Whether the side is an exported UNet."""
        from ..untrusted import is_exported

        return self.folder is not None and is_exported(Path(self.folder).expanduser())

    def loaded(self, args: argparse.Namespace) -> Any:
        """Return the UNet of the folder, which must cover the size of the images; None without a folder."""
        if self.folder is None:
            return None
        if self.exported:
            unet = load_bundle(self.folder, args.provider, args.precision)
        else:
            unet = load_unet(self.folder, args.dtype).to(args.device)
        check_graph_size(args, args.pipeline, unet)
        return unet

    def unet(self, pipe: Any, loaded: Any) -> Any:
        """Return the UNet of this side: the loaded one, or that of the pipeline after the passes."""
        from ..runtime.apply import apply

        if self.requested.passes:
            return apply(pipe.unet, self.requested.passes)
        return pipe.unet if loaded is None else loaded
