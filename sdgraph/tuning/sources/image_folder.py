"""A folder of images with captions, as diffusers' scripts read `--train_data_dir`: Hugging Face's "imagefolder"."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

from ...errors import TuningError, did_you_mean
from ...progress import Bar
from ...text import from_json, lines, read_text

ENDINGS = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # whatever the ending says
TABLES = ("metadata.csv", "metadata.jsonl")
LAYOUT = "write metadata.jsonl with lines {'file_name': ..., 'text': ...}, or NAME.txt beside each image"
SKIP = "leave them out by skip_broken"
log = logging.getLogger("sdgraph")
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
SHOWN = 20  # files that an error lists
GAMMA = 1 / 2.2  # of a PNG whose numbers are those of sRGB
SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # white, red, green and blue, x and y each


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


# -- files and captions -----------------------------------------------------------------------------------------------


def captioned(
    folder: Path, caption_column: str = "text", decode: bool = False, skip_broken: bool = False
) -> tuple[Captioned, ...]:
    """Return the images in a folder and the folders below it, in the order of their names.

    Links are followed. Files and folders whose names begin with a dot are left out, unless a table names them.

    Args:
        folder: the folder. Captions are in `metadata.jsonl` or `metadata.csv`, with columns `file_name` (relative to
            the table) and `caption_column`, or else in NAME.txt beside each image.
        caption_column: the name of the column.
        decode: decode all images, so that none ends a run in its middle; otherwise most are opened only.
        skip_broken: leave out images that are missing, unreadable or of such a kind, and name them in the log.
    Raises:
        TuningError: the folder is missing or has no images, a caption or an image is missing, an image has two
            captions, a file is unreadable, or an image is of a kind that viewers show differently. All such files are
            named.
    """
    if not os.path.isdir(folder):
        raise TuningError(f"there is no folder {folder}", where="folder", hint="give a folder of images with captions")
    files = dict(sorted(_files(folder), key=lambda file: file[1]))
    captions = _captions(folder, files, caption_column, skip_broken)
    if not captions:
        raise TuningError(f"there are no images in {folder}", where="folder", hint=f"known: {', '.join(ENDINGS)}")
    sizes = _sizes(folder, [*captions], decode, skip_broken)
    return tuple(Captioned(path, captions[path], size) for path, size in sizes.items())


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Iterate over the files in a folder and below it, but for hidden ones, and over where they really are."""

    def refuse(error: OSError) -> None:
        raise TuningError(f"a folder cannot be read: {error.strerror}", where=error.filename, hint="make it readable")

    entered = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        entered.add(real)
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) not in entered
        ]
        yield from ((os.path.join(real, name), Path(parent, name)) for name in names if not name.startswith("."))


def _captions(folder: Path, files: Mapping[str, Path], caption_column: str, skip_broken: bool) -> dict[Path, str]:
    """Return the captions of all images, in the order of the names of the images."""
    unread = [path for path in files.values() if path.name.lower() == "metadata.parquet"]
    _refuse(folder, "tables cannot be read", [(path, "it is no text") for path in unread], LAYOUT)
    found: dict[Path, list[str]] = {}
    missing = []
    for table in files.values():
        if table.name.lower() not in TABLES:
            continue
        for path, caption in _rows(table, caption_column):
            path = files.get(os.path.join(os.path.realpath(path.parent), path.name), path)  # or of b/../a.png
            found.setdefault(path, []).append(caption)
            if not os.path.isfile(path):
                missing.append((path, f"{table.name} has a row for it"))
    if not skip_broken:
        _refuse(folder, "images are missing", missing, f"restore them, or delete their rows, or {SKIP}")
    written = [path for path in files.values() if path.suffix.lower() == ".txt"]
    texts = {path.with_suffix(""): path for path in written}
    double = [
        (path, f"{texts[path.with_suffix('')].name} is another") for path in written if path not in texts.values()
    ]
    _refuse(folder, "text files are about an image that has another", double, "leave one of them")
    images = {path for path in files.values() if path.suffix.lower() in ENDINGS} | found.keys()
    told = {path.with_suffix("") for path in images}
    # NAME.txt is about NAME of another ending, where no image of a known one is beside it
    others = [path for path in files.values() if path.suffix.lower() != ".txt" and path.name.lower() not in TABLES]
    images |= {path for path in others if path.with_suffix("") in texts.keys() - told}
    if alone := texts.keys() - {path.with_suffix("") for path in images}:
        log.warning("%d text files have no image beside them, such as %s", len(alone), texts[min(alone)])
    for path in images:
        if path.with_suffix("") in texts:
            found.setdefault(path, []).append(_caption(texts[path.with_suffix("")]))
    twice = [(path, " and ".join(map(repr, said))) for path, said in found.items() if len(said) > 1]
    _refuse(folder, "images have more than one caption", twice, "leave one of them; copy the image for another")
    without = [(path, "there is none in a table or beside it") for path in images - found.keys()]
    _refuse(folder, f"of {len(images)} images have no caption", without, LAYOUT)
    return {path: found[path][0] for path in sorted(images)}


