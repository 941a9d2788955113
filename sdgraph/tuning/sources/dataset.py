"""A dataset of the library `datasets` as a folder of images with captions."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image

from ...errors import TuningError, did_you_mean
from ...extra import imported
from ...options import Text, checked
from ...progress import Bar
from ...runtime.digest import hash_bytes

MARK = ".unpacked"  # a file by which a folder is known as one whose images may be replaced
TABLE = "metadata.jsonl"


@checked(TuningError)
def unpacked(
    dataset_name: Text,
    folder: str | Path,
    *,
    dataset_config_name: Text | None = None,
    image_column: Text = "image",
    caption_column: Text = "text",
) -> Path:
    """Write the images and captions of a dataset to a folder for `Images`, and return it.

    Images are named by their contents. What is there already is not written again, and what the dataset no longer has
    is deleted.

    Args:
        dataset_name: the folder that `datasets` has saved or can read, or the name of a dataset on the hub, which is a
            download. Its split "train" is read where it has several.
        folder: the folder, which is new or was written by an earlier call.
        dataset_config_name: the configuration of the dataset.
        image_column: the column of the images.
        caption_column: the column of the captions, one text in a row.
    Returns:
        The folder.
    Raises:
        TuningError: the dataset cannot be read, or has no such column; or the folder holds something else.
        ExtraError: `datasets` is not installed.
    Example:
        `Images(unpacked("dataset", "dataset-images"), pipe)`
    Source:
        `--dataset_name` of diffusers' `train_text_to_image.py`.
    """
    rows, place = _read(dataset_name, dataset_config_name, image_column, caption_column), Path(folder)
    if place.exists() and not (place / MARK).exists() and any(place.iterdir()):
        raise TuningError(
            f"{place} holds other files than the images of a dataset", where="folder", hint="name a new folder"
        )
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):  # of several processes the first one writes
        (place / MARK).touch()
        table = [
            {"file_name": name, "text": text} for name, text in _written(rows, place, image_column, caption_column)
        ]
        new = place / f".{TABLE}"
        new.write_text("".join(f"{json.dumps(row)}\n" for row in table), encoding="utf-8")
        new.replace(place / TABLE)
        kept = {row["file_name"] for row in table}
        for path in place.iterdir():
            if path.name not in kept and re.fullmatch(r"[0-9a-f]{32}-\d+\.\w+", path.name):
                path.unlink()
    return place


def _read(name: str, configuration: str | None, image_column: str, caption_column: str) -> Any:
    """Return the rows of a dataset, with images as they are in its files."""
    datasets, folder = imported("datasets", "datasets"), Path(name)
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, configuration)
    except Exception as error:  # whatever the library raises for a folder, a download or a script
        reason = str(error).partition("\n")[0]
        raise TuningError(
            f"the dataset {name!r} cannot be read: {reason}",
            where="dataset_name",
            hint="name a folder that Dataset.save_to_disk has written, a folder of images or of Parquet files, or a "
            "dataset of the hub, for which this machine needs a network",
        ) from error
    if isinstance(rows, dict):
        if "train" not in rows:
            raise TuningError(
                f"the dataset {name!r} has no split 'train'",
                where="dataset_name",
                hint=f"it has {', '.join(map(str, rows))}; save the one to train on by itself",
            )
        rows = rows["train"]
    for option, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in rows.features:
            hint = did_you_mean(column, rows.features) or f"columns: {', '.join(rows.features)}"
            raise TuningError(f"the dataset {name!r} has no column {column!r}", where=option, hint=hint)
    if not isinstance(rows.features[image_column], datasets.Image):
        raise TuningError(
            f"the column {image_column!r} has no images, but {rows.features[image_column]}",
            where="image_column",
            hint="name a column of the kind datasets.Image; Dataset.cast_column makes one",
        )
    return rows.cast_column(image_column, datasets.Image(decode=False))


def _written(rows: Any, folder: Path, image_column: str, caption_column: str) -> Iterator[tuple[str, str]]:
    """Write the images that are not there yet; iterate over their names and captions."""
    seen: Counter[str] = Counter()
    for number, row in enumerate(Bar(rows, desc="unpacking images", unit="image")):
        image, caption, where = row[image_column], row[caption_column], f"row {number} of the dataset"
        if not isinstance(caption, str):
            raise TuningError(
                f"the caption is {caption!r}, and no text", where=where, hint="keep one text in every row"
            )
        if image is None:
            raise TuningError("there is no image", where=where, hint="leave the row out: Dataset.filter")
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        found = hash_bytes(content)
        name = f"{found}-{seen[found]}.{_ending(content)}"
        seen[found] += 1
        if not (folder / name).exists():
            new = folder / f".{name}"
            new.write_bytes(content)
            new.replace(folder / name)
        yield name, caption


def _ending(content: bytes) -> str:
    """Return the ending of an image's name. One that cannot be read is a PNG, which `Images` refuses or leaves out."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}.get(str(image.format), str(image.format).lower())
    except Exception:  # whatever damaged files make Pillow raise
        return "png"
