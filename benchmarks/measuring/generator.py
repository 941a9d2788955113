"""Methods of generating images, and the trained pipeline that generates by them."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tomesd
import torch

import sdgraph
from examples.scenes.pipeline import load
from examples.scenes.quality import held_out_captions
from sdgraph.exporters import onnx, ort

from . import timing
from .published import Sada
from .solvers import KARRAS, SOLVERS

Images = np.ndarray[Any, np.dtype[np.float32]]
UNIT = f"{KARRAS}, 25 steps"
# The first are measured, the last are for fits and searches. Bounds of schedules were chosen on four more.
CAPTIONS = held_out_captions(2000)[1][4:]


@dataclass(frozen=True)
class Method:
    """A method of generating images.

    Args:
        name: the name in tables.
        kind: the series in the plot; "plain" computes every call.
        solver: a name of `SOLVERS`.
        steps: the number of inference steps.
        passes: the passes that are applied to the UNet.
        make: the function that makes the UNet; None applies the passes.
        unit: the name of the method whose time is 1.
    """

    name: str
    kind: str
    solver: str
    steps: int
    passes: Any = ()
    make: Callable[[Generator, Method], Any] | None = None
    unit: str = UNIT

    @property
    def plain(self) -> str:
        """The name of the method with the same solver and steps that computes every call."""
        return f"{self.solver}, {self.steps} steps"


class Generator:
    """The trained pipeline, which generates images of held-out captions in one process.

    Args:
        folder: the folder that keeps fits, searches and exports.
        device: the device that generates.
        dtype: the name of the dtype of the pipeline.
        quick: whether fits and searches are cut short, for a smoke test.
    """

    def __init__(self, folder: Path, device: str = "cpu", dtype: str = "float32", quick: bool = False) -> None:
        self.folder, self.device, self.quick = folder, device, quick
        self.pipe = load().to(device, getattr(torch, dtype))
        self.pipe.set_progress_bar_config(disable=True)
        self.config = self.pipe.scheduler.config
        self.source = sdgraph.apply(self.pipe.unet, ())
        self.unet = cache(self._made)
        self.applied = cache(lambda passes: sdgraph.apply(self.source, passes, verify=False))

    def _made(self, method: Method) -> Any:
        """Make the UNet of a method, and let it generate once if its graphs are built at the first calls."""
        unet = method.make(self, method) if method.make else self.applied(method.passes)
        if method.passes or method.make:
            self._generate(method, unet, range(1))
        return unet

    def generate(self, method: Method, captions: range) -> tuple[Images, float]:
        """Generate an image for each caption, whose noise has the number of the caption as its seed.

        Returns:
            Images (captions, height, width, 3) in [0, 1]; and the seconds of `timing.spent`.
        """
        unet, images = self.unet(method), []
        seconds = timing.spent(lambda: images.append(self._generate(method, unet, captions)), self.device)
        return images[0], seconds

    def _generate(self, method: Method, unet: Any, captions: range) -> Images:
        self.direct(method, unet)
        generators = [torch.Generator().manual_seed(number) for number in captions]
        prompts = [CAPTIONS[number] for number in captions]
        with sdgraph.attach(self.pipe) if hasattr(unet, "generations") else contextlib.nullcontext():
            output = self.pipe(prompts, generator=generators, num_inference_steps=method.steps, output_type="np")
        images: Images = output.images
        return images

    def direct(self, method: Method, unet: Any) -> None:
        """Give the pipeline the solver of a method and a UNet."""
        self.pipe.unet, self.pipe.scheduler = unet, SOLVERS[method.solver](self.config)

    def text(self, file: str, write: Callable[[], Any]) -> str:
        """Return the text of a file of the folder, which is written first if there is none."""
        path = self.folder / file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f"{path.name}.{os.getpid()}")
            new.write_text(f"{write()}\n")
            new.replace(path)
        return path.read_text().strip()


def file_name(name: str) -> str:
    """Return the name of a method as a name for files."""
    return re.sub(r"[^\w+]+", "-", name)


def fitted(generator: Generator, method: Method) -> Any:
    """Make a UNet whose forecast is fitted to the converged image, for the solver and steps of the method."""
    prompts = CAPTIONS[-3:] if generator.quick else CAPTIONS[-16:]

    def fit() -> Any:
        generator.direct(method, generator.source)
        return sdgraph.fit_forecast(
            generator.pipe, method.passes, prompts, reference_steps=8 if generator.quick else 100, iterations=1,
            num_inference_steps=method.steps,
        ).fitted  # fmt: skip

    return generator.applied(generator.text(f"fitted/{file_name(method.name)}.txt", fit))


def searched(generator: Generator, method: Method) -> Any:
    """Make a UNet whose refreshes are searched, for as many multiply-accumulates as the passes of the method have."""
    prompts = CAPTIONS[-6:] if generator.quick else CAPTIONS[-32:]

    def search() -> Any:
        generator.direct(method, generator.source)
        generator.pipe.scheduler.set_timesteps(method.steps)
        budget = generator.applied(method.passes).graph.timetable(generator.pipe.scheduler).macs
        whole = method.steps * generator.source.graph.macs
        return sdgraph.search(
            generator.pipe, [method.passes], prompts, budget=budget / whole, folder=generator.folder / "search",
            num_inference_steps=method.steps, cost="macs", trials=2 if generator.quick else 60,
        ).passes  # fmt: skip

    return generator.applied(generator.text(f"searched/{file_name(method.name)}.txt", search))


def joined(passes: Any) -> str:
    """Return passes as text."""
    return ", ".join(map(str, passes))


def on_onnx_runtime(generator: Generator, method: Method, of: Method) -> Any:
    """Export the UNet of another method, and load it with as many threads as PyTorch has."""
    folder = generator.folder / "onnx" / file_name(of.name)
    if not folder.exists():
        onnx.export(generator.unet(of), folder)
    return ort.ORTUNet.from_pretrained(folder, session_options={"intra_op_num_threads": torch.get_num_threads()})


def skipping(generator: Generator, method: Method) -> Any:
    """Make a UNet that skips calls by SADA's criterion."""
    return Sada(generator.source, generator.pipe)


def merging_tokens(generator: Generator, method: Method, ratio: float) -> Any:
    """Make a UNet of diffusers that merges tokens before attention."""
    return tomesd.apply_patch(copy.deepcopy(load().unet).to(generator.device, generator.pipe.dtype), ratio=ratio)
