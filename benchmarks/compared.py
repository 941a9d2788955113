"""The figures of kept images: their time, how near they come to the reference, and what the judge sees in them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from studio import Images, Way
from trained import CAPTIONS, Quality

from sdgraph.evaluation import metrics


@dataclass(frozen=True)
class Kept:
    """What is kept of a way.

    Args:
        images: (captions, height, width, 3) in [0, 1].
        seconds: the time of each part of the captions.
        passes: of the UNet, as text.
    """

    images: Images
    seconds: tuple[float, ...]
    passes: str = ""


def figures(ways: Sequence[Way], kept: Mapping[str, Kept]) -> dict[str, dict[str, Any]]:
    """Compare the ways, of which the first is the reference.

    Args:
        ways: the ways.
        kept: their images of the same captions, by the name of the way.
    Returns:
        The figures by the name of the way. "psnr" compares the median image with the reference, and "psnr_low" the one
        that a tenth are not better than; "same" and "same_low" compare with the same solver and steps without passes.
        They are None where the images are equal. "time" is the median over parts of the captions, in units of the way
        "unit". The others are those of `Quality`.
    """
    quality = Quality()
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        mine, unit = kept[way.name], kept[way.unit]
        ratios = [own / one for own, one in zip(mine.seconds, unit.seconds, strict=True)]
        plain = kept.get(way.plain)
        found[way.name] = {
            "kind": way.kind,
            "solver": way.solver,
            "steps": way.steps,
            "passes": mine.passes,
            "unit": way.unit,
            "time": statistics.median(ratios),
            "seconds": mine.seconds,
            **_nearness("psnr", mine.images, kept[ways[0].name].images),
            **_nearness("same", mine.images, mine.images if plain is None else plain.images),
            **quality(mine.images, CAPTIONS[: len(mine.images)]),
        }
    return found


def psnrs(images: Images, others: Images) -> list[float]:
    """Return the PSNR of each image, in dB; infinite where two are equal."""
    return [metrics.psnr(image, other) for image, other in zip(images, others, strict=True)]


def _nearness(key: str, images: Images, others: Images) -> dict[str, float | None]:
    low, median = np.percentile(psnrs(images, others), [10, 50], method="lower")
    found = {key: float(median), f"{key}_low": float(low)}
    return {name: value if np.isfinite(value) else None for name, value in found.items()}
