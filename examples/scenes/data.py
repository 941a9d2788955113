"""The training set: a fixed number of scenes, drawn once, and encoded once the VAE is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .draw import SIZE, draw
from .scene import Scene, scene


def scenes(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    """The scenes of a seed; scene i is the same whatever `count` is."""
    return [scene(np.random.default_rng((seed, i)), held_out) for i in range(count)]


def drawn(scenes: list[Scene], file: Path) -> np.ndarray:
    """`scenes` as (N, 64, 64, 3) uint8, kept in `file`."""
    return _kept(file, (len(scenes), SIZE, SIZE, 3), np.uint8, lambda i: np.stack([draw(s) for s in scenes[i]]))


@torch.no_grad()
def encoded(images: np.ndarray, vae: torch.nn.Module, file: Path) -> np.ndarray:
    """Means and standard deviations (N, 8, 16, 16) of the latents of `images`, kept in `file`; not scaled."""

    device = next(vae.parameters()).device  # where training left it

    def encode(part: slice) -> np.ndarray:
        latent = vae.encode(pixels(images[part]).to(device)).latent_dist
        return torch.cat([latent.mean, latent.std], 1).cpu().numpy()

    return _kept(file, (len(images), 8, SIZE // 4, SIZE // 4), np.float16, encode)


def scaling_factor(latents: np.ndarray) -> float:
    """What makes the latents' standard deviation 1, as Stable Diffusion's VAE configuration has it."""
    return 1 / float(latents[:4096, :4].astype(np.float32).std())


def crops(
    images: np.ndarray, scenes: list[Scene], chosen: np.ndarray, rng: np.random.Generator, size: int = 32
) -> Tensor:
    """A crop (N, 3, size, size) of each chosen image, around one of its objects."""
    found = []
    for i in chosen:
        thing = scenes[i].things[rng.integers(len(scenes[i].things))]
        x, y = (
            int(np.clip(round(centre) - size // 2 + rng.integers(-6, 7), 0, SIZE - size)) for centre in thing.position
        )
        found.append(images[i, y : y + size, x : x + size])
    return pixels(np.stack(found))


def pixels(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1


def _kept(file: Path, shape: tuple[int, ...], dtype: type, make: Callable[[slice], np.ndarray]) -> np.ndarray:
    """The array in `file`, made 256 rows at a time if there is none yet."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new.npy")
        array = np.lib.format.open_memmap(new, mode="w+", dtype=dtype, shape=shape)
        for start in tqdm(range(0, len(array), 256), desc=file.stem, unit="batch"):
            array[start : start + 256] = make(slice(start, start + 256))
        array.flush()
        new.rename(file)
    kept = np.load(file, mmap_mode="r")
    if kept.shape != shape:
        raise ValueError(f"{file} holds an array of shape {kept.shape}, not {shape}: remove it to make it anew")
    return kept
