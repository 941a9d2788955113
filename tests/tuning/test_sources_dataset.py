"""`sdgraph.tuning.unpacked`: a dataset of the library `datasets` as a folder of images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sdgraph.errors import ExtraError, TuningError
from sdgraph.tuning import unpacked
from sdgraph.tuning.sources.image_folder import captioned

from ..photos import CAPTIONS, write_photos


def test_a_missing_library_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ExtraError, match="extra 'datasets'"):
        unpacked("name", tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_all_layouts_are_the_same_images_and_captions(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    photos = write_photos(tmp_path / "photos")
    contents = [(photos / f"{number}.png").read_bytes() for number in range(5)]
    columns = {"image": [{"bytes": content, "path": None} for content in contents], "text": list(CAPTIONS[:5])}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict(columns, features)
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "split")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "other")
    expected = sorted(zip(contents, CAPTIONS[:5], strict=True))
    for name in ("saved", "split", "photos"):
        found = captioned(unpacked(str(tmp_path / name), tmp_path / f"{name}-images"))
        assert sorted((image.path.read_bytes(), image.caption) for image in found) == expected

    images = tmp_path / "saved-images"
    times = {path.name: path.stat().st_mtime_ns for path in images.glob("*.png")}
    rows.select([0, 1, 1]).save_to_disk(tmp_path / "fewer")  # an image may have two rows
    unpacked(str(tmp_path / "fewer"), images)
    assert len(captioned(images)) == 3
    assert len(times.keys() & {path.name for path in images.glob("*.png")}) == 2
    assert all(path.stat().st_mtime_ns == times.get(path.name, path.stat().st_mtime_ns) for path in images.glob("*"))

    for name, options, where in (
        ("other", {}, "dataset_name"),
        ("none", {}, "dataset_name"),
        ("saved", {"caption_column": "txt"}, "caption_column"),
        ("saved", {"image_column": "text"}, "image_column"),
    ):
        with pytest.raises(TuningError) as error:
            unpacked(str(tmp_path / name), tmp_path / "wrong", **options)
        assert error.value.where == where
    assert not (tmp_path / "wrong").exists()
    before = json.dumps(sorted(map(str, photos.iterdir())))
    with pytest.raises(TuningError, match="holds other files"):
        unpacked(str(tmp_path / "saved"), photos)
    assert json.dumps(sorted(map(str, photos.iterdir()))) == before
