"""A folder of small images with captions, as users have them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((16, 16), (24, 16), (16, 40), (32, 32), (20, 28))  # height, width
CAPTIONS = ("a red circle", "a blue square", "a large green star", "a small circle", "a red square")


def write_images(folder: Path, count: int = len(SIZES)) -> Path:
    """Write images without captions: 0.png, 1.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(draw.integers(0, 256, (*SIZES[i % len(SIZES)], 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def write_photos(folder: Path, count: int = len(SIZES)) -> Path:
    """Write images, and metadata.jsonl with their captions."""
    write_images(folder, count)
    rows = [{"file_name": f"{i}.png", "text": CAPTIONS[i % len(CAPTIONS)]} for i in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