def _caption(path: Path) -> str:
    return read_text(path, TuningError, hint=LAYOUT).strip()


def _rows(table: Path, caption_column: str) -> Iterator[tuple[Path, str]]:
    """Iterate over the images that a table names, with their captions."""
    for number, row in _numbered(table):
        where = f"{table}, row {number}"
        for column in ("file_name", caption_column):
            if isinstance(row.get(column), list):
                raise TuningError(f"there is a list in the column {column!r}", where=where, hint="write one text a row")
            if not isinstance(row.get(column), str):
                hint = did_you_mean(column, map(str, row)) or f"columns: {', '.join(map(str, row))}"
                hint = "write text there, in quotation marks" if column in row else hint
                raise TuningError(f"there is no text in a column {column!r}", where=where, hint=f"{hint}; {LAYOUT}")
        yield table.parent / row["file_name"], row[caption_column]


def _numbered(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    text, number = read_text(table, TuningError, hint=LAYOUT), 0
    objects: Iterable[Any] = (from_json(line) for line in lines(text) if line.strip())
    try:
        for number, row in enumerate(_separated(text) if table.suffix.lower() == ".csv" else objects, 1):
            if not isinstance(row, dict):
                raise ValueError("a line is not an object")
            yield number, row
    except (ValueError, csv.Error) as error:
        raise TuningError(
            f"{table.name} cannot be read: {error}", where=f"{table}, row {number + 1}", hint=LAYOUT
        ) from error


def _separated(text: str) -> Iterator[dict[str, str]]:
    """Iterate over the rows of a text with comma-separated values."""
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    if len(set(rows.fieldnames or ())) < len(rows.fieldnames or ()):
        raise ValueError("two columns have the same name")
    for row in rows:
        if None in row:
            raise ValueError("there are more values than columns; write text with commas in quotation marks")
        yield row


# -- pixels -----------------------------------------------------------------------------------------------------------


def pixels(image: Captioned, crop: Crop, mirrored: bool = False, background: str = "white") -> Tensor:
    """Return a crop of an image, (3, side, side) in [-1, 1].

    Args:
        image: the image.
        crop: the crop.
        mirrored: mirror the image, before it is cropped.
        background: the colour behind transparent places, as HTML names it.
    Raises:
        TuningError: the file is not a readable image.
    """
    try:
        shown = _shown(image.path, background)
    except _UnshownError as reason:
        raise TuningError(
            f"an image cannot be read: {reason}", where=str(image.path), hint="repair it, or take it away"
        ) from reason
    if (shown.height, shown.width) != image.size:
        raise TuningError(
            f"an image of {image.size[0]} x {image.size[1]} pixels has become one of {shown.height} x {shown.width}",
            where=str(image.path),
            hint="leave images as they are while they are read",
        )
    shown = ImageOps.mirror(shown) if mirrored else shown
    top, left = crop.corner
    factors = [length / scaled for length, scaled in zip(image.size, _scaled(image.size, crop.side), strict=True)]
    edges = (left * factors[1], top * factors[0], (left + crop.side) * factors[1], (top + crop.side) * factors[0])
    bounded = (*edges[:2], min(edges[2], shown.width), min(edges[3], shown.height))  # but for rounding
    # Only what is seen is scaled, from the same pixels as if all were: a narrow image becomes a very long one.
    values = np.asarray(shown.resize((crop.side, crop.side), Image.Resampling.LANCZOS, bounded), np.float32)
    return torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1


def colour(name: str) -> tuple[int, int, int]:
    """Return the red, green and blue of a colour, as HTML names it.

    Raises:
        TuningError: there is no such colour.
    """
    try:
        return ImageColor.getrgb(name)[:3]
    except (ValueError, AttributeError) as error:
        raise TuningError(
            f"there is no colour {name!r}", where="background", hint="'white', 'black', '#808080' ..."
        ) from error


def _scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the height and width of an image whose shorter side becomes `side`, as torchvision's `Resize` has them."""
    shorter = min(size)
    return side * size[0] // shorter, side * size[1] // shorter


class _UnshownError(Exception):
    """An image cannot be read, or is of a kind that viewers show differently. Its text says why."""


def _sizes(folder: Path, paths: Sequence[Path], decode: bool, skip_broken: bool = False) -> dict[Path, tuple[int, int]]:
    """Return the heights and widths of images, which are read at the same time.

    Raises:
        TuningError: some cannot be read, and are not to be left out; or none can. They are named.
    """

    def size(path: Path) -> tuple[int, int] | _UnshownError:
        try:
            if not decode:
                return _size(path)
            width, height = _shown(path, "white").size
            return height, width
        except _UnshownError as reason:
            return reason

    Image.init()  # which is not made for several threads
    threads = min(32, os.cpu_count() or 1)
    sizes = thread_map(size, paths, tqdm_class=Bar, max_workers=threads, desc="checking images", unit="image")
    wrong = [(path, str(s)) for path, s in zip(paths, sizes, strict=True) if isinstance(s, _UnshownError)]
    what = f"of {len(paths)} images cannot be read"
    if not skip_broken or len(wrong) == len(paths):
        _refuse(folder, what, wrong, f"repair them, or take them away, or {SKIP}")
    elif wrong:
        log.warning("%s: %s", folder, _listed(folder, f"{what}, and are left out", wrong))
    return {path: one for path, one in zip(paths, sizes, strict=True) if isinstance(one, tuple)}


def _refuse(folder: Path, what: str, wrong: Sequence[tuple[Path, str]], hint: str) -> None:
    """Name what is wrong, if there is something."""
    if wrong:
        raise TuningError(_listed(folder, what, wrong), where=str(folder), hint=hint)


def _listed(folder: Path, what: str, wrong: Sequence[tuple[Path, str]]) -> str:
    """Return how many files something is about, and the first of them, a line each."""
    listed = [f"{os.path.relpath(path, folder)}: {reason}" for path, reason in sorted(wrong)[:SHOWN]]
    listed += [f"and {len(wrong) - SHOWN} more"] * (len(wrong) > SHOWN)
    return "\n    ".join([f"{len(wrong)} {what}", *listed])


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Within this context an image is open, of a kind that all viewers show alike; every error says why it is not."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF may not be built in
    try:
        if not path.is_file():
            raise _UnshownError("it is no file")  # or a pipe, which would be waited for
        with Image.open(path, formats=formats) as image:
            _check(image)
            yield image
    except (_UnshownError, TuningError):
        raise
    except UnidentifiedImageError as error:
        raise _UnshownError(f"it is no image, or none of {', '.join(formats)}") from error
    except OSError as error:
        raise _UnshownError(error.strerror or str(error)) from error
    except Exception as error:  # whatever damaged files make Pillow raise
        raise _UnshownError(str(error) or type(error).__name__) from error


def _check(image: Image.Image) -> None:
    """Refuse what viewers show differently, or Pillow reads otherwise than viewers."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a JPEG with further pictures, of which viewers show the first
        raise _UnshownError(f"it has {frames} frames or pages; save the one that the caption describes")
    if image.mode in ("I", "F") or {2, 3} & set(_tag(image, SAMPLE_FORMAT, 1)):
        raise _UnshownError(
            "viewers do not agree on what white is in signed or 32-bit numbers; save it with 8 or 16 bits per channel"
        )
    info = image.info
    if image.mode == "RGB" and "transparency" in info and _layout(image).endswith("16B"):
        raise _UnshownError("one of its 16-bit colours stands for transparency; save it with an alpha channel")
    primaries = SRGB if {"icc_profile", "srgb"} & info.keys() else info.get("chromaticity", SRGB)
    if np.abs(np.subtract(primaries, SRGB)).max() > 0.01:
        raise _UnshownError("its primary colours are not those of sRGB, which few viewers heed; convert it to sRGB")


def _tag(image: Image.Image, number: int, default: int) -> tuple[int, ...]:
    """Return the values of a tag of a TIFF."""
    values = getattr(image, "tag_v2", {}).get(number, default)
    return values if isinstance(values, tuple) else (values,)


def _layout(image: Image.Image) -> str:
    """Return Pillow's name of the layout of pixels in a file that was opened and not loaded, such as "L;4"."""
    tiles = getattr(image, "tile", ())
    arguments = tiles[0][3] if tiles else ""
    return str(arguments if isinstance(arguments, str) else arguments[0])


def _size(path: Path) -> tuple[int, int]:
    """Return the height and width of an image, upright."""
    with _opened(path) as image:
        if image.format == "TIFF":
            image.load()  # by which Pillow turns it, unlike others
        width, height = image.size
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # the orientations that lie on a side
        return (width, height) if turned else (height, width)


def _shown(path: Path, background: str) -> Image.Image:
    """Return an image as a viewer shows it: upright, in sRGB, with 8 bits per channel."""
    with _opened(path) as opened:
        layout, info = _layout(opened), {str(name): value for name, value in opened.info.items()}
        (bits, *_), (black, *_) = _tag(opened, BITS, 16), _tag(opened, PHOTOMETRIC, 1)
        upright = ImageOps.exif_transpose(opened)
        deep = upright.mode.startswith("I;16")
        image, opacity = _of_grey(upright, bits, inverted=black == 0) if deep else _parted(upright, layout)
        seen = _in_srgb(image, info)
        if opacity is not None:
            seen = Image.composite(seen, Image.new("RGB", seen.size, colour(background)), opacity)
        return seen


Parts = tuple[Image.Image, Image.Image | None]  # what is seen, and how opaque it is


def _of_grey(grey: Image.Image, bits: int, inverted: bool) -> Parts:
    """Return the parts of a grey image with more than 8 bits, of which Pillow takes the last ones otherwise."""
    values, white = np.asarray(grey).astype(np.float32), 2**bits - 1
    seen = Image.fromarray(((white - values if inverted else values) / white * 255).round().astype(np.uint8))
    hidden = grey.info.get("transparency")
    opacity = None if hidden is None else Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8))
    return seen, opacity


