"""A way of generating images, and the studio that generates them: the trained pipeline with the UNet of the way."""

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

import measure
import numpy as np
import tomesd
import torch
from peers import Sada
from solvers import KARRAS, SOLVERS
from trained import CAPTIONS, load

import sdgraph
from sdgraph.exporters import onnx, ort

Images = np.ndarray[Any, np.dtype[np.float32]]
UNIT = f"{KARRAS}, 25 steps"


@dataclass(frozen=True)
class Way:
    """A way of generating images.

    Args:
        name: what tables call it.
        kind: the series of the figure that it belongs to; "plain" computes every call.
        solver: a name of `SOLVERS`.
        steps: the number of inference steps.
        passes: what is applied to the UNet.
        make: makes the UNet, by default by applying the passes.
        unit: the name of the way whose time is 1.
    """

    name: str
    kind: str
    solver: str
    steps: int
    passes: Any = ()
    make: Callable[[Studio, Way], Any] | None = None
    unit: str = UNIT

    @property
    def plain(self) -> str:
        """The name of the way with the same solver and steps that computes every call."""
        return f"{self.solver}, {self.steps} steps"


class Studio:
    """The trained pipeline, which generates images of held-out captions in one process.

    Args:
        folder: where fits, searches and exports are kept.
        device: the device that generates.
        dtype: of the pipeline, as text.
        quick: a smoke test, with fits and searches that are too small to be of use.
    """

    def __init__(self, folder: Path, device: str = "cpu", dtype: str = "float32", quick: bool = False) -> None:
        self.folder, self.device, self.quick = folder, device, quick
        self.pipe = load().to(device, getattr(torch, dtype))
        self.pipe.set_progress_bar_config(disable=True)
        self.config = self.pipe.scheduler.config
        self.source = sdgraph.apply(self.pipe.unet, ())
        self.unet = cache(self._made)
        self.applied = cache(lambda passes: sdgraph.apply(self.source, passes, verify=False))

    def _made(self, way: Way) -> Any:
        """Make the UNet of a way, and let it generate once where its graphs are built at the first calls."""
        unet = way.make(self, way) if way.make else self.applied(way.passes)
        if way.passes or way.make:
            self._generate(way, unet, range(1))
        return unet

    def generate(self, way: Way, captions: range) -> tuple[Images, float]:
        """Generate an image for each caption, whose noise has the number of the caption as its seed.

        Returns:
            Images (captions, height, width, 3) in [0, 1]; and the time, see `measure.spent`.
        """
        unet, images = self.unet(way), []
        seconds = measure.spent(lambda: images.append(self._generate(way, unet, captions)), self.device)
        return images[0], seconds

    def _generate(self, way: Way, unet: Any, captions: range) -> Images:
        self.direct(way, unet)
        generators = [torch.Generator().manual_seed(number) for number in captions]
        prompts = [CAPTIONS[number] for number in captions]
        with sdgraph.attach(self.pipe) if hasattr(unet, "generations") else contextlib.nullcontext():
            output = self.pipe(prompts, generator=generators, num_inference_steps=way.steps, output_type="np")
        images: Images = output.images
        return images

    def direct(self, way: Way, unet: Any) -> None:
        """Give the pipeline the solver of a way and a UNet."""
        self.pipe.unet, self.pipe.scheduler = unet, SOLVERS[way.solver](self.config)

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
    """Return the name of a way as a name for files."""
    return re.sub(r"[^\w+]+", "-", name)


def fitted(studio: Studio, way: Way) -> Any:
    """Make a UNet whose forecast is fitted to the converged image, for the solver and steps of the way."""
    prompts = CAPTIONS[-3:] if studio.quick else CAPTIONS[-16:]

    def fit() -> Any:
        studio.direct(way, studio.source)
        return sdgraph.fit_forecast(
            studio.pipe, way.passes, prompts, reference_steps=8 if studio.quick else 100, rounds=1,
            num_inference_steps=way.steps,
        ).fitted  # fmt: skip

    return studio.applied(studio.text(f"fitted/{file_name(way.name)}.txt", fit))


def searched(studio: Studio, way: Way) -> Any:
    """Make a UNet whose refreshes are searched, for as many multiply-accumulates as the passes of the way have."""
    prompts = CAPTIONS[-6:] if studio.quick else CAPTIONS[-32:]

    def search() -> Any:
        studio.direct(way, studio.source)
        studio.pipe.scheduler.set_timesteps(way.steps)
        budget = studio.applied(way.passes).graph.timetable(studio.pipe.scheduler).macs
        whole = way.steps * studio.source.graph.macs
        return sdgraph.search(
            studio.pipe, [way.passes], prompts, budget=budget / whole, folder=studio.folder / "search",
            num_inference_steps=way.steps, cost="macs", trials=2 if studio.quick else 60,
        ).passes  # fmt: skip

    return studio.applied(studio.text(f"searched/{file_name(way.name)}.txt", search))


def joined(passes: Any) -> str:
    """Return passes as text."""
    return ", ".join(map(str, passes))


def on_onnx_runtime(studio: Studio, way: Way, of: Way) -> Any:
    """Export the UNet of another way, and load it with as many threads as PyTorch has."""
    folder = studio.folder / "onnx" / file_name(of.name)
    if not folder.exists():
        onnx.export(studio.unet(of), folder)
    return ort.ORTUNet.from_pretrained(folder, session_options={"intra_op_num_threads": torch.get_num_threads()})


def skipping(studio: Studio, way: Way) -> Any:
    """Make a UNet that skips calls by SADA's criterion."""
    return Sada(studio.source, studio.pipe)


def merging_tokens(studio: Studio, way: Way, ratio: float) -> Any:
    """Make a UNet of diffusers that merges tokens before attention."""
    return tomesd.apply_patch(copy.deepcopy(load().unet).to(studio.device, studio.pipe.dtype), ratio=ratio)
