"""The quality of images of scenes: what the judge recognises in them, compared with their captions.

cd examples
python -m scenes.quality --out ../out/quality      # the shipped model, 1,000 held-out captions
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

from sdgraph.evaluation import metrics

from . import data
from .caption import Mention, caption, mentions
from .draw import draw
from .judge import ATTRIBUTES, Judge
from .pipeline import GUIDANCE, MODEL, QUALITY, load
from .scene import PLACES, Scene

HELD_OUT_SEED, REFERENCE_SEED = 77, 78  # of the captions, and of the drawn images of the Fréchet distance


class Quality:
    """Computes figures of images (N, 64, 64, 3) in [0, 1] and their captions; `sdgraph.evaluate` accepts it as judge.

    All figures but the last are shares of captions, between 0 and 1. Objects are compared in the order with the most
    matches.
        "shape and colour": the image has exactly the objects of the caption, in the right colours.
        "place": the objects are also at the places that the caption mentions; captions without places are left out.
        "shape", "colour", "size", "count": this attribute is right for all objects.
        "shape and colour, one", "place, two", ...: the first two figures by the number of objects.
        "frechet": the Fréchet distance between the judge's features of the images and those of drawn held-out scenes.

    Args:
        judge: the classifier; by default the trained one.
        references: the number of drawn scenes for the Fréchet distance.
    """

    def __init__(self, judge: Judge | None = None, references: int = 1000):
        self.judge = Judge.load() if judge is None else judge
        scenes = data.scenes(references, REFERENCE_SEED, held_out=True)
        self._reference, _ = self.judge.look(draw(scene) for scene in scenes)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
        features, readings = self.judge.look(np.round(255 * images).astype(np.uint8))
        rows = [
            verdict(mentions(prompt), things_read(reading)) for prompt, reading in zip(prompts, readings, strict=True)
        ]
        figures: dict[str, float] = {}
        for name in rows[0]:
            figures[name] = _share(row[name] for row in rows)
        for count, word in ((1, "one"), (2, "two")):
            for name in ("shape and colour", "place"):
                verdicts = [
                    row[name] for row, prompt in zip(rows, prompts, strict=True) if len(mentions(prompt)) == count
                ]
                figures[f"{name}, {word}"] = _share(verdicts)
        figures["frechet"] = frechet(features, self._reference)
        return figures


def things_read(reading: np.ndarray) -> tuple[Mention, ...]:
    """Convert labels (5, 3) that the judge predicted to objects. A place without a shape has no object."""
    things = []
    for place, row in zip(PLACES, reading, strict=True):
        if row[0]:
            words = [values[index - 1] if index else "" for index, values in zip(row, ATTRIBUTES.values(), strict=True)]
            things.append(Mention(*words, place))
    return tuple(things)


def verdict(expected: tuple[Mention, ...], recognised: tuple[Mention, ...]) -> dict[str, bool | None]:
    """Compare objects in the best order. A figure is None if the caption does not mention it."""
    verdicts = [_compared(expected, order) for order in permutations(recognised)]
    return max(verdicts, key=lambda verdict: sum(map(bool, verdict.values())))


def _compared(expected: Sequence[Mention], recognised: Sequence[Mention]) -> dict[str, bool | None]:
    def right(name: str) -> bool | None:
        if getattr(expected[0], name) is None:
            return None
        return [getattr(thing, name) for thing in expected] == [getattr(thing, name) for thing in recognised]

    both = bool(right("shape") and right("colour"))
    place = right("place")
    return {
        "shape and colour": both,
        "place": None if place is None else both and place,
        "shape": right("shape"),
        "colour": right("colour"),
        "size": right("size"),
        "count": len(expected) == len(recognised),
    }


def _share(verdicts: Iterable[bool | None]) -> float:
    known = [verdict for verdict in verdicts if verdict is not None]
    return float(np.mean(known)) if known else float("nan")


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the Fréchet distance between Gaussians that are fitted to features (N, F) and (M, F).

    It is |μa - μb|² + tr(A + B - 2 (A B)^½), where the trace of the root is the sum of the square roots of the
    eigenvalues of A B.

    Source:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017.
    """
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(A @ B).real, 0, None))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(A) + np.trace(B) - 2 * roots.sum())


