"""The speed of an exported directory on this machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import onnxruntime
import torch

from sdgraph.errors import SpecError
from sdgraph.options import Count, checked
from sdgraph.progress import Bar
from sdgraph.schedules import SamplingRun, Steps
from sdgraph.views.format import format_table

from .unet import ORTUNet


@dataclass(frozen=True)
class Figures:
    """The median times of one measurement, in seconds. It prints as a table.

    Args:
        variants: the seconds of a call, by variant.
        reused: the sites that each variant does not compute; `sdgraph.search` finds the time of a call by them.
        generation: the seconds of all calls of a generation, as they are scheduled.
        everything: the seconds of as many calls that compute everything, of a switch by its first UNet.
        calls: the number of calls of the generation.
        batch: the batch size of a call.
        size: the height and width of the latents.
        on: the provider, the versions and the device.
    """

    variants: dict[str, float]
    reused: dict[str, list[str]]
    generation: float
    everything: float
    calls: int
    batch: int
    size: tuple[int, int]
    on: dict[str, str]

    def __str__(self) -> str:
        first = next(iter(self.variants.values()))
        rows = [(name, f"{1000 * seconds:.4g} ms", f"{seconds / first:.3f}") for name, seconds in self.variants.items()]
        rows.append((f"{self.calls} calls", f"{self.generation:.4g} s", f"{self.generation / self.everything:.3f}"))
        head = f"latents {self.size[0]}x{self.size[1]}, batch {self.batch}; " + ", ".join(self.on.values())
        note = "the last column is relative to computing everything, measured in turns"
        return "\n".join([head, format_table(rows), note])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@checked(SpecError)
def bench(
    unet: ORTUNet,
    calls: Steps = 20,
    size: tuple[Count, Count] | None = None,
    batch: Count = 2,
    repeats: Count = 3,
) -> Figures:
    """Measure the time of each graph and of whole generations, in turns; the first turn is a warm-up.

    Args:
        unet: the exported UNet.
        calls: the number of calls of a generation, at the timesteps that `sdgraph.Graph.timetable` supposes.
        size: the height and width of the latents; by default those of the configuration.
        batch: the batch size of a call; with guidance it is twice that of the images.
        repeats: the number of turns that count.
    Raises:
        SpecError: there are no calls or repeats, or there is no size and the configuration has none.
    """
    size = size or _side(unet)
    height, width = size
    flat = unet.random_inputs({"B": batch, "H": height, "W": width, "L": 77})
    timesteps = [torch.tensor([t]) for t in SamplingRun.of(calls).supposed().timesteps or ()]
    sizes = unet.manifest.check(flat)

    def generation() -> None:
        conditioning = {i.name: flat[i.name].clone() for i in unet.manifest.model_inputs if i.conditioning}
        with unet.expecting([float(t) for t in timesteps]):  # other tensors are another generation
            for timestep in timesteps:
                unet.run({**flat, **conditioning, "timestep": timestep})

    def everything() -> None:
        for timestep in timesteps:
            unet.backend.run(unet.manifest.variants[0], {**flat, "timestep": timestep}, sizes)

    ways: dict[str, Callable[[], Any]] = {"generation": generation, "everything": everything}
    reused: dict[str, list[str]] = {}
    for member in unet.members.values():
        variants = member.manifest.variants
        values = dict(zip(variants[0].writes, member.run(variants[0], flat, sizes)[1:], strict=True))
        single = member.manifest.layout == "single"  # then all graphs are branches of one file
        for i, variant in enumerate(variants):
            name = f"{variant.file}, branch {i}" if single else variant.file
            given = {**flat, **{f"reused.{site}": values[site] for site in variant.reads}}
            ways[name] = partial(member.run, variant, given, sizes)
            reused[name] = sorted(variant.reused)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in Bar(range(repeats + 1), desc="bench", unit="turn"):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                samples[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    on = {
        "provider": f"{unet.backend.provider} in {unet.backend.precision}",
        "threads": f"{unet.backend.threads} threads",
        "onnxruntime": f"onnxruntime {onnxruntime.__version__}",
        "torch": f"torch {torch.__version__}",
        "device": torch.cuda.get_device_name(unet.device) if unet.device.type == "cuda" else platform.machine(),
    }
    times = {name: medians[name] for name in reused}
    return Figures(times, reused, medians["generation"], medians["everything"], calls, batch, (height, width), on)


def _side(unet: ORTUNet) -> tuple[int, int]:
    side = unet.config.get("sample_size")
    if side is None:
        raise SpecError("the configuration has no sample_size", where="bench", hint="pass size=(height, width)")
    return (side, side) if isinstance(side, int) else tuple(side)
