"""The cost of a UNet call on the engines of a CPU, and the distance of each engine from PyTorch's float32.

  python benchmarks/providers.py --models scenes sd15 --threads 1 2 --out benchmarks/results/DATE-cpu-providers.json

Each engine is measured in turns with PyTorch in float32, and opened and closed by itself, so that the memory of two is
all that is needed. An engine that is not to be had here is a row that says why.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import measure
import onnxruntime
import torch
from gpu import RESULTS
from models import build, call
from tables import markdown

from sdgraph.errors import SdgraphError
from sdgraph.exporters.onnx import export
from sdgraph.exporters.ort import ORTUNet
from sdgraph.exporters.ort.providers import CPU, OPENVINO

SCENES = Path(__file__).parents[1] / "examples/scenes/model"
REFERENCE = "PyTorch float32"
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
    """A call of an engine, which returns the prediction in float32."""
    options = ENGINES[engine]
    if options:
        session = ORTUNet.from_pretrained(bundle, verify=False, **options)
        yield lambda: session(**arguments)[0]
        session.sessions.close(session.manifest.variants[0])
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
                    row |= {"samples": measure.in_turns({REFERENCE: reference, engine: run}, "cpu", seconds, 3)}
            except SdgraphError as error:
                row["failed"] = error.what
            gc.collect()
            yield row


def report(rows: list[dict[str, Any]]) -> str:
    lines = [("model", "threads", "engine", "seconds per call", "PyTorch float32 / its", "PSNR")]
    for row in rows:
        head = (row["model"], str(row["threads"]), row["engine"])
        if "failed" in row:
            lines.append((*head, row["failed"], "", ""))
            continue
        mine, its = row["samples"][row["engine"]], row["samples"][REFERENCE]
        gain = statistics.median(a / b for a, b in zip(its, mine, strict=True))
        lines.append((*head, f"{statistics.median(mine):.3g}", f"{gain:.2f}", f"{row['psnr']:.1f} dB"))
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIDES, default=["scenes"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=2, help="samples per call (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each pair (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="folder to keep exports in (default: a temporary one)")
    parser.add_argument("--note", default="", help="what else must be known of the machine; kept with the figures")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/DATE-cpu-providers.json)")
    args = parser.parse_args()
    circumstances = measure.circumstances("cpu")
    out = args.out or RESULTS / f"{circumstances['date'][:10]}-cpu-providers.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for model in args.models:
            bundle = (args.folder or Path(temporary)) / model
            for row in measured(model, args.batch, args.threads, args.seconds, bundle):
                rows.append(row)
                print(report([row]), flush=True)
                result = {**circumstances, "onnxruntime": onnxruntime.__version__, "note": args.note, "rows": rows}
                out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{report(rows)}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
