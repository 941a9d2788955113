"""How good images of scenes are: what the judge reads in them, against what their captions say.

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

from sdgraph.evaluation import metrics as similarity

from . import data
from .caption import Said, caption, said
from .draw import draw
from .judge import ATTRIBUTES, Judge
from .pipeline import GUIDANCE, MODEL, load
from .scene import PLACES, Scene

HELD_OUT_SEED, REFERENCE_SEED = 77, 78  # of the captions, and of the drawn images that they are compared with


class Quality:
    """Figures of images `(N, 64, 64, 3)` in [0, 1] with captions as prompts: what `sdgraph.evaluate` takes as judge.

    Each figure is a share of captions (1 is all):
        "shape and colour": exactly the objects that the caption names are there, each in its colour;
        "place": and each is where the caption says it is (of the captions that say);
        "shape", "colour", "size", "count": that alone is right, for all objects;
        "... one", "... two": the first two by the number of objects.
    Objects are compared in the order that makes the most right. And "frechet": the Fréchet distance between the judge's
    features of the images and of drawn held-out scenes.
    """

    def __init__(self, judge: Judge | None = None, references: int = 1000):
        self.judge = Judge.load() if judge is None else judge
        scenes = data.scenes(references, REFERENCE_SEED, held_out=True)
        self._reference, _ = self.judge.look(draw(scene) for scene in scenes)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
        features, readings = self.judge.look(np.round(255 * images).astype(np.uint8))
        rows = [_verdict(said(prompt), things_read(reading)) for prompt, reading in zip(prompts, readings, strict=True)]
        figures: dict[str, float] = {}
        for name in rows[0]:
            figures[name] = _share(row[name] for row in rows)
        for count, word in ((1, "one"), (2, "two")):
            for name in ("shape and colour", "place"):
                some = [row[name] for row, prompt in zip(rows, prompts, strict=True) if len(said(prompt)) == count]
                figures[f"{name}, {word}"] = _share(some)
        figures["frechet"] = frechet(features, self._reference)
        return figures


def things_read(reading: np.ndarray) -> tuple[Said, ...]:
    """A reading (5, 3) of the judge as objects; a place is taken where it reads a shape."""
    things = []
    for place, row in zip(PLACES, reading, strict=True):
        if row[0]:
            words = [values[index - 1] if index else "" for index, values in zip(row, ATTRIBUTES.values(), strict=True)]
            things.append(Said(*words, place))
    return tuple(things)


def _verdict(told: tuple[Said, ...], found: tuple[Said, ...]) -> dict[str, bool | None]:
    """What is right, the objects found taken in the best order; None: the caption does not say."""
    verdicts = [_compared(told, order) for order in permutations(found)]
    return max(verdicts, key=lambda verdict: sum(map(bool, verdict.values())))


def _compared(told: Sequence[Said], found: Sequence[Said]) -> dict[str, bool | None]:
    def right(name: str) -> bool | None:
        if getattr(told[0], name) is None:
            return None
        return [getattr(thing, name) for thing in told] == [getattr(thing, name) for thing in found]

    both = bool(right("shape") and right("colour"))
    place = right("place")
    return {
        "shape and colour": both,
        "place": None if place is None else both and place,
        "shape": right("shape"),
        "colour": right("colour"),
        "size": right("size"),
        "count": len(told) == len(found),
    }


def _share(verdicts: Iterable[bool | None]) -> float:
    known = [verdict for verdict in verdicts if verdict is not None]
    return float(np.mean(known)) if known else float("nan")


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to features (N, F) and (M, F); Heusel et al., 2017.

    |μa - μb|² + tr(A + B - 2 (A B)^½); the trace of the root is the sum of the roots of the eigenvalues of A B.
    """
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(A @ B).real, 0, None))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(A) + np.trace(B) - 2 * roots.sum())


def held_out_captions(count: int) -> tuple[list[Scene], list[str]]:
    """Scenes with a pair that training never shows, and a caption of each."""
    scenes = data.scenes(count, HELD_OUT_SEED, held_out=True)
    return scenes, [caption(scene, np.random.default_rng((HELD_OUT_SEED, 1, i))) for i, scene in enumerate(scenes)]


@torch.no_grad()
def measure(
    pipe: StableDiffusionPipeline, count: int, steps: int, guidance: float, batch: int = 50
) -> tuple[dict[str, dict[str, float]], np.ndarray, float]:
    """Figures of `count` generated images, of the drawn ones and of those after the VAE; the images; seconds each."""
    scenes, captions = held_out_captions(count)
    drawn = np.stack([draw(scene) for scene in scenes]) / 255.0
    made, through, seconds = [], [], 0.0
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, count, batch), desc="images", unit="batch"):
        part = slice(start, start + batch)
        pixels = torch.from_numpy(drawn[part]).permute(0, 3, 1, 2).to(pipe.dtype) * 2 - 1
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample
        through.append((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy())
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
        generators = [torch.Generator().manual_seed(i) for i in range(*part.indices(count))]
        start_time = time.perf_counter()
        made.append(pipe(captions[part], generator=generators, **settings).images)
        seconds += time.perf_counter() - start_time
    quality = Quality(references=count)
    sides = {"generated": np.concatenate(made), "through the VAE": np.concatenate(through), "drawn": drawn}
    figures = {name: quality(images, captions) for name, images in sides.items()}
    figures["through the VAE"]["psnr"] = similarity.psnr(sides["drawn"], sides["through the VAE"])
    return figures, sides["generated"], seconds / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("../out/quality"))
    parser.add_argument("--count", type=int, default=1000, help="held-out captions")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    options = parser.parse_args()
    figures, images, seconds = measure(load(options.model), options.count, options.steps, options.guidance)
    settings = {name: getattr(options, name) for name in ("count", "steps", "guidance")}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    result = {**settings, "machine": machine, "seconds per image": seconds, "figures": figures}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quality.json").write_text(json.dumps(result, indent=2) + "\n")
    rows = [("", *figures), *((name, *(f"{side[name]:.4g}" for side in figures.values())) for name in figures["drawn"])]
    print("\n".join("  ".join(cell.ljust(18) for cell in row).rstrip() for row in rows))
    sheet(images[:32]).save(options.out / "images.png")


def sheet(images: np.ndarray, columns: int = 8, scale: int = 2) -> Image.Image:
    """Images in [0, 1] as one picture, row by row, each pixel `scale` times as large."""
    rows = [np.concatenate(list(images[i : i + columns]), 1) for i in range(0, len(images), columns)]
    picture = np.concatenate(rows).repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray((255 * picture).round().astype(np.uint8))


if __name__ == "__main__":
    main()
