"""A folder of images with captions, encoded by the VAE and the text encoder of a pipeline, as a source."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import TuningError
from ...options import Count, Index, Text, checked
from ...runtime.digest import as_number, hash_files, hash_model, hash_text
from ...runtime.latents import as_pipelines_run_it, encoded, scaled
from ..processes import begin_worker
from ..random_numbers import generator
from .base import Contents, Samples, Source
from .captions import Captions, as_texts, time_ids, with_empty
from .image_folder import Captioned, Crop, captioned, colour, pixels
from .tensor_cache import FILES, GIGABYTE, TensorCache, begin

BATCH = 16  # images that are encoded at a time


class Images(Source):
    """A folder of images with captions, as diffusers' scripts read `--train_data_dir`.

    The shorter side of an image becomes `resolution`, and a square is cut out of it. Its latents are a sample of the
    VAE's distribution, another one whenever the row is read. SDXL gets the original size and the corner of the crop.
    An image is what a viewer shows: upright, in sRGB, in front of a background where it is transparent. All images are
    looked at first, and what viewers show differently, such as animations and 32-bit TIFF, is refused.

    Args:
        folder: the folder. Captions are in `metadata.jsonl` or `metadata.csv`, with columns `file_name` and
            `caption_column`, or else in NAME.txt beside each image. Folders below it count as well.
        pipe: the pipeline of the teacher; its VAE and text encoder encode the data where they are.
        resolution: the height and width of the crops, in pixels.
        center_crop: whether to crop at the centre; otherwise at a random place, which an image keeps in all epochs.
        random_flip: whether to mirror half of the images before they are cropped, other ones in every epoch.
        background: the colour behind transparent places, as HTML names it.
        caption_column: the column of the captions.
        skip_broken: whether to leave out images that are missing, that cannot be read or that viewers show differently;
            the log counts and names them. All images are decoded first then, whenever a run begins or goes on.
        dataloader_num_workers: the number of processes that read and decode images; 0 does so in this one. The rows are
            the same. A script that asks for some has its code under `if __name__ == "__main__":`.
        seed: the seed of the crops.
        cache: a folder to keep everything encoded in, so that training runs neither VAE nor text encoder; None encodes
            the rows of every step anew. Encoding that was stopped goes on there.
        cache_limit: the largest size of that folder, in bytes.
    Raises:
        TuningError: a folder, an image or a caption is missing or unreadable; the VAE returns values that are not
            finite; the cache is of something else, or too large.
    Example:
        `Images("photos", pipe, resolution=512, cache="photos-encoded")`
    Source:
        `--train_data_dir` of diffusers' `train_text_to_image.py`; the condition on sizes: Podell et al., "SDXL:
        Improving Latent Diffusion Models for High-Resolution Image Synthesis", 2023.
    """

    @checked(TuningError)
    def __init__(
        self,
        folder: str | Path,
        pipe: Any,
        *,
        resolution: Count = 512,
        center_crop: bool = False,
        random_flip: bool = False,
        background: Text = "white",
        caption_column: Text = "text",
        skip_broken: bool = False,
        dataloader_num_workers: Index = 0,
        seed: Index = 0,
        cache: str | Path | None = None,
        cache_limit: Count = 100 * GIGABYTE,
    ) -> None:
        if resolution % pipe.vae_scale_factor:
            raise TuningError(
                f"the resolution is {resolution}, and the VAE scales by {pipe.vae_scale_factor}",
                where="resolution",
                hint=f"pass a multiple of {pipe.vae_scale_factor}",
            )
        colour(background)
        self._folder, self._caption_column, self._background = Path(folder), caption_column, background
        decode = cache is None or skip_broken
        self._images = captioned(self._folder, caption_column, decode, skip_broken)
        texts = as_texts([image.caption for image in self._images], "captions")
        # Crops follow from the name of the file, so that other files may come and go.
        names = [hash_text(Path(os.path.relpath(image.path, folder)).as_posix()) for image in self._images]
        draws = [None if center_crop else generator(seed, "crop", as_number(name)) for name in names]
        self._crops = [Crop.of(image.size, resolution, draw) for image, draw in zip(self._images, draws, strict=True)]
        self._workers = dataloader_num_workers
        self._flip, self._vae, self._captions = random_flip, as_pipelines_run_it(pipe.vae), Captions(pipe)
        self._captions.tell_of_cut(texts)
        self._scaling = pipe.vae.config
        self._empty = dict(self._captions.empty)
        if "text_embeds" in self._empty:
            self._empty["time_ids"] = time_ids((resolution, resolution), (0, 0), (resolution, resolution))
        recipe = {
            **self._captions.recipe,
            "VAE": hash_model(pipe.vae),
            "resolution": str(resolution),
            "choice of crops": "centre" if center_crop else f"random, seed {seed}",
            "random_flip": str(random_flip),
            "background": background,
        }
        self._kept, place = None, None if cache is None else Path(cache)
        if place is not None:
            begin(place, recipe)
        files = hash_files([image.path for image in self._images], place and place / FILES)
        keys = [
            hash_text(file, image.caption, str(crop))
            for file, image, crop in zip(files, self._images, self._crops, strict=True)
        ]
        self.contents = Contents(recipe, keys, folders=(Path(folder),), cache=place)
        if place is not None:
            self._kept = TensorCache(place, recipe, keys, BATCH, cache_limit)
            self._kept.fill(self._encoded, "encoding images")
            del self._vae, self._captions  # so that their memory can be freed

    def __len__(self) -> int:
        return len(self._images)

    def samples(self, rows: Sequence[int], generators: Sequence[np.random.Generator]) -> Samples:
        flipped = [self._flip and draw.random() < 0.5 for draw in generators]
        if self._kept is None:
            seen = self._seen(rows, flipped)
        else:
            both = self._kept.rows(rows, "latents")["latents"]
            seen = torch.stack([of_row[int(flip)] for of_row, flip in zip(both, flipped, strict=True)])
        mean, std = seen.float().unbind(1)
        noise = np.stack([draw.standard_normal(mean.shape[1:], np.float32) for draw in generators])
        told = {"time_ids": self._time_ids(rows)} if "time_ids" in self._empty else {}
        return Samples(scaled(self._scaling, mean + std * torch.from_numpy(noise)), conditions=told)

    def conditions(self, rows: Sequence[int | None]) -> dict[str, Tensor]:
        given = [row for row in rows if row is not None]
        if self._kept is None:
            known = self._conditions(given) if given else {}
        else:
            known = self._kept.rows(given, *self._empty)
        return with_empty(rows, known, self._empty)

    def fingerprint(self) -> str:
        return self.contents.fingerprint()

    def _encoded(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return everything that is kept of rows: their latents, as they are and mirrored, and their conditions."""
        ways = [self._seen(rows, [flip] * len(rows)) for flip in ([False, True] if self._flip else [False])]
        return {"latents": torch.stack(ways, 1), **self._conditions(rows)}

    def _seen(self, rows: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        """Return the distributions of latents of rows, (B, 2, C, h, w)."""
        seen = encoded(self._vae, self._pixels(rows, flipped))
        for row, one in zip(rows, seen, strict=True):
            if not torch.isfinite(one).all():
                raise TuningError(
                    f"the VAE returns values that are not finite, in {self._vae.dtype}",
                    where=str(self._images[row].path),
                    hint="encode in float32: pipe.vae.to(torch.float32)",
                )
        return seen

    def _pixels(self, rows: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        """Return the crops of rows, (B, 3, side, side)."""
        images, crops = [self._images[row] for row in rows], [self._crops[row] for row in rows]
        calls = (images, crops, flipped, [self._background] * len(rows))
        try:
            decoded = list(_pool(self._workers).map(_numbers, *calls) if self._workers else map(_numbers, *calls))
        except TuningError:
            captioned(self._folder, self._caption_column, decode=True)  # which names all that cannot be read
            raise
        except BrokenProcessPool as error:
            _pool.cache_clear()
            raise TuningError(
                "a process that decodes images has died",
                where="dataloader_num_workers",
                hint='put the code of the script under `if __name__ == "__main__":`; or pass fewer, or 0',
            ) from error
        return torch.from_numpy(np.stack(decoded))

    def _conditions(self, rows: Sequence[int]) -> dict[str, Tensor]:
        known = self._captions([self._images[row].caption for row in rows])
        if "time_ids" in self._empty:
            known["time_ids"] = self._time_ids(rows)
        return known

    def _time_ids(self, rows: Sequence[int]) -> Tensor:
        places = [(self._images[row].size, self._crops[row]) for row in rows]
        return torch.stack([time_ids(size, crop.corner, (crop.side, crop.side)) for size, crop in places])


def _numbers(image: Captioned, crop: Crop, flip: bool, background: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a crop of an image as an array, in the one layout in which other processes can send it back."""
    return pixels(image, crop, flip, background).contiguous().numpy()


@functools.cache
def _pool(workers: int) -> ProcessPoolExecutor:
    """Return processes that decode images, and live as long as this one."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker, (1,))
