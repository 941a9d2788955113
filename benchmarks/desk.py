"""Measures tuned UNets against their teacher: the quality of their images, and their time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from solvers import SOLVERS
from trained import Quality, held_out_captions

from sdgraph.evaluation import metrics


class Desk:
    """Measures UNets against the teacher, and keeps the images.

    Args:
        pipe: the pipeline with the teacher.
        teacher: the teacher's UNet.
        folder: where images are kept.
        count: the number of held-out captions, each with a noise of its own.
    """

    def __init__(self, pipe: Any, teacher: Any, folder: Path, count: int) -> None:
        self.pipe, self.teacher, self.folder = pipe, teacher, folder
        self.quality, self.captions = Quality(), held_out_captions(count)[1]
        self.config = pipe.scheduler.config
        pipe.set_progress_bar_config(disable=True)

    def figures(self, name: str, unet: Any, solver: str, steps: int) -> dict[str, Any]:
        """Return the figures of a UNet at some steps of a solver.

        Args:
            name: of the UNet, under which its images are kept.
            unet: the UNet.
            solver: a name of `SOLVERS`.
            steps: the number of inference steps.
        Returns:
            "seconds" of the processor for an image, "time" as a share of the teacher's, PSNR (median) and SSIM to the
            teacher's images, and the figures of `Quality`.
        """
        mine, seconds = self._kept(name, unet, solver, steps)
        its, one = self._kept("teacher", self.teacher, solver, steps)
        found = {"solver": solver, "steps": steps, "seconds": seconds, "time": seconds / one}
        if unet is not self.teacher:
            found["psnr"] = float(np.median([metrics.psnr(a, b) for a, b in zip(mine, its, strict=True)]))
            found["ssim"] = metrics.ssim(mine, its)
        return {**found, **self.quality(mine, self.captions)}

    def _kept(self, name: str, unet: Any, solver: str, steps: int) -> tuple[Any, float]:
        """Return images (N, H, W, 3) in [0, 1], and the seconds for one, which are generated the first time."""
        file = self.folder / f"{name}, {solver}, {steps}, {len(self.captions)}.npz"
        if not file.exists():
            images, seconds = self._generated(unet, solver, steps)
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(".new")
            with new.open("wb") as stream:
                np.savez_compressed(stream, images=np.round(images * 255).astype(np.uint8), seconds=seconds)
            new.replace(file)
        kept = np.load(file)
        return kept["images"] / 255.0, float(kept["seconds"])

    def _generated(self, unet: Any, solver: str, steps: int, batch: int = 32) -> tuple[Any, float]:
        own = self.pipe.unet, self.pipe.scheduler
        self.pipe.unet, self.pipe.scheduler = unet, SOLVERS[solver](self.config)
        images, begun, count = [], time.process_time(), len(self.captions)
        for rows in [range(first, min(first + batch, count)) for first in range(0, count, batch)]:
            generators = [torch.Generator().manual_seed(row) for row in rows]
            texts = [self.captions[row] for row in rows]
            images.append(self.pipe(texts, generator=generators, num_inference_steps=steps, output_type="np").images)
        seconds = (time.process_time() - begun) / count
        self.pipe.unet, self.pipe.scheduler = own
        return np.concatenate(images), seconds
