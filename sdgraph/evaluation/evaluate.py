"""`evaluate`: what a change does to a pipeline's images. The same prompts and seeds, before and after."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm import tqdm

from ..compiler.base import Pass
from ..compiler.parse import as_passes
from ..errors import QualityError, SourceError, SpecError, did_you_mean
from ..inheritance.attach import attach
from ..runtime.apply import apply
from ..runtime.interface import UNetCall
from ..runtime.pipelines import with_unet
from ..runtime.unet import GraphUNet
from ..views.format import columns
from . import metrics as similarity
from .metrics import Images

Judge = Callable[[Images, Sequence[str]], Mapping[str, float]]
PERCEPTUAL = ("lpips", "clip")


@dataclass(frozen=True)
class Evaluation:
    """Images before and after, and what was measured of them. Prints as a table.

    Args:
        before: what was compared, in words.
        after: with what.
        prompts: of image i; the same on both sides.
        seeds: of image i; the same on both sides.
        alike: figures of the two sides together: "psnr" (dB), "ssim", "largest" (difference, of 1), "equal" (share of
            images without any difference), and "lpips" if asked for.
        figures: of each side alone, by name: what the judge says, and "clip" if asked for.
        seconds: per image of each side, the median over the batches. The sides take turns, so the ratio of the two
            holds on a busy machine as well; the first batch warms up and counts only if it is the only one.
        images: of each side, `(N, H, W, 3)` in [0, 1].
    """

    before: str
    after: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    alike: Mapping[str, float]
    figures: Mapping[str, tuple[float, float]]
    seconds: tuple[float, float]
    images: tuple[Images, Images] = field(repr=False)

    def __str__(self) -> str:
        rows = [("", "before", "after", "change")]
        rows += [(name, f"{a:.4g}", f"{b:.4g}", f"{b - a:+.4g}") for name, (a, b) in self.figures.items()]
        a, b = self.seconds
        rows += [("seconds per image", f"{a:.3g}", f"{b:.3g}", f"x {b / a:.3f}")]
        rows += [(name, "", "", f"{value:.4g}{' dB' * (name == 'psnr')}") for name, value in self.alike.items()]
        told = [f"before: {self.before}", f"after:  {self.after}", f"{len(self.prompts)} images", ""]
        return "\n".join([*told, columns(rows)])

    def as_dict(self) -> dict[str, Any]:
        """Everything but the images, as plain data. JSON knows no infinity: the PSNR of equal images is None."""
        alike = {name: value if math.isfinite(value) else None for name, value in self.alike.items()}
        return {
            "before": self.before,
            "after": self.after,
            "images": [{"prompt": p, "seed": s} for p, s in zip(self.prompts, self.seeds, strict=True)],
            "alike": alike,
            "figures": {name: {"before": a, "after": b} for name, (a, b) in self.figures.items()},
            "seconds per image": {"before": self.seconds[0], "after": self.seconds[1]},
        }

    def save(self, folder: str | Path, rows: int = 8) -> None:
        """Write `evaluation.json`, and `evaluation.png`: the first images side by side, and how they differ."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n")
        self.picture(rows).save(folder / "evaluation.png")

    def picture(self, rows: int = 8) -> Any:
        """A PIL image: a row for each of the first `rows` images, with its prompt; before, after, and the difference.

        The difference is of absolute values, the largest of all rows as white.
        """
        from PIL import Image, ImageDraw

        before, after = (side[:rows] for side in self.images)
        change = np.abs(after - before)
        change = change / max(float(change.max()), 1e-12)
        height, width = before.shape[1:3]
        scale = max(1, 128 // height)
        text, gap = 16, 4
        step_x, step_y = width * scale + gap, height * scale + text + gap
        sheet = Image.new("RGB", (3 * step_x + gap, len(before) * step_y + text + gap), "white")
        pen = ImageDraw.Draw(sheet)
        for column, title in enumerate(("before", "after", "difference")):
            pen.text((gap + column * step_x, 2), title, fill="black")
        for row, images in enumerate(zip(before, after, change, strict=True)):
            y = text + gap + row * step_y
            pen.text((gap, y), f"{self.prompts[row]} [{self.seeds[row]}]", fill="black")
            for column, image in enumerate(images):
                tile = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
                tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
                sheet.paste(tile, (gap + column * step_x, y + text))
        return sheet

    def require(self, *, at_most: Mapping[str, float] | None = None, **at_least: float) -> Evaluation:
        """This evaluation, if `after` is good enough.

        Args:
            at_least: the least value of a figure by name, such as `psnr=30` (dB), `ssim=0.9`, or what the judge says;
                names that are no Python names go in as `**{"shape and colour": 0.9}`.
            at_most: the most, such as `{"lpips": 0.1}`.
        Raises:
            QualityError: a figure misses its bound: "psnr below 30 dB: 24.1".
            SpecError: no such figure was measured.
        """
        known = {**{name: after for name, (_, after) in self.figures.items()}, **self.alike}
        bounds = [(name, "below", bound) for name, bound in at_least.items()]
        bounds += [(name, "above", bound) for name, bound in (at_most or {}).items()]
        for name, _, _ in bounds:
            if name not in known:
                raise SpecError(
                    f"no figure {name!r} was measured", where=self.after,
                    hint=did_you_mean(name, known) or f"there are {', '.join(known)}",
                )  # fmt: skip
        missed = [
            f"{_TITLES.get(name, name)} {side} {bound:g}{' dB' * (name == 'psnr')}: {known[name]:.4g}"
            for name, side, bound in bounds
            # so written that a NaN misses every bound
            if not (known[name] >= bound if side == "below" else known[name] <= bound)
        ]
        if missed:
            raise QualityError("; ".join(missed), where=self.after, hint="weaker passes, or fine-tune after them")
        return self


_TITLES = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "clip": "CLIP score"}


