"""Apply passes to the UNet of a pipeline, and export the pipeline for ONNX Runtime.

  sdgraph export stable-diffusion-v1-5/stable-diffusion-v1-5 --passes "CleanUp, InheritFeatures.deep_cache(3)" \\
      --leave-out safety_checker --out sd15-onnx
  sdgraph export MODEL --passes CleanUp --unet-only --out unet-onnx

With --quantize "Quantize()" and --prompts FILE, layers of the UNet are computed in 8 bits, with scales that are
calibrated on the images of these prompts.

The directory has the text encoders, the VAE, and of the UNet one graph for each variant over one file of weights; with
--unet-only, or of the folder of a UNet, it has the UNet alone. It appears only if every graph agrees with PyTorch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import SpecError
from ..spec import Spec, read
from .arguments import (
    CALLS,
    add_calls,
    add_dtype,
    add_imports,
    add_model,
    add_number,
    add_output,
    add_provider,
    add_threads,
)
from .plans import add_passes, read_passes
from .sources import is_pipeline, load_pipeline, load_unet, read_prompts

CHOICES = ("target", "overwrite", "provider", "precision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_passes(parser, "--passes", default="")
    add_output(parser, "--out", "DIR", "directory to export to", required=True)
    parser.add_argument(
        "--target", default="portable", choices=("portable", "cuda"),
        help="portable: standard operators for any provider; cuda: also fused operators of the CUDA provider "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--layout", default="variants", choices=("variants", "single"),
        help="variants: one file for each graph; single: one file for all graphs (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--unet-only", action="store_true", help="export the UNet of the pipeline alone")
    parser.add_argument(
        "--leave-out", action="append", default=[], metavar="PART",
        help="part of the pipeline that is not exported, such as safety_checker; may be repeated",
    )  # fmt: skip
    add_dtype(parser, ("float32", "float16"))
    add_calls(parser)
    parser.add_argument(
        "--inputs", nargs="*", default=(), metavar="NAME",
        help="optional inputs to export, such as ControlNet's mid_block_additional_residual",
    )  # fmt: skip
    add_provider(parser, "none; the CPU's is always compared with PyTorch, and this one too")
    parser.add_argument(
        "--quantize", metavar="SPEC",
        help="compute layers in 8 bits: 'Quantize()', or with options as in 'Quantize(linears=\"dynamic\")'; needs the "
        "folder of a pipeline and --prompts",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="text file with one prompt per line, of which 8 bits are calibrated on three in four and checked on one",
    )  # fmt: skip
    add_number(parser, "--steps", "inference steps of these images (default: --calls)")
    add_threads(parser, "PyTorch", "ONNX Runtime")
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    from ..exporters.onnx import Calibration, check_target, export, export_pipeline
    from ..runtime.apply import apply
    from ..runtime.pipelines import with_unet
    from ..runtime.switch import SwitchUNet
    from ..runtime.unet import GraphUNet

    check_target(args.overwrite, args.out)  # before the minutes that the export takes
    requested = read_passes(args.passes)
    requested.check_calls(args.calls)
    quantize = _quantize(args)
    whole = not args.unet_only and is_pipeline(args.model)
    for name, usual in (("layout", "variants"), ("inputs", ())):
        if whole and getattr(args, name) != usual:
            raise SpecError(f"--{name} is for a UNet alone", where=f"--{name}", hint="add --unet-only")
    if args.leave_out and not whole:
        raise SpecError("a UNet has no parts to leave out", where="--leave-out", hint="leave the option out")
    pipe = load_pipeline(args.model, args.dtype, "cpu", args.variant) if whole or quantize is not None else None
    source = load_unet(args.model, args.dtype, args.variant) if pipe is None else pipe.unet
    requested.check_unet(source.config)
    unet = source if isinstance(source, SwitchUNet) else apply(source, requested.passes)
    if isinstance(unet, SwitchUNet) and requested.passes:
        hint = "apply them to the UNets before sdgraph.switch, and leave --passes out"
        raise SpecError(f"{args.model} is a switch of several UNets", where="--passes", hint=hint)
    if isinstance(unet, GraphUNet) and unet.graph.passes:
        print(unet.report)
    options = {name: getattr(args, name) for name in CHOICES}
    options["calls"] = calls = args.calls or requested.calls or CALLS
    if quantize is not None:
        prompts, steps = read_prompts(args.prompts), args.steps or requested.steps or calls
        options |= {"quantize": quantize, "calibration": Calibration(pipe, prompts, num_inference_steps=steps)}
    if whole and pipe is not None:
        with with_unet(pipe, unet):
            print(export_pipeline(pipe, args.out, leave_out=args.leave_out, **options))
    else:
        print(export(unet, args.out, layout=args.layout, inputs=args.inputs, **options))


def _quantize(args: argparse.Namespace) -> Spec | None:
    """Return the layers to compute in 8 bits, or None.

    Raises:
        SpecError: the text is no `Quantize`, or there are no prompts to calibrate on.
    """
    from ..exporters.onnx import Quantize

    if args.quantize is None:
        if args.prompts is not None:
            raise SpecError("--prompts are for 8 bits", where="--prompts", hint="add --quantize 'Quantize()'")
        return None
    spec = read(args.quantize, Quantize)
    if args.prompts is None:
        raise SpecError("8 bits need prompts to calibrate on", where="--quantize", hint="add --prompts FILE")
    return spec
