"""Folders of images with captions: what a viewer shows, or a refusal that names the files."""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from sdgraph.errors import TuningError
from sdgraph.tuning.sources.image_folder import ENDINGS, Crop, captioned, pixels

SIDE = 64
RAMP = np.linspace(0, 1, SIDE)[None].repeat(SIDE, 0)  # from black to white
GREY, DEEP = (RAMP * 255).round().astype(np.uint8), (RAMP * 65535).round().astype(np.uint16)
COLOUR = np.stack([GREY] * 3, -1)
CLEAR = np.where(RAMP > 0.5, 255, 0).astype(np.uint8)  # the dark half is transparent
ON_WHITE = np.where(RAMP > 0.5, RAMP, 1)
STEP = 20  # the column whose grey stands for transparency
WITHOUT = np.where(np.arange(SIDE) == STEP, 1, RAMP)


def image(array: np.ndarray, mode: str | None = None) -> Image.Image:
    return Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)


def written(folder: Path, name: str, what: Image.Image | bytes, **options: object) -> Path:
    """Write an image and its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(what) if isinstance(what, bytes) else what.save(path, **options)  # type: ignore[arg-type]
    path.with_suffix(".txt").write_text("a ramp")
    return path


def seen(folder: Path, **options: object) -> Tensor:
    """Return the middle of the only image of a folder, in [0, 1]; its size must be the same however it is read."""
    (one,), (decoded,) = captioned(folder), captioned(folder, decode=True)
    assert one == decoded
    return (pixels(one, Crop.of(one.size, min(one.size), None), **options) + 1) / 2  # type: ignore[arg-type]


def png(depth: int, kind: int, row: bytes, side: int = SIDE, **chunks: bytes) -> bytes:
    """Return a PNG of equal rows, with further chunks."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, kind, 0, 0, 0))
    more = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    return (
        b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress((b"\0" + row) * SIDE)) + chunk(b"IEND", b"")
    )