def evaluate(
    before: DiffusionPipeline | nn.Module,
    after: Any,
    prompts: str | Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    pipe: DiffusionPipeline | None = None,
    judge: Judge | None = None,
    perceptual: Collection[str] = (),
    clip: str = similarity.CLIP,
    batch: int = 1,
    progress: bool = True,
    **call: Any,
) -> Evaluation:
    """Run two pipelines, or a pipeline with two UNets, on the same prompts and seeds, and compare their images.

    Args:
        before: a diffusers pipeline; or a UNet, to be run in `pipe`.
        after: a pipeline; or a UNet (a `GraphUNet`, an `ORTUNet`, diffusers' own) for the pipeline of `before`; or
            passes, as `sdgraph.apply` takes them, which are applied to the UNet of `before`.
        prompts: every prompt is run with every seed.
        seeds: of a CPU generator for each image.
        judge: figures of each side alone: `judge(images (N, H, W, 3) in [0, 1], prompts (N))` gives them by name.
        perceptual: "lpips" (the two sides together; needs the `quality` extra) and "clip" (each side with its
            prompts; needs `pipelines`). Both need weights that their libraries download.
        clip: the CLIP model, by its name on the hub or its folder.
        batch: images per call.
        progress: show a bar; the pipelines' own bars are off meanwhile.
        call: further arguments of both pipelines, such as `num_inference_steps=25`, `image=...`.
    Returns:
        an `Evaluation`. The pipelines are as they were.
    Raises:
        SourceError: not a pipeline, or one without a UNet where a UNet is to be exchanged.
        SpecError: an option names nothing known, or there are no prompts or seeds.
        QualityError: images that are not finite, of two sizes, or no images.
    """
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    runs = tuple(product(prompts, seeds))
    if not runs:
        raise SpecError(
            "nothing to compare: no prompts or no seeds", where="evaluate", hint="give at least one of each"
        )
    if "output_type" in call:
        raise SpecError("output_type is not yours to set", where="evaluate", hint="leave it out: images are compared")
    for name in perceptual:
        if name not in PERCEPTUAL:
            raise SpecError(
                f"unknown measure {name!r}", where="perceptual",
                hint=did_you_mean(name, PERCEPTUAL) or f"there are {', '.join(PERCEPTUAL)}",
            )  # fmt: skip
    first, second = _sides(before, after, pipe)
    parts = [runs[i : i + batch] for i in range(0, len(runs), batch)]
    images: tuple[list[Images], list[Images]] = ([], [])
    seconds: tuple[list[float], list[float]] = ([], [])
    with contextlib.ExitStack() as stack:
        for one in {id(side.pipe): side.pipe for side in (first, second)}.values():
            stack.enter_context(_without_bar(one))
        bar = stack.enter_context(tqdm(total=2 * len(runs), desc="evaluate", unit="image", disable=not progress))
        for turn, part in enumerate(parts):
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            for i in order:
                start = time.perf_counter()
                images[i].append((first, second)[i].run(part, call))
                seconds[i].append((time.perf_counter() - start) / len(part))
                bar.update(len(part))
    a, b = (np.concatenate(side) for side in images)
    if a.shape != b.shape:
        raise QualityError(
            f"the images are of two sizes: {a.shape[1:]} before, {b.shape[1:]} after", where=second.name,
            hint="give height and width",
        )  # fmt: skip
    texts = tuple(prompt for prompt, _ in runs)
    largest = np.abs(a - b).max((1, 2, 3))
    alike = {"psnr": similarity.psnr(a, b), "ssim": similarity.ssim(a, b)}
    alike |= {"largest": float(largest.max()), "equal": float(np.mean(largest == 0))}
    figures: dict[str, tuple[float, float]] = {}
    if judge is not None:
        judged = judge(a, texts), judge(b, texts)
        figures |= {name: (float(judged[0][name]), float(judged[1][name])) for name in judged[0]}
    if "clip" in perceptual:
        figures["clip"] = similarity.clip_score(a, texts, clip), similarity.clip_score(b, texts, clip)
    if "lpips" in perceptual:
        alike["lpips"] = similarity.lpips(a, b)
    warm = [side[1:] or side for side in seconds]
    return Evaluation(
        before=first.name,
        after=second.name,
        prompts=texts,
        seeds=tuple(seed for _, seed in runs),
        alike=alike,
        figures=figures,
        seconds=(statistics.median(warm[0]), statistics.median(warm[1])),
        images=(a, b),
    )


