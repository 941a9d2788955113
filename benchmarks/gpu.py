"""Speed on a GPU: PyTorch, torch.compile, DeepCache, and ONNX Runtime with and without feature inheritance.

    python -m benchmarks.gpu                                  # Stable Diffusion 1.5 at 512x512, SDXL at 1024x1024, fp16
    python -m benchmarks.gpu --device cpu --quick             # a smoke test with a tiny model on the CPU
    python -m benchmarks.gpu --models sd15 --batch 1 --steps 20

Models have the released configurations and random weights. The time of an image is that of the UNet and the scheduler
(DDIM). Guidance doubles the batch of the UNet. The text encoder and the VAE are left out. All methods of a model and a
batch take turns in one run. The results record why a method fails.
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler
from tqdm import tqdm

import sdgraph
from sdgraph.exporters.onnx import export
from sdgraph.exporters.ort.unet import CPU, CUDA, ORTUNet
from sdgraph.passes import HoistInvariants, InheritFeatures

from .measuring import random_unets, timing
from .measuring.documents import report
from .measuring.record import add_options, begin, place, record
from .measuring.tables import WHOLE

SIZES = {"tiny": 16, "small": 32, "sd15": 64, "sdxl": 128}  # height and width of the latents
INTERVAL = 3  # of DeepCache and of ours, branch 0


class Loop:
    """The denoising loop of a pipeline: a scheduler and guidance, for a given UNet.

    Args:
        unet: the UNet whose configuration determines the inputs.
        model: a name of `SIZES`.
        batch: the number of images.
        device: the device of the inputs.
        dtype: the dtype of the inputs.
    """

    def __init__(self, unet: Any, model: str, batch: int, device: str, dtype: torch.dtype) -> None:
        self.scheduler = DDIMScheduler()
        side = SIZES[model]
        source = SimpleNamespace(config=unet.config, device=torch.device(device), dtype=dtype)
        call = random_unets.call(source, 2 * batch, side, side)  # type: ignore[arg-type]
        self.latents = call.pop("sample")[:batch]
        self.prompt = call.pop("encoder_hidden_states")
        del call["timestep"]
        self.rest = call

    @torch.no_grad()
    def __call__(self, unet: Any, steps: int) -> torch.Tensor:
        self.scheduler.set_timesteps(steps, device=self.latents.device)
        latents, prompt = self.latents, self.prompt.clone()  # another tensor begins another generation
        self.unet = unet  # `attach` expects the scheduler and the UNet as attributes, as pipelines have them
        with sdgraph.attach(self) if _inherits(unet) else nullcontext():
            for timestep in self.scheduler.timesteps:
                both = unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=prompt, **self.rest)[0]
                unconditional, conditional = both.chunk(2)
                prediction = unconditional + 7.5 * (conditional - unconditional)
                latents = self.scheduler.step(prediction, timestep, latents).prev_sample
        return latents


def _twin(unet: Any) -> Any:
    """Return a copy of a module over the same weights."""
    return copy.deepcopy(unet, {id(p): p for p in unet.parameters()})


def _inherits(unet: Any) -> bool:
    return hasattr(unet, "generations")


def methods(unet: Any, folder: Path, device: str, quick: bool, side: int, batch: int) -> dict[str, Callable[[], Any]]:
    """Return functions that create the UNets to compare, by name."""
    ours = sdgraph.apply(unet, (HoistInvariants(), InheritFeatures.deep_cache(INTERVAL)), verify=False)
    provider = CUDA if device == "cuda" else CPU
    # the UNets are deployed for one size
    sizes = {"batch": 2 * batch, "height": side, "width": side, "sequence": 77}
    lowered = "cuda" if device == "cuda" else "portable"

    def compiled(source: Any) -> Any:
        twin = sdgraph.apply(source, (), verify=False) if _inherits(source) else _twin(source)
        twin.compile(mode="max-autotune-no-cudagraphs" if not quick else "default")
        return twin

    def deep_cache() -> Any:
        twin = _twin(unet)
        helper = DeepCacheSDHelper(SimpleNamespace(unet=twin, scheduler=DDIMScheduler()))
        helper.set_params(cache_interval=INTERVAL, cache_branch_id=0)
        helper.enable()
        twin.deep_cache = helper  # keeps the helper alive as long as the UNet
        return twin

    def exported(source: Any, name: str, target: str, **options: Any) -> ORTUNet:
        directory = folder / name
        if not directory.exists():
            export(source, directory, target=target, progress=False)
        return ORTUNet.from_pretrained(directory, provider=provider, free_dims=sizes, verify=False, **options)

    return {
        WHOLE: lambda: unet,
        "torch.compile": lambda: compiled(unet),
        f"DeepCache {INTERVAL}": deep_cache,
        f"sdgraph, inherit {INTERVAL}": lambda: ours,
        f"sdgraph, inherit {INTERVAL}, torch.compile": lambda: compiled(ours),
        "ONNX Runtime, plain": lambda: exported(unet, "plain", "portable"),
        "ONNX Runtime, lowered": lambda: exported(unet, "lowered", lowered),
        f"ONNX Runtime, inherit {INTERVAL}": lambda: exported(ours, "inherit", lowered),
        f"ONNX Runtime, inherit {INTERVAL}, CUDA graphs": lambda: exported(ours, "inherit", lowered, cuda_graph=True),
    }


def measured(model: str, batch: int, steps: tuple[int, ...], device: str, dtype: torch.dtype, repeats: int,
             folder: Path, quick: bool) -> dict[str, Any]:  # fmt: skip
    """Measure times, differences from PyTorch and memory on the device of all methods, for one model and batch."""
    unet = random_unets.build(model, device, dtype)
    side = SIZES[model]
    loop = Loop(unet, model, batch, device, dtype)
    unets: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    for name, create in (bar := tqdm(methods(unet, folder / model, device, quick, side, batch).items(), unit="method")):
        bar.set_description(f"{model}, batch {batch}: {name}")
        before = timing.on_device(device)
        try:
            unets[name] = create()
            loop(unets[name], 2 * INTERVAL + 1)  # compiles the kernels, chooses them, or captures CUDA graphs
            loop(unets[name], 2 * INTERVAL + 1)
        except Exception as error:  # a method that fails must not end the measurement of the others
            unets.pop(name, None)
            figures[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            continue
        figures[name] = {"seconds": {}, "bytes": timing.on_device(device) - before}
    for count in steps:
        samples: dict[str, list[float]] = {name: [] for name in unets}
        reference = loop(unet, count)
        for name, candidate in unets.items():
            difference = (loop(candidate, count) - reference).abs().max()
            figures[name].setdefault("difference", {})[str(count)] = float(difference)
        for _ in tqdm(range(repeats), desc=f"{model}, batch {batch}, {count} steps", unit="turn"):
            for name, candidate in unets.items():
                samples[name].append(timing.timed(partial(loop, candidate, count), device))
        for name in unets:
            figures[name]["seconds"][str(count)] = samples[name]
    return {"model": model, "batch": batch, "latents": side, "methods": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", choices=("float32", "float16"), help="default: float16 on a GPU, float32 on the CPU")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["sd15", "sdxl"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4], help="images per batch")
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 30, 50])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder to keep exports in (default: a temporary one)")
    add_options(parser)
    args = parser.parse_args()
    provenance = begin("gpu", args.device, args.draft or args.quick)
    if args.quick:
        args.models, args.batch, args.steps, args.repeats = ["tiny"], [1], [4], 1
    if args.device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's libraries, which come with PyTorch
    dtype = getattr(torch, args.dtype or ("float16" if args.device == "cuda" else "float32"))
    cases = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for model in args.models:
            for batch in args.batch:
                steps = tuple(args.steps)
                cases.append(measured(model, batch, steps, args.device, dtype, args.repeats, folder, args.quick))
                gc.collect()
    result = {
        **provenance,
        "onnxruntime": onnxruntime.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": args.steps,
        "quick": args.quick,
        "cases": cases,
    }
    out = place(args, "gpu.json")
    record(out, result)
    print(f"\n{report(result)}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
