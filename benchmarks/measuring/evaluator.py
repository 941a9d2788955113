"""Tuned UNets compared with their teacher: the quality of their images, and their time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sdgraph
from examples.scenes.quality import Quality, held_out_captions, sheet
from sdgraph.evaluation import metrics

from .solvers import SOLVERS
from .timing import spent


class Evaluator:
    """Measures UNets against the teacher, and keeps the images.

    Args:
        pipe: the pipeline with the teacher.
        teacher: the teacher's UNet.
        folder: the folder that keeps the images.
        count: the number of held-out captions, each with a separate noise.
        guidance: the guidance scale; None for the pipeline's own.
    """

    def __init__(self, pipe: Any, teacher: Any, folder: Path, count: int, guidance: float | None = None) -> None:
        self.pipe, self.teacher, self.folder, self.guidance = pipe, teacher, folder, guidance
        self.quality, self.captions = Quality(), held_out_captions(count)[1]
        self.config = pipe.scheduler.config
        pipe.set_progress_bar_config(disable=True)

    def figures(
        self, name: str, unet: Any, solver: str, steps: int, reference: tuple[str, int] | None = None
    ) -> dict[str, Any]:
        """Return the figures of a UNet at some steps of a solver.

        Args:
            name: the name of the UNet, under which its images are kept.
            unet: the UNet.
            solver: a name of `SOLVERS`.
            steps: the number of inference steps.
            reference: the solver and steps of the teacher's images to compare with; by default the same.
        Returns:
            PSNR (median) and SSIM to the teacher's images, and the figures of `Quality`.
        """
        mine = self._kept(name, unet, solver, steps)
        found: dict[str, Any] = {"solver": solver, "steps": steps}
        if unet is not self.teacher or reference not in (None, (solver, steps)):
            its = self._kept("teacher", self.teacher, *(reference or (solver, steps)))
            found["psnr"] = float(np.median([metrics.psnr(a, b) for a, b in zip(mine, its, strict=True)]))
            found["ssim"] = metrics.ssim(mine, its)
        return {**found, **self.quality(mine, self.captions)}

    @torch.no_grad()
    def time(self, unet: Any, rows: int = 16, turns: int = 50) -> float:
        """Return the time of a call as a share of a call of the teacher: medians of calls in turns."""
        if unet is self.teacher:
            return 1.0
        generator, config = torch.Generator().manual_seed(0), self.pipe.unet.config
        latents = torch.randn(rows, config.in_channels, config.sample_size, config.sample_size, generator=generator)
        text = torch.randn(rows, self.pipe.tokenizer.model_max_length, config.cross_attention_dim, generator=generator)
        calls = [partial(each, latents, 500, text) for each in (unet, self.teacher)]
        mine, its = np.median([[spent(call, "cpu") for call in calls] for _ in range(turns)][2:], axis=0)
        return float(mine / its)

    def sheet(self, names: Iterable[str], solver: str, steps: int, path: Path, count: int = 12) -> list[str]:
        """Write the first images of UNets as one picture, a row of each, and return the names that have images here."""
        files = {name: self._file(name, solver, steps) for name in names}
        rows = {name: np.load(file)["images"][:count] / 255.0 for name, file in files.items() if file.exists()}
        if rows:
            sheet(np.concatenate(list(rows.values())), columns=min(count, len(self.captions)), scale=1).save(path)
        return list(rows)

    def _file(self, name: str, solver: str, steps: int) -> Path:
        return self.folder / f"{name}, {solver}, {steps}, {len(self.captions)}.npz"

    def _kept(self, name: str, unet: Any, solver: str, steps: int) -> Any:
        """Return images (N, H, W, 3) in [0, 1], which are generated the first time."""
        file = self._file(name, solver, steps)
        if not file.exists():
            images = self._generated(unet, solver, steps)
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(".new")
            with new.open("wb") as stream:
                np.savez_compressed(stream, images=np.round(images * 255).astype(np.uint8))
            new.replace(file)
        return np.load(file)["images"] / 255.0

    def _generated(self, unet: Any, solver: str, steps: int, batch: int = 32) -> Any:
        count = len(self.captions)
        parts = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
        return np.concatenate(
            [self.images(unet, solver, steps, [self.captions[row] for row in rows], rows) for rows in parts]
        )

    def images(self, unet: Any, solver: str, steps: int, texts: Sequence[str], seeds: Iterable[int]) -> Any:
        """Return the images (N, H, W, 3) in [0, 1] of a UNet.

        Args:
            unet: the UNet.
            solver: a name of `SOLVERS`.
            steps: the number of inference steps.
            texts: the N captions.
            seeds: the N seeds.
        """
        own = self.pipe.unet, self.pipe.scheduler
        self.pipe.unet, self.pipe.scheduler = unet, SOLVERS[solver](self.config)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call: dict[str, Any] = {"generator": generators, "num_inference_steps": steps, "output_type": "np"}
        if self.guidance is not None:
            call["guidance_scale"] = self.guidance
        with sdgraph.attach(self.pipe):  # schedules by call count its calls
            images = self.pipe(list(texts), **call).images
        self.pipe.unet, self.pipe.scheduler = own
        return images