def _parted(image: Image.Image, layout: str) -> Parts:
    premultiplied = {"La": "LA", "RGBa": "RGBA"}
    image = image.convert(premultiplied[image.mode]) if image.mode in premultiplied else image
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return image, None
    if image.mode == "L":  # a PNG names the grey in its own bits, and Pillow has made 8 of them
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(layout, 1)
    grey, whole = image.mode in ("1", "L", "LA"), image.convert("RGBA")
    return whole.getchannel("R") if grey else whole.convert("RGB"), whole.getchannel("A")


def _in_srgb(image: Image.Image, info: Mapping[str, Any]) -> Image.Image:
    """Return an image without transparency in sRGB, by the profile or the gamma that its file has."""
    kinds = {"1": "L", "L": "L", "CMYK": "CMYK", "LAB": "LAB"}
    image = image.convert(kinds.get(image.mode, "RGB"))
    if "icc_profile" in info:
        spaces = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(info["icc_profile"]))
            if profile.profile.xcolor_space.strip() == spaces[image.mode]:
                srgb = ImageCms.createProfile("sRGB")
                return ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB") or image
        except (OSError, ImageCms.PyCMSError):
            log.debug("a profile of colours that cannot be read is left out, as viewers do", exc_info=True)
    gamma = GAMMA if {"icc_profile", "srgb"} & info.keys() else info.get("gamma") or GAMMA
    seen = image.convert("RGB")
    if abs(gamma / GAMMA - 1) < 0.05:  # as libpng has it
        return seen
    return seen.point([round(255 * (value / 255) ** (GAMMA / gamma)) for value in range(256)] * 3)