@dataclass(frozen=True)
class _Side:
    """A pipeline, and the UNet to run in it (None: its own)."""

    name: str
    pipe: DiffusionPipeline
    unet: Any = None

    def run(self, part: Sequence[tuple[str, int]], call: Mapping[str, Any]) -> Images:
        generators = [torch.Generator().manual_seed(seed) for _, seed in part]
        with with_unet(self.pipe, self.unet), _attached(self.pipe):
            found = self.pipe(
                prompt=[prompt for prompt, _ in part], generator=generators, **{**call, "output_type": "np"}
            )
        images = getattr(found, "images", None)
        if not isinstance(images, np.ndarray) or images.ndim != 4 or images.shape[0] != len(part):
            raise QualityError(
                f"the pipeline gives no image per prompt but {type(found).__name__}", where=self.name,
                hint="evaluate compares pipelines that make one image per prompt",
            )  # fmt: skip
        if not np.isfinite(images).all():
            raise QualityError(
                f"images that are not finite: {[prompt for prompt, _ in part]}", where=self.name,
                hint="float16 may have overflowed: run it in float32 or bfloat16",
            )  # fmt: skip
        return images


def _attached(pipe: DiffusionPipeline) -> contextlib.AbstractContextManager[Any]:
    """The pipeline with its UNet attached, if that inherits features: as it would be deployed."""
    inherits = hasattr(getattr(pipe, "unet", None), "generations") and hasattr(pipe, "scheduler")
    return attach(pipe) if inherits else contextlib.nullcontext()


def _sides(before: Any, after: Any, pipe: DiffusionPipeline | None) -> tuple[_Side, _Side]:
    if pipe is None:
        if not isinstance(before, DiffusionPipeline):
            raise SourceError(
                f"{type(before).__name__} is no diffusers pipeline",
                where="before",
                hint="give the pipeline as pipe=...",
            )
        pipe = before
    first = _side(before, pipe, "before")
    return first, _side(after, first.pipe, "after", first.unet)


def _side(one: Any, pipe: DiffusionPipeline, where: str, base: Any = None) -> _Side:
    """`one` as something that can run; passes are applied to `base`, or else to the UNet of `pipe`."""
    if isinstance(one, DiffusionPipeline):
        return _Side(type(one).__name__, one)
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise SourceError(
            f"{type(pipe).__name__} has no UNet, only {', '.join(pipe.components)}", where=where,
            hint="compare two whole pipelines",
        )  # fmt: skip
    if isinstance(one, str | Pass | list | tuple):
        passes = as_passes(one)
        return _Side(", ".join(map(str, passes)) or "traced", pipe, apply(unet if base is None else base, passes))
    if isinstance(one, nn.Module | UNetCall):
        done = one.graph.passes if isinstance(one, GraphUNet) else ()
        return _Side(": ".join([type(one).__name__, ", ".join(map(str, done))][: 1 + bool(done)]), pipe, one)
    raise SourceError(
        f"{type(one).__name__} is neither a pipeline nor a UNet nor passes", where=where,
        hint="a diffusers pipeline, a UNet or passes",
    )  # fmt: skip


@contextlib.contextmanager
def _without_bar(pipe: DiffusionPipeline) -> Iterator[None]:
    settings = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(settings or {}), "disable": True})
    try:
        yield
    finally:
        if settings is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = settings
