"""Images of all methods, kept in files, and their comparison: time, nearness to the reference, and content."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.scenes.quality import Quality
from sdgraph.evaluation import metrics

from .generator import CAPTIONS, Images, Method, file_name

DEPTH = 65535  # of the stored images, whose rounding is far below all differences


@dataclass(frozen=True)
class MethodImages:
    """The images of a method.

    Args:
        images: the images, (captions, height, width, 3) in [0, 1].
        seconds: the time of each part of the captions.
        passes: the passes of the UNet, as text.
        macs: the multiply-accumulates of a generation for one image; None if unknown.
    """

    images: Images
    seconds: tuple[float, ...]
    passes: str = ""
    macs: int | None = None


@dataclass(frozen=True)
class ImageStore:
    """The images of all methods in files, one for each method and part of the captions.

    Args:
        folder: the folder of the files.
        part: the number of captions of a file.
    """

    folder: Path
    part: int

    def file(self, method: Method, first: int) -> Path:
        """Return the file of a method and the part that begins with a caption."""
        return self.folder / f"{first:04d}" / f"{file_name(method.name)}.npz"

    def write(self, method: Method, first: int, made: MethodImages) -> None:
        """Write a file as a whole."""
        file = self.file(method, first)
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        macs = -1 if made.macs is None else made.macs
        with new.open("wb") as stream:
            images = np.round(DEPTH * made.images).astype(np.uint16)
            np.savez_compressed(stream, images=images, seconds=made.seconds, passes=made.passes, macs=macs)
        new.replace(file)

    def read(self, method: Method, firsts: list[int]) -> MethodImages:
        """Return the images of a method, of the parts that begin with some captions."""
        parts = [np.load(self.file(method, first)) for first in firsts]
        images = np.concatenate([part["images"] for part in parts]) / np.float32(DEPTH)
        seconds = tuple(float(part["seconds"][0]) for part in parts)
        macs = int(parts[0]["macs"])
        return MethodImages(images, seconds, str(parts[0]["passes"]), None if macs < 0 else macs)


def compare(methods: Sequence[Method], made: Mapping[str, MethodImages]) -> dict[str, dict[str, Any]]:
    """Compare the methods, of which the first is the reference.

    Args:
        methods: the methods.
        made: their images of the same captions, by the name of the method.
    Returns:
        The figures by the name of the method. "psnr" and "psnr_low" are the median and the 10th percentile of the PSNR
        to the reference; "same" and "same_low" those to the same solver and steps without passes. They are None if the
        images are equal. "time" is the median over parts of the captions, and "macs" the multiply-accumulates, both
        relative to the method "unit". The others are those of `Quality`.
    """
    quality = Quality()
    found: dict[str, dict[str, Any]] = {}
    for method in methods:
        mine, unit = made[method.name], made[method.unit]
        ratios = [own / one for own, one in zip(mine.seconds, unit.seconds, strict=True)]
        plain = made.get(method.plain)
        found[method.name] = {
            "kind": method.kind,
            "solver": method.solver,
            "steps": method.steps,
            "passes": mine.passes,
            "unit": method.unit,
            "macs": mine.macs / unit.macs if mine.macs and unit.macs else None,
            "time": statistics.median(ratios),
            "seconds": mine.seconds,
            **_nearness("psnr", mine.images, made[methods[0].name].images),
            **_nearness("same", mine.images, mine.images if plain is None else plain.images),
            **quality(mine.images, CAPTIONS[: len(mine.images)]),
        }
    return found


def psnrs(images: Images, others: Images) -> list[float]:
    """Return the PSNR of each image, in dB; infinite for two that are equal."""
    return [metrics.psnr(image, other) for image, other in zip(images, others, strict=True)]


def _nearness(key: str, images: Images, others: Images) -> dict[str, float | None]:
    low, median = np.percentile(psnrs(images, others), [10, 50], method="lower")
    found = {key: float(median), f"{key}_low": float(low)}
    return {name: value if np.isfinite(value) else None for name, value in found.items()}
