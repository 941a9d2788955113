"""The cost of a UNet call on the engines of a CPU, and the distance of each engine from PyTorch's float32.

    python -m benchmarks.providers --models scenes sd15 --threads 1 2

Each engine is measured in turns with PyTorch in float32, and opened and closed separately, so that memory for two is
enough. The row of an engine that is not available has the reason.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from sdgraph.errors import SdgraphError
from sdgraph.exporters.onnx import export
from sdgraph.exporters.ort import ORTUNet
from sdgraph.exporters.ort.providers import CPU, OPENVINO

from .measuring import timing
from .measuring.documents import report
from .measuring.random_unets import build, call
from .measuring.record import add_options, begin, place, record
from .measuring.tables import REFERENCE

SCENES = Path(__file__).parents[1] / "examples/scenes/model"
SIDES = {"scenes": 16, "tiny": 16, "sd15": 32}  # of the latents
ENGINES: dict[str, dict[str, str]] = {
    "PyTorch bfloat16": {},
    "ONNX Runtime float32": {"provider": CPU},
    "OpenVINO float32": {"provider": OPENVINO, "precision": "float32"},
    "OpenVINO bfloat16": {"provider": OPENVINO, "precision": "bfloat16"},
}


def source(model: str) -> Any:
    if model != "scenes":
        return build(model, "cpu", torch.float32)
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(SCENES, subfolder="unet", local_files_only=True).eval()


@contextmanager
def opened(engine: str, unet: Any, bundle: Path, arguments: dict[str, Any]) -> Iterator[Callable[[], torch.Tensor]]:
    """Open an engine, and yield a call of it, which returns the prediction in float32."""
    options = ENGINES[engine]
    if options:
        session = ORTUNet.from_pretrained(bundle, verify=False, **options)
        yield lambda: session(**arguments)[0]
        session.backend.close(session.manifest.variants[0])
        return
    cast = copy.deepcopy(unet).bfloat16()
    half = {n: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in arguments.items()}
    yield lambda: cast(**half)[0].float()


def psnr(prediction: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the PSNR of a prediction in dB; the peak is the span of the reference."""
    error = (prediction.double() - reference.double()).square().mean().sqrt()
    return float(20 * torch.log10((reference.max() - reference.min()) / error)) if error else math.inf


@torch.no_grad()
def measured(model: str, batch: int, threads: list[int], seconds: float, bundle: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each engine and number of threads."""
    unet = source(model)
    torch.manual_seed(1)
    arguments = call(unet, batch, SIDES[model], SIDES[model])
    if not bundle.exists():
        print(export(unet, bundle))
    for number in threads:
        torch.set_num_threads(number)
        reference = partial(unet, **arguments)
        expected = reference()[0]
        for engine in ENGINES:
            row: dict[str, Any] = {"model": model, "batch": batch, "latents": SIDES[model], "threads": number}
            row["engine"] = engine
            try:
                with opened(engine, unet, bundle, arguments) as run:
                    row["psnr"] = psnr(run(), expected)
                    row |= {"samples": timing.in_turns({REFERENCE: reference, engine: run}, "cpu", seconds, 3)}
            except SdgraphError as error:
                row["failed"] = error.what
            gc.collect()
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIDES, default=["scenes"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=2, help="samples per call (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each pair (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="folder to keep exports in (default: a temporary one)")
    parser.add_argument("--note", default="", help="remark on the machine, for the result")
    add_options(parser)
    args = parser.parse_args()
    provenance = begin("providers", "cpu", args.draft or args.quick)
    out = place(args, "cpu-providers.json")
    if args.quick:
        args.models, args.threads, args.seconds = ["tiny"], [1], 0.1
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for model in args.models:
            bundle = (args.folder or Path(temporary)) / model
            for row in measured(model, args.batch, args.threads, args.seconds, bundle):
                rows.append(row)
                print(f"{model}, {row['threads']} threads: {row['engine']}", flush=True)
                result = {**provenance, "onnxruntime": onnxruntime.__version__, "note": args.note, "rows": rows}
                record(out, result)
    print(f"\n{report(result)}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