def tiff(bits: int, photometric: int, data: bytes, sample_format: int = 1) -> bytes:
    """Return an uncompressed grey TIFF."""
    tags = {
        256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 10 * 12 + 4, 277: 1, 278: SIDE,
        279: len(data), 339: sample_format,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


def packed(levels: int, bits: int) -> tuple[bytes, np.ndarray]:
    """Return a row of grey steps in few bits, and the steps."""
    steps = np.arange(SIDE) * levels // SIDE
    each = steps.reshape(-1, 8 // bits)
    return bytes(sum(each[:, i] << (8 - bits * (i + 1)) for i in range(8 // bits)).astype(np.uint8)), steps


def twelve_bits() -> bytes:
    first, second = np.round(RAMP[0] * 4095).astype(int).reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes() * SIDE


def with_profile(name: str) -> Image.Image:
    """Return the ramp in a space of colours of which its file has the profile."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ" if name == "broken" else "sRGB"))
    result = image(COLOUR)
    result.info["icc_profile"] = b"nothing" if name == "broken" else profile.tobytes()
    return result


FOUR, FOURS = packed(16, 4)
TWO, TWOS = packed(4, 2)
ONE, ONES = packed(2, 1)
SEEN: dict[str, tuple[Callable[[], Image.Image | bytes], str, np.ndarray]] = {
    "1 PNG": (lambda: image(np.where(RAMP > 0.5, 255, 0).astype(np.uint8), "1"), "a.png", RAMP > 0.5),
    "L PNG": (lambda: image(GREY), "a.png", RAMP),
    "L BMP": (lambda: image(GREY), "a.bmp", RAMP),
    "RGB of another ending": (lambda: png(8, 2, COLOUR[0].tobytes()), "a.jpg", RAMP),
    "P PNG": (lambda: image(COLOUR).quantize(64), "a.png", RAMP),
    "P GIF": (lambda: image(COLOUR).quantize(64), "a.gif", RAMP),
    "16-bit grey PNG": (lambda: image(DEEP), "a.png", RAMP),
    "16-bit grey TIFF": (lambda: image(DEEP), "a.tif", RAMP),
    "16-bit grey TIFF, big-endian": (lambda: image(DEEP.astype(">u2")), "a.tiff", RAMP),
    "16-bit grey TIFF, white is 0": (lambda: tiff(16, 0, (65535 - DEEP).astype("<u2").tobytes()), "a.tif", RAMP),
    "12-bit grey TIFF": (lambda: tiff(12, 1, twelve_bits()), "a.tif", RAMP),
    "16-bit RGB PNG": (lambda: png(16, 2, np.stack([DEEP[0]] * 3, -1).astype(">u2").tobytes()), "a.png", RAMP),
    "16-bit grey PNG with opacity": (
        lambda: png(16, 4, np.stack([DEEP[0], CLEAR[0] * 257.0], -1).astype(">u2").tobytes()), "a.png", ON_WHITE
    ),
    "CMYK TIFF": (lambda: image(COLOUR, "CMYK"), "a.tif", RAMP),
    "CMYK JPEG": (lambda: image(COLOUR, "CMYK"), "a.jpg", RAMP),
    "YCbCr TIFF": (lambda: image(COLOUR, "YCbCr"), "a.tif", RAMP),
    "LAB TIFF": (lambda: image(COLOUR, "LAB"), "a.tif", RAMP),
    "RGBA PNG": (lambda: image(np.dstack([COLOUR, CLEAR])), "a.png", ON_WHITE),
    "RGBA TIFF": (lambda: image(np.dstack([COLOUR, CLEAR])), "a.tif", ON_WHITE),
    "LA PNG": (lambda: image(np.dstack([GREY, CLEAR])), "a.png", ON_WHITE),
    "PA TIFF": (lambda: Image.merge("PA", (image(COLOUR).quantize(64), image(CLEAR))), "a.tif", ON_WHITE),
    "1-bit PNG, one grey transparent": (lambda: png(1, 0, ONE, tRNS=struct.pack(">H", 0)), "a.png", np.ones(SIDE)),
    "2-bit PNG, one grey transparent": (
        lambda: png(2, 0, TWO, tRNS=struct.pack(">H", 1)), "a.png", np.where(TWOS == 1, 1, TWOS / 3)
    ),
    "4-bit PNG, one grey transparent": (
        lambda: png(4, 0, FOUR, tRNS=struct.pack(">H", 7)), "a.png", np.where(FOURS == 7, 1, FOURS / 15)
    ),
    "8-bit PNG, one grey transparent": (
        lambda: png(8, 0, GREY[0].tobytes(), tRNS=struct.pack(">H", GREY[0, STEP])), "a.png", WITHOUT
    ),
    "16-bit PNG, one grey transparent": (
        lambda: png(16, 0, DEEP[0].astype(">u2").tobytes(), tRNS=struct.pack(">H", DEEP[0, STEP])), "a.png", WITHOUT
    ),
    "RGB PNG, one colour transparent": (
        lambda: png(8, 2, COLOUR[0].tobytes(), tRNS=struct.pack(">HHH", *map(int, COLOUR[0, STEP]))), "a.png", WITHOUT
    ),
    "linear PNG": (lambda: png(8, 2, COLOUR[0].tobytes(), gAMA=struct.pack(">I", 100000)), "a.png", RAMP ** (1 / 2.2)),
    "PNG of sRGB's gamma": (lambda: png(8, 2, COLOUR[0].tobytes(), gAMA=struct.pack(">I", 45455)), "a.png", RAMP),
    "PNG with a profile": (lambda: with_profile("sRGB"), "a.png", RAMP),
    "PNG with a broken profile": (lambda: with_profile("broken"), "a.png", RAMP),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_an_image_is_what_a_viewer_shows(name: str, tmp_path: Path) -> None:
    make, file, expected = SEEN[name]
    what = make()
    more = {} if isinstance(what, bytes) else {"quality": 100} if file.endswith("jpg") else {}
    if not isinstance(what, bytes) and "icc_profile" in what.info:
        more = {"icc_profile": what.info["icc_profile"]}
    written(tmp_path, file, what, **more)
    assert (seen(tmp_path) - torch.from_numpy(np.array(expected, np.float32))).abs().max() < 0.01


def test_profiles_are_converted(tmp_path: Path) -> None:
    """A grey ramp of gamma 1, as its profile says, is brighter in sRGB."""
    kinds = {"RGB": image(COLOUR), "L": image(GREY)}
    srgb = ImageCms.createProfile("sRGB")
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    content = bytearray(ImageCms.ImageCmsProfile(srgb).tobytes())
    count = struct.unpack_from(">I", content, 128)[0]
    for entry in range(count):  # the curves of red, green and blue become straight
        name, offset, size = struct.unpack_from(">4sII", content, 132 + 12 * entry)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            content[offset : offset + size] = struct.pack(">4sII", b"curv", 0, 0).ljust(size, b"\0")
    for number, (what, profile) in enumerate(
        ((kinds["RGB"], bytes(content)), (kinds["RGB"], lab.tobytes()), (kinds["L"], bytes(content)))
    ):
        written(tmp_path / str(number), "a.png", what, icc_profile=profile)
    linear = np.where(RAMP > 0.0031308, 1.055 * RAMP ** (1 / 2.4) - 0.055, 12.92 * RAMP)
    assert (seen(tmp_path / "0") - torch.from_numpy(linear).float()).abs().max() < 0.02
    for number in ("1", "2"):  # of another space than the image has, which viewers leave out
        assert (seen(tmp_path / number) - torch.from_numpy(RAMP).float()).abs().max() < 0.01


def test_the_background_is_an_option(tmp_path: Path) -> None:
    written(tmp_path, "a.png", image(np.dstack([COLOUR, CLEAR])))
    found = seen(tmp_path, background="#ff0000")
    assert torch.equal(found[:, :, 0], torch.tensor([1.0, 0.0, 0.0])[:, None].expand(3, SIDE))


FRAMES = [image(COLOUR), image(255 - COLOUR)]
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        f"animated {ending}": (
            lambda path, ending=ending: FRAMES[0].save(
                path.with_suffix(ending), save_all=True, append_images=FRAMES[1:]
            ),
            "2 frames or pages",
        )
        for ending in (".gif", ".webp", ".png", ".tif")
    },
    "32-bit TIFF": (lambda path: image(DEEP.astype(np.int32)).save(path.with_suffix(".tif")), "white is"),
    "floats": (lambda path: image((RAMP * 3 - 1).astype(np.float32)).save(path.with_suffix(".tif")), "white is"),
    "signed TIFF": (lambda path: path.write_bytes(tiff(8, 1, GREY.tobytes(), 2)), "white is"),
    "16-bit RGB PNG, one colour transparent": (
        lambda path: path.write_bytes(png(16, 2, COLOUR.astype(">u2")[0].tobytes(), tRNS=bytes(6))),
        "stands for transparency",
    ),
    "wide primaries": (
        lambda path: path.write_bytes(
            png(8, 2, bytes(3 * SIDE), cHRM=struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))
        ),
        "primary colours",
    ),
    "truncated": (lambda path: path.write_bytes(png(8, 2, COLOUR[0].tobytes())[:-60]), "a"),
    "empty": (lambda path: path.write_bytes(b""), "it is no image"),
    "text": (lambda path: path.write_text("<svg/>"), "it is no image"),
    "a dangling link": (lambda path: path.symlink_to("nowhere.png"), "it is no file"),
    "a pipe": (lambda path: os.mkfifo(path), "it is no file"),
    "a bomb": (lambda path: path.write_bytes(png(8, 2, COLOUR[0].tobytes(), 60000)), "decompression bomb"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_that_viewers_do_not_agree_on_is_refused(name: str, tmp_path: Path) -> None:
    write, reason = REFUSED[name]
    write(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a ramp")
    with pytest.raises(TuningError, match=rf"1 of 1 images cannot be read\n    a\.\w+: .*{reason}"):
        captioned(tmp_path, decode=True)


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


@pytest.mark.parametrize("ending", [".jpg", ".png", ".tif", ".webp"])
def test_every_orientation_is_turned_and_others_are_none(ending: str, tmp_path: Path) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    lying = image(np.kron(blocks, np.ones((8, 8, 1), np.uint8)))
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(ending, {})
    for number in range(1 if ending == ".tif" else 0, 9 if ending == ".tif" else 11):
        exif = Image.Exif()
        exif[0x0112] = number
        written(tmp_path / str(number), f"a{ending}", lying, exif=exif, **options)
        upright = lying.transpose(TURNS[number]) if number in TURNS else lying
        (one,) = captioned(tmp_path / str(number))
        assert one.size == (upright.height, upright.width)
        left, top = (upright.width - 32) // 2, (upright.height - 32) // 2
        expected = np.asarray(upright.crop((left, top, left + 32, top + 32)), np.float32) / 255
        found = seen(tmp_path / str(number)).permute(1, 2, 0)
        assert (found - torch.from_numpy(expected)).abs().max() < 0.02, number


def test_a_narrow_image_is_scaled_where_it_is_seen(tmp_path: Path) -> None:
    tall = np.arange(20000).reshape(-1, 1) % 256
    written(tmp_path, "a.png", image(tall.astype(np.uint8)))  # scaled as a whole, it has 5 thousand million pixels
    (one,) = captioned(tmp_path)
    found = pixels(one, Crop(512, (512 * 1000, 0)))
    assert found.shape == (3, 512, 512)
    assert abs(float(found[0, 256, 0] + 1) * 127.5 - 1000 % 256) < 2


def test_a_crop_is_that_of_the_scaled_image(tmp_path: Path) -> None:
    photo = image(np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8))
    written(tmp_path, "a.png", photo)
    (one,) = captioned(tmp_path)
    whole = np.asarray(photo.resize((24 * 70 // 45, 24), Image.Resampling.LANCZOS), np.float32)
    for left in (0, 5, 13):
        found = (pixels(one, Crop(24, (0, left))).permute(1, 2, 0) + 1) * 127.5
        assert (found - torch.from_numpy(whole[:, left : left + 24])).abs().max() <= 1
        mirrored = (pixels(one, Crop(24, (0, left)), mirrored=True).permute(1, 2, 0) + 1) * 127.5
        assert (mirrored - torch.from_numpy(whole[:, ::-1][:, left : left + 24].copy())).abs().max() <= 1


def test_an_image_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "a.png", image(GREY))
    (one,) = captioned(tmp_path)
    image(GREY[:32]).save(path)
    with pytest.raises(TuningError, match="64 x 64 pixels has become one of 32 x 64"):
        pixels(one, Crop(32, (0, 0)))


def test_all_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for number in range(30):
        path = written(tmp_path, f"{number:02}.png", image(GREY))
        if number % 5 == 0:
            path.write_bytes(path.read_bytes()[: 60 * (number > 0)])
    with pytest.raises(TuningError, match="6 of 30 images cannot be read") as refusal:
        captioned(tmp_path, decode=True)
    assert [line.split()[0] for line in str(refusal.value).splitlines() if ".png" in line] == [
        f"{number:02}.png:" for number in range(0, 30, 5)
    ]
    for number in range(30):
        (tmp_path / f"{number:02}.png").write_bytes(b"")
    with pytest.raises(TuningError, match=r"30 of 30 images(.|\n)*and 10 more"):
        captioned(tmp_path)


# -- captions ---------------------------------------------------------------------------------------------------------


def photos(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name, format="PNG")
    return folder


def found(folder: Path) -> dict[str, str]:
    return {os.path.relpath(one.path, folder): one.caption for one in captioned(folder)}


def table(folder: Path, *rows: tuple[str, object], end: str = "\n") -> None:
    text = "".join(json.dumps({"file_name": n, "text": t}, ensure_ascii=False) + end for n, t in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8", newline="")


@pytest.mark.parametrize("ending", [*ENDINGS, ".PNG", ".unknown", ""])
def test_every_ending_is_read(ending: str, tmp_path: Path) -> None:
    photos(tmp_path / "table", f"a{ending}", "b.png")
    table(tmp_path / "table", (f"a{ending}", "one"), ("b.png", "two"))
    assert found(tmp_path / "table") == {f"a{ending}": "one", "b.png": "two"}
    photos(tmp_path / "beside", f"a{ending}", "b.png")
    for name in ("a.txt", "b.TXT"):
        (tmp_path / "beside" / name).write_text(name[0])
    assert found(tmp_path / "beside") == {f"a{ending}": "a", "b.png": "b"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_have_any_ends_of_lines(end: str, mark: str, tmp_path: Path) -> None:
    rows = [("ä.png", "ein \u2028 Bild\x85"), ("sub/b.png", "two, 'with' comma")]
    photos(tmp_path, *(name for name, _ in rows))
    table(tmp_path, *rows, end=end)
    path = tmp_path / "metadata.jsonl"
    path.write_bytes((mark + path.read_bytes().decode()).encode())
    assert found(tmp_path) == dict(rows)
    path.unlink()
    text = mark + end.join(["file_name,text", *(f'{name},"{caption}"' for name, caption in rows)])
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    assert found(tmp_path) == dict(rows)


def test_hidden_files_do_not_count_and_links_do(tmp_path: Path) -> None:
    folder = photos(tmp_path / ".here", "x.png/a.png", ".checkpoints/b.png", "._c.png", "d.png")
    photos(tmp_path / "elsewhere", "e.png")
    for path in (*folder.rglob("*.png"), tmp_path / "elsewhere" / "e.png"):
        if path.is_file():
            path.with_suffix(".txt").write_text(path.stem)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "x.png" / "round").symlink_to(folder)
    (folder / "readme.txt").write_text("no caption")
    assert found(folder) == {"d.png": "d", "link/e.png": "e", "x.png/a.png": "a"}


def test_rows_name_files_anywhere(tmp_path: Path) -> None:
    folder = photos(tmp_path / "here", "sub/a.png", ".hidden/b.png")
    photos(tmp_path, "c.png")
    table(folder, ("sub/../sub/a.png", "a"), (".hidden/b.png", "b"), ("../c.png", "c"))
    assert sorted(found(folder).values()) == ["a", "b", "c"]


REFUSALS: dict[str, tuple[dict[str, bytes], str]] = {
    "two rows": ({"metadata.csv": b"file_name,text\na.png,one\na.png,two\n"}, "1 images have more than one caption"),
    "two rows by other paths": ({"metadata.csv": b"file_name,text\na.png,one\n./a.png,two\n"}, "more than one caption"),
    "two tables": (
        {"metadata.csv": b"file_name,text\na.png,one\n", "metadata.jsonl": b'{"file_name": "a.png", "text": "two"}'},
        "a.png: 'one' and 'two'",
    ),
    "a table and NAME.txt": ({"metadata.csv": b"file_name,text\na.png,one\n", "a.txt": b"two"}, "'one' and 'two'"),
    "a list": ({"metadata.jsonl": b'{"file_name": "a.png", "text": ["one", "two"]}'}, "list in the column 'text'"),
    "no text": ({"metadata.jsonl": b'{"file_name": "a.png", "text": null}'}, "no text in a column 'text'"),
    "a name twice": ({"metadata.jsonl": b'{"file_name": "a.png", "text": "1", "text": "2"}'}, "'text' occurs twice"),
    "a column twice": ({"metadata.csv": b"file_name,text,text\na.png,one,two\n"}, "two columns have the same name"),
    "a comma": ({"metadata.csv": b"file_name,text\na.png,one, two\n"}, "more values than columns"),
    "a name that no disk has": ({"metadata.csv": b"file_name,text\n" + b"a" * 300 + b",one\n"}, "1 images are missing"),
    "rows in rows": ({"metadata.jsonl": b"[" * 100_000}, "nested too deeply"),
    "no image": ({"metadata.csv": b"file_name,text\na.png,one\nb.png,two\nc.png,three\n"}, "2 images are missing"),
    "a list of rows": ({"metadata.jsonl": b'[{"file_name": "a.png", "text": "one"}]'}, "a line is not an object"),
    "parquet": ({"metadata.parquet": b"PAR1", "a.txt": b"one"}, "tables cannot be read"),
    "a caption in Latin-1": ({"a.txt": "schön".encode("latin-1")}, "a.txt cannot be read: it is not UTF-8 at byte 3"),
    "a caption in UTF-16": ({"a.txt": "one".encode("utf-16")}, "not UTF-8 at byte 0"),
    "a caption in UTF-16 without a mark": ({"a.txt": "one".encode("utf-16-le")}, "not UTF-8 at byte 1"),
    "a caption in ISO-2022": ({"a.txt": "絵".encode("iso2022_jp")}, "not UTF-8 at byte 0"),
    "a table in Latin-1": (
        {"metadata.csv": b"file_name,text\r\n" + "a.png,schön".encode("latin-1")}, "not UTF-8 at byte 25, in line 2"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_captions_that_would_be_lost_are_refused(name: str, tmp_path: Path) -> None:
    files, reason = REFUSALS[name]
    photos(tmp_path, "a.png")
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(TuningError, match=reason):
        captioned(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the names are one")
def test_texts_whose_endings_differ_in_case_are_not_dropped(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.TXT").write_text("two")
    with pytest.raises(TuningError, match="about an image that has another"):
        captioned(tmp_path)
    with pytest.raises(TuningError, match="there is no folder"):
        captioned(Path("x" * 300))
