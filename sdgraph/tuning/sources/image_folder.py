"""A folder of images with captions, as diffusers' scripts read `--train_data_dir`: Hugging Face's "imagefolder"."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ...errors import TuningError, did_you_mean

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TABLES = ("metadata.csv", "metadata.jsonl")
LAYOUT = "write metadata.jsonl with lines {'file_name': ..., 'text': ...}, or NAME.txt beside each image"


@dataclass(frozen=True)
class Captioned:
    """An image with its caption.

    Args:
        path: the file of the image.
        caption: the caption.
        size: height and width in pixels, as the image is seen upright.
    """

    path: Path
    caption: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Crop:
    """A square crop of an image whose shorter side was scaled to the side of the crop.

    Args:
        side: height and width, in pixels.
        corner: top and left, in pixels of the scaled image.
    """

    side: int
    corner: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], side: int, draw: np.random.Generator | None) -> Crop:
        """Return the crop of an image of a size: at a random place, or in the centre if there is no `draw`."""
        free = [length - side for length in _scaled(size, side)]
        if draw is None:
            return cls(side, (round(free[0] / 2), round(free[1] / 2)))
        return cls(side, (int(draw.integers(free[0] + 1)), int(draw.integers(free[1] + 1))))


def captioned(folder: Path, caption_column: str = "text") -> tuple[Captioned, ...]:
    """Return the images in a folder and the folders below it, in the order of their names.

    Args:
        folder: the folder. Captions are in `metadata.jsonl` or `metadata.csv`, with columns `file_name` (relative to
            the table) and `caption_column`, or else in NAME.txt beside each image.
        caption_column: the name of the column.
    Raises:
        TuningError: the folder is missing or has no images, a caption or an image is missing, or a file is unreadable.
    """
    if not folder.is_dir():
        raise TuningError(f"there is no folder {folder}", where="folder", hint="give a folder of images with captions")
    files = [path for path in sorted(folder.rglob("*")) if not path.name.startswith(".")]
    images = [path for path in files if path.suffix.lower() in ENDINGS]
    if not images:
        raise TuningError(f"there are no images in {folder}", where="folder", hint=f"known: {', '.join(ENDINGS)}")
    listed = {
        path: caption for table in files if table.name in TABLES for path, caption in _rows(table, caption_column)
    }
    for path in listed:
        if not path.is_file():
            raise TuningError(
                "an image that the metadata name is missing", where=str(path), hint="restore it, or delete its row"
            )
    captions = {path: listed[path] if path in listed else _beside(path) for path in images}
    missing = [path for path, caption in captions.items() if caption is None]
    if missing:
        raise TuningError(
            f"{len(missing)} of {len(images)} images have no caption, the first of them {missing[0].name}",
            where=str(missing[0]),
            hint=LAYOUT,
        )
    return tuple(Captioned(path, caption, _size(path)) for path, caption in captions.items() if caption is not None)


def pixels(image: Captioned, crop: Crop) -> Tensor:
    """Return a crop of an image, (3, side, side) in [-1, 1].

    Raises:
        TuningError: the file is not a readable image.
    """
    top, left = crop.corner
    height, width = _scaled(image.size, crop.side)
    try:
        with Image.open(image.path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(image.path, error) from error
    scaled = upright.resize((width, height), Image.Resampling.LANCZOS)
    values = np.asarray(scaled.crop((left, top, left + crop.side, top + crop.side)), np.float32)
    return torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1


def _scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the height and width of an image whose shorter side becomes `side`, as torchvision's `Resize` has them."""
    shorter = min(size)
    return side * size[0] // shorter, side * size[1] // shorter


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            turned = opened.getexif().get(0x0112, 1) >= 5  # the orientations that lie on a side
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    return (width, height) if turned else (height, width)


def _unreadable(path: Path, error: Exception) -> TuningError:
    reason = "it is no image" if isinstance(error, UnidentifiedImageError) else str(error)
    return TuningError(f"an image cannot be read: {reason}", where=str(path), hint="repair it, or take it away")


def _beside(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else None


def _rows(table: Path, caption_column: str) -> Iterator[tuple[Path, str]]:
    """Iterate over the images that a table names, with their captions."""
    for number, row in _lines(table):
        where = f"{table}, row {number}"
        for column in ("file_name", caption_column):
            if not isinstance(row.get(column), str):
                hint = did_you_mean(column, map(str, row)) or f"columns: {', '.join(map(str, row))}"
                raise TuningError(f"there is no text in a column {column!r}", where=where, hint=f"{hint}; {LAYOUT}")
        yield table.parent / row["file_name"], row[caption_column]


def _lines(table: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    number = 0
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            objects: Iterable[Any] = (json.loads(line) for line in lines if line.strip())
            rows = csv.DictReader(lines) if table.suffix == ".csv" else objects
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict):
                    raise ValueError("a line is not an object")
                yield number, row
    except (ValueError, csv.Error) as error:
        raise TuningError(
            f"{table.name} cannot be read: {error}", where=f"{table}, row {number + 1}", hint=LAYOUT
        ) from error
