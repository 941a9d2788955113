"""`evaluate`: a comparison of the images of a pipeline before and after a change, for the same prompts and seeds."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from diffusers import DiffusionPipeline
from torch import nn

from ..atomic import written
from ..compiler.passes import Pass, as_passes
from ..errors import QualityError, SourceError, SpecError, did_you_mean
from ..inheritance.attach import attach
from ..options import Bounds, Count, Number, Seed, Text, checked
from ..progress import Bar
from ..runtime.apply import apply
from ..runtime.diffusers_api import UNetCall
from ..runtime.pipelines import generate, with_unet, without_bar
from ..runtime.unet import GraphUNet
from ..solvers import name_of
from ..views.format import format_table
from . import metrics
from .metrics import Images

Judge = Callable[[Images, Sequence[str]], Mapping[str, float]]
FORMAT = 1  # of `evaluation.json`
MOST = 1_000_000  # images of a comparison, which are kept
PERCEPTUAL = ("lpips", "clip")


@dataclass(frozen=True)
class Evaluation:
    """The N images before and after a change, and their figures. It prints as a table.

    Args:
        before: a description of the first side.
        after: a description of the second side.
        prompts: the prompt of each image, the same on both sides.
        seeds: the seed of each image, the same on both sides.
        pairwise: figures that compare the two sides: "psnr" in dB, "ssim", "largest" (the largest absolute difference
            of values in [0, 1]), "equal" (the share of images without any difference), and "lpips" on request.
        figures: figures of each side by itself, as pairs (before, after): those of the judge, and "clip" on request.
        seconds: seconds per image, (before, after), the median over the batches. The sides take turns, so that the
            ratio also holds on a busy machine. The first batch is a warm-up, and counts only if it is the only one.
        images: the images of both sides, (N, H, W, 3) in [0, 1].
    """

    before: str
    after: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    pairwise: Mapping[str, float]
    figures: Mapping[str, tuple[float, float]]
    seconds: tuple[float, float]
    images: tuple[Images, Images] = field(repr=False)

    def __str__(self) -> str:
        rows = [("", "before", "after", "change")]
        rows += [(name, f"{a:.4g}", f"{b:.4g}", f"{b - a:+.4g}") for name, (a, b) in self.figures.items()]
        a, b = self.seconds
        rows += [("seconds per image", f"{a:.3g}", f"{b:.3g}", f"x {b / a:.3f}")]
        rows += [(name, "", "", f"{value:.4g}{' dB' * (name == 'psnr')}") for name, value in self.pairwise.items()]
        head = [f"before: {self.before}", f"after:  {self.after}", f"{len(self.prompts)} images", ""]
        return "\n".join([*head, format_table(rows)])

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the images as plain data. The PSNR of equal images is None: JSON has no infinity."""
        pairwise = {name: value if math.isfinite(value) else None for name, value in self.pairwise.items()}
        return {
            "before": self.before,
            "after": self.after,
            "images": [{"prompt": p, "seed": s} for p, s in zip(self.prompts, self.seeds, strict=True)],
            "pairwise": pairwise,
            "figures": {name: {"before": a, "after": b} for name, (a, b) in self.figures.items()},
            "seconds per image": {"before": self.seconds[0], "after": self.seconds[1]},
        }

    @checked(SpecError)
    def save(self, folder: Text | Path, rows: Count = 8) -> None:
        """Write the figures to `evaluation.json`, and `draw(rows)` to `evaluation.png`.

        Args:
            folder: the folder of the two files, which is created if necessary.
            rows: the number of images in the picture.
        """
        with written(Path(folder, "evaluation.json")) as figures, written(Path(folder, "evaluation.png")) as picture:
            figures.write_text(json.dumps({"format": FORMAT, **self.as_dict()}, indent=2, allow_nan=False) + "\n")
            self.draw(rows).save(picture)

    @checked(SpecError)
    def draw(self, rows: Count = 8) -> Any:
        """Draw the first images before and after the change, and their difference, in one row for each prompt.

        Args:
            rows: the number of images to draw.
        Returns:
            A PIL image. The difference is absolute, and scaled so that the largest difference of all rows is white.
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

    @checked(SpecError)
    def require(self, *, at_most: Mapping[str, Number] | None = None, **at_least: float) -> Evaluation:
        """Check that the figures of the second side are within bounds.

        Args:
            at_least: the smallest allowed values by figure, such as `psnr=30` (dB), `ssim=0.9`, or a figure of the
                judge. A name that is no Python name is passed as `**{"shape and colour": 0.9}`.
            at_most: the largest allowed values by figure, such as `{"lpips": 0.1}`.
        Returns:
            This evaluation.
        Raises:
            QualityError: a figure misses its bound: "PSNR below 30 dB: 24.1".
            SpecError: no such figure was measured.
        """
        measured = {**{name: after for name, (_, after) in self.figures.items()}, **self.pairwise}
        bounds = [(name, "below", bound) for name, bound in at_least.items()]
        bounds += [(name, "above", bound) for name, bound in (at_most or {}).items()]
        for name, _, _ in bounds:
            if name not in measured:
                raise SpecError(
                    f"no figure {name!r} was measured", where=self.after,
                    hint=did_you_mean(name, measured) or f"the figures are {', '.join(measured)}",
                )  # fmt: skip
        misses = [
            f"{_TITLES.get(name, name)} {side} {bound:g}{' dB' * (name == 'psnr')}: {measured[name]:.4g}"
            for name, side, bound in bounds
            # written as a negation, so that a NaN misses every bound
            if not (measured[name] >= bound if side == "below" else measured[name] <= bound)
        ]
        if misses:
            hint = "change less, or fine-tune the UNet after the passes"
            raise QualityError("; ".join(misses), where=self.after, hint=hint)
        return self


_TITLES = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "clip": "CLIP score"}


@checked(SpecError)
def evaluate(
    before: Annotated[DiffusionPipeline | nn.Module, Any],
    after: Any,
    prompts: str | Sequence[str],
    *,
    seeds: Annotated[Sequence[Seed], Bounds(length=1)] = (0,),
    pipe: DiffusionPipeline | None = None,
    judge: Judge | None = None,
    perceptual: Collection[str] = (),
    clip: Text = metrics.CLIP,
    batch: Count = 1,
    progress: bool = True,
    before_call: Mapping[str, Any] | None = None,
    **call: Any,
) -> Evaluation:
    """Run two pipelines, or a pipeline with two UNets, on the same prompts and seeds, and compare their images.

    Args:
        before: a diffusers pipeline, or a UNet that runs in `pipe`.
        after: a pipeline; or a UNet (a `GraphUNet`, an `ORTUNet` or diffusers' own) that runs in the pipeline of
            `before`, or in `pipe` if that is given; or passes as `sdgraph.apply` accepts them, which are applied to
            the UNet of `before`, or to that of `pipe` if both are pipelines.
        prompts: the prompts; every prompt is run with every seed.
        seeds: the seeds; every image has a separate CPU generator.
        pipe: the pipeline that UNets run in; needed if `before` is a UNet.
        judge: a function of the images (N, H, W, 3) in [0, 1] of a side and their N prompts, which returns figures of
            that side by name.
        perceptual: "lpips", which compares the sides and needs the `quality` extra, or "clip", which compares images
            with their prompts and needs the `pipelines` extra. Their libraries download the weights.
        clip: the folder of the CLIP model, or its name on the hub.
        batch: the number of images per call of a pipeline.
        progress: whether a progress bar is shown; the pipelines' own bars are hidden meanwhile.
        before_call: the arguments of the first side alone, which override those in `call`, such as
            `{"num_inference_steps": 50}`. To compare two schedulers, pass two pipelines: `before` and `pipe`.
        call: the further arguments of both pipelines, such as `num_inference_steps=25` or `image=...`.
    Returns:
        An `Evaluation`. The pipelines are left as they were.
    Raises:
        SourceError: there is no pipeline, or the pipeline has no UNet to exchange.
        SpecError: there are no prompts or no seeds, or an option has an unknown value.
        QualityError: a pipeline returns no images, or images that are not finite or differ in size.
    Example:
        `print(evaluate(pipe, "PruneBlocks('mid_block')", ["a bowl of fruit"], num_inference_steps=25))`
    """
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not 0 < len(prompts) * len(seeds) <= MOST:
        what = "nothing to compare: no prompts" if not prompts else f"more than {MOST} images to compare"
        raise SpecError(f"there is {what}", where="evaluate", hint="give some prompts, and a seed or a few")
    runs = tuple(product(prompts, seeds))
    before_call = {**call, **(before_call or {})}
    if "output_type" in before_call:
        raise SpecError("evaluate sets output_type itself", where="evaluate", hint="leave output_type out")
    for name in perceptual:
        if name not in PERCEPTUAL:
            raise SpecError(
                f"there is no perceptual figure {name!r}", where="perceptual",
                hint=did_you_mean(name, PERCEPTUAL) or f"the figures are {', '.join(PERCEPTUAL)}",
            )  # fmt: skip
    first, second = _distinguished(*_sides(before, after, pipe, before_call, call))
    batches = [runs[i : i + batch] for i in range(0, len(runs), batch)]
    images: tuple[list[Images], list[Images]] = ([], [])
    seconds: tuple[list[float], list[float]] = ([], [])
    with contextlib.ExitStack() as stack:
        for pipeline in {id(side.pipe): side.pipe for side in (first, second)}.values():
            stack.enter_context(without_bar(pipeline))
        bar = stack.enter_context(Bar(total=2 * len(runs), desc="evaluate", unit="image", disable=not progress))
        for turn, part in enumerate(batches):
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            for i in order:
                start = time.perf_counter()
                images[i].append((first, second)[i].run(part))
                seconds[i].append((time.perf_counter() - start) / len(part))
                bar.update(len(part))
    a, b = (np.concatenate(side) for side in images)
    if a.shape != b.shape:
        raise QualityError(
            f"the images have different sizes: {a.shape[1:]} before, {b.shape[1:]} after", where=second.name,
            hint="pass the same height and width to both pipelines",
        )  # fmt: skip
    image_prompts = tuple(prompt for prompt, _ in runs)
    largest = np.abs(a - b).max((1, 2, 3))
    pairwise = {"psnr": metrics.psnr(a, b), "ssim": metrics.ssim(a, b)}
    pairwise |= {"largest": float(largest.max()), "equal": float(np.mean(largest == 0))}
    figures: dict[str, tuple[float, float]] = {}
    if judge is not None:
        judged = judge(a, image_prompts), judge(b, image_prompts)
        figures |= {name: (float(judged[0][name]), float(judged[1][name])) for name in judged[0]}
    if "clip" in perceptual:
        figures["clip"] = metrics.clip_score(a, image_prompts, clip), metrics.clip_score(b, image_prompts, clip)
    if "lpips" in perceptual:
        pairwise["lpips"] = metrics.lpips(a, b)
    warm = [side[1:] or side for side in seconds]
    return Evaluation(
        before=first.name,
        after=second.name,
        prompts=image_prompts,
        seeds=tuple(seed for _, seed in runs),
        pairwise=pairwise,
        figures=figures,
        seconds=(statistics.median(warm[0]), statistics.median(warm[1])),
        images=(a, b),
    )


@dataclass(frozen=True)
class _Side:
    """One side of the comparison: a pipeline, the UNet that runs in it, or None for its own, and further arguments."""

    name: str
    pipe: DiffusionPipeline
    unet: Any = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def run(self, part: Sequence[tuple[str, int]]) -> Images:
        prompts, seeds = zip(*part, strict=True)
        with with_unet(self.pipe, self.unet), _attached(self.pipe):
            output = generate(self.pipe, prompts, seeds, {**self.call, "output_type": "np"}, QualityError)
        images = getattr(output, "images", None)
        if not isinstance(images, np.ndarray) or images.ndim != 4 or images.shape[0] != len(part):
            raise QualityError(
                f"the pipeline does not return one image per prompt but {type(output).__name__}", where=self.name,
                hint="evaluate needs pipelines that return one image per prompt",
            )  # fmt: skip
        if not np.isfinite(images).all():
            raise QualityError(
                f"images are not finite, for the prompts {[prompt for prompt, _ in part]}", where=self.name,
                hint="run the pipeline in float32 or bfloat16, for float16 may have overflowed",
            )  # fmt: skip
        return images


def _attached(pipe: DiffusionPipeline) -> contextlib.AbstractContextManager[Any]:
    """Attach the scheduler to the UNet if it inherits features, as in deployment."""
    inherits = hasattr(getattr(pipe, "unet", None), "tracker") and hasattr(pipe, "scheduler")
    return attach(pipe) if inherits else contextlib.nullcontext()


def _sides(
    before: Any,
    after: Any,
    pipe: DiffusionPipeline | None,
    before_call: Mapping[str, Any],
    call: Mapping[str, Any],
) -> tuple[_Side, _Side]:
    if pipe is None:
        if not isinstance(before, DiffusionPipeline):
            raise SourceError(
                f"{type(before).__name__} is not a diffusers pipeline",
                where="before",
                hint="pass the pipeline as pipe=...",
            )
        pipe = before
    first = _side(before, pipe, "before")
    second = _side(after, pipe, "after", first.unet)
    return replace(first, call=before_call), replace(second, call=call)


def _distinguished(first: _Side, second: _Side) -> tuple[_Side, _Side]:
    """Return the sides with names that say which other arguments and schedulers they have."""
    keys = [k for k in {**first.call, **second.call} if first.call.get(k) is not second.call.get(k)]
    keys = [k for k in keys if repr(first.call.get(k)) != repr(second.call.get(k))]
    schedulers = [getattr(side.pipe, "scheduler", None) for side in (first, second)]
    solvers = [type(scheduler).__name__ for scheduler in schedulers]
    if solvers[0] == solvers[1] and schedulers[0] is not None:  # they may differ in options
        solvers = [name_of(scheduler) for scheduler in schedulers]

    def named(side: _Side, solver: str) -> _Side:
        notes = [f"{key}={side.call[key]!r}" for key in keys if key in side.call]
        notes += [solver] if solvers[0] != solvers[1] and solver else []
        return replace(side, name=f"{side.name} ({', '.join(notes)})") if notes else side

    return named(first, solvers[0]), named(second, solvers[1])


def _side(subject: Any, pipe: DiffusionPipeline, where: str, base: Any = None) -> _Side:
    """Return the side of a pipeline, a UNet or passes. Passes are applied to `base`, or else to the UNet of `pipe`."""
    if isinstance(subject, DiffusionPipeline):
        own = getattr(subject, "unet", None)
        done = ", ".join(map(str, own.graph.passes)) if isinstance(own, GraphUNet) else ""
        name = type(subject).__name__
        return _Side(f"{name} with {done}" if done else name, subject)
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise SourceError(
            f"{type(pipe).__name__} has no UNet, only {', '.join(pipe.components)}", where=where,
            hint="pass two pipelines to compare them as a whole",
        )  # fmt: skip
    if isinstance(subject, str | Pass | list | tuple):
        passes = as_passes(subject)
        return _Side(", ".join(map(str, passes)) or "traced", pipe, apply(unet if base is None else base, passes))
    if isinstance(subject, nn.Module | UNetCall):
        applied = subject.graph.passes if isinstance(subject, GraphUNet) else ()
        name = f"{type(subject).__name__}: {', '.join(map(str, applied))}" if applied else type(subject).__name__
        return _Side(name, pipe, subject)
    raise SourceError(
        f"{type(subject).__name__} is neither a pipeline nor a UNet nor passes", where=where,
        hint="pass a diffusers pipeline, a UNet or passes",
    )  # fmt: skip
