"""The training set: a fixed number of scenes, which are drawn once, and encoded once by the trained VAE."""

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
    """Return the first `count` scenes of a seed. Scene i does not depend on `count`."""
    return [scene(np.random.default_rng((seed, i)), held_out) for i in range(count)]


def drawn(scenes: list[Scene], file: Path) -> np.ndarray:
    """Draw `scenes` as uint8 images (N, 64, 64, 3), which are kept in `file`."""
    return _kept(file, (len(scenes), SIZE, SIZE, 3), np.uint8, lambda i: np.stack([draw(s) for s in scenes[i]]))


@torch.no_grad()
def encoded(images: np.ndarray, vae: torch.nn.Module, file: Path) -> np.ndarray:
    """Encode `images` (N, 64, 64, 3), and keep the result in `file`.

    Returns:
        The means and the standard deviations of the latents, (N, 8, 16, 16), without the scaling factor.
    """

    device = next(vae.parameters()).device  # training may have moved it

    def encode(part: slice) -> np.ndarray:
        latent = vae.encode(pixels(images[part]).to(device)).latent_dist
        return torch.cat([latent.mean, latent.std], 1).cpu().numpy()

    return _kept(file, (len(images), 8, SIZE // 4, SIZE // 4), np.float16, encode)


def scaling_factor(latents: np.ndarray) -> float:
    """Return the factor that scales the latents to standard deviation 1, as in Stable Diffusion's VAE configuration."""
    return 1 / float(latents[:4096, :4].astype(np.float32).std())


def crops(
    images: np.ndarray, scenes: list[Scene], chosen: np.ndarray, rng: np.random.Generator, size: int = 32
) -> Tensor:
    """Cut a crop around an object out of every image whose index is in `chosen`.

    Returns:
        The crops (N, 3, size, size) in [-1, 1].
    """
    crops = []
    for i in chosen:
        thing = scenes[i].things[rng.integers(len(scenes[i].things))]
        x, y = (
            int(np.clip(round(centre) - size // 2 + rng.integers(-6, 7), 0, SIZE - size)) for centre in thing.position
        )
        crops.append(images[i, y : y + size, x : x + size])
    return pixels(np.stack(crops))


def pixels(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1


def _kept(file: Path, shape: tuple[int, ...], dtype: type, compute: Callable[[slice], np.ndarray]) -> np.ndarray:
    """Return the array in `file`. If there is no such file, compute the array by 256 rows at a time first."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new.npy")
        array = np.lib.format.open_memmap(new, mode="w+", dtype=dtype, shape=shape)
        for start in tqdm(range(0, len(array), 256), desc=file.stem, unit="batch"):
            array[start : start + 256] = compute(slice(start, start + 256))
        array.flush()
        new.rename(file)
    kept = np.load(file, mmap_mode="r")
    if kept.shape != shape:
        raise ValueError(
            f"{file} holds an array of shape {kept.shape}, not {shape}: delete the file to compute it again"
        )
    return kept