def held_out_captions(count: int) -> tuple[list[Scene], list[str]]:
    """Return scenes with a pair of shape and colour that training never shows, and their captions."""
    scenes = data.scenes(count, HELD_OUT_SEED, held_out=True)
    return scenes, [caption(scene, np.random.default_rng((HELD_OUT_SEED, 1, i))) for i, scene in enumerate(scenes)]


@torch.no_grad()
def measure(
    pipe: StableDiffusionPipeline, count: int, steps: int, guidance: float, batch: int = 50
) -> tuple[dict[str, dict[str, float]], np.ndarray, float]:
    """Measure a pipeline on held-out captions.

    Args:
        pipe: the pipeline.
        count: the number of captions.
        steps: the number of inference steps.
        guidance: the guidance scale.
        batch: the number of images per call.
    Returns:
        The figures of the generated images, of the drawn ones, and of the drawn ones through the VAE; the generated
        images (N, 64, 64, 3) in [0, 1]; and the seconds per image.
    """
    scenes, captions = held_out_captions(count)
    drawn = np.stack([draw(scene) for scene in scenes]) / 255.0
    generated, through_vae, seconds = [], [], 0.0
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, count, batch), desc="images", unit="batch"):
        part = slice(start, start + batch)
        pixels = torch.from_numpy(drawn[part]).permute(0, 3, 1, 2).to(pipe.dtype) * 2 - 1
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample
        through_vae.append((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy())
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
        generators = [torch.Generator().manual_seed(i) for i in range(*part.indices(count))]
        start_time = time.perf_counter()
        generated.append(pipe(captions[part], generator=generators, **settings).images)
        seconds += time.perf_counter() - start_time
    quality = Quality(references=count)
    sides = {"generated": np.concatenate(generated), "through the VAE": np.concatenate(through_vae), "drawn": drawn}
    figures = {name: quality(images, captions) for name, images in sides.items()}
    figures["through the VAE"]["psnr"] = metrics.psnr(sides["drawn"], sides["through the VAE"])
    return figures, sides["generated"], seconds / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("../out/quality"))
    parser.add_argument("--count", type=int, default=1000, help="held-out captions")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    options = parser.parse_args()
    write(load(options.model), options.out, options.count, options.steps, options.guidance)


def write(
    pipe: StableDiffusionPipeline, out: Path, count: int = 1000, steps: int = 50, guidance: float = GUIDANCE
) -> None:
    """Measure a pipeline, write the figures to `quality.json` and the first images to `images.png`, and print them."""
    figures, images, seconds = measure(pipe, count, steps, guidance)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    settings = {"count": count, "steps": steps, "guidance": guidance}
    result = {**settings, "machine": machine, "seconds per image": seconds, "figures": figures}
    out.mkdir(parents=True, exist_ok=True)
    (out / QUALITY).write_text(json.dumps(result, indent=2) + "\n")
    rows = [("", *figures), *((name, *(f"{side[name]:.4g}" for side in figures.values())) for name in figures["drawn"])]
    print("\n".join("  ".join(cell.ljust(21) for cell in row).rstrip() for row in rows))
    sheet(images[:32]).save(out / "images.png")


def sheet(images: np.ndarray, columns: int = 8, scale: int = 2) -> Image.Image:
    """Arrange images (N, H, W, 3) in [0, 1] in rows of one picture, enlarged by `scale`."""
    rows = [np.concatenate(list(images[i : i + columns]), 1) for i in range(0, len(images), columns)]
    picture = np.concatenate(rows).repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray((255 * picture).round().astype(np.uint8))


if __name__ == "__main__":
    main()
