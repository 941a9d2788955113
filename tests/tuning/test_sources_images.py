"""`sdgraph.tuning.Images`: a folder of images with captions, as diffusers' scripts encode it."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

from sdgraph.errors import TuningError
from sdgraph.tuning import Batches, Images, MoreCaptions, NoiseSchedule
from sdgraph.tuning.random_numbers import generator
from sdgraph.tuning.sources.image_folder import captioned
from sdgraph.tuning.sources.images import _pool

from ..photos import CAPTIONS, SIZES, write_images, write_photos
from ..pipelines import large_with_text

ROWS = [3, 0, 4]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with captions. Leave it as it is."""
    return write_photos(tmp_path_factory.mktemp("photos"))


def draws(rows: list[int], step: int = 0) -> list[np.random.Generator]:
    return [generator(0, "row", step, row) for row in rows]


def latents(images: Images, rows: list[int], step: int = 0) -> Tensor:
    return images.samples(rows, draws(rows, step)).latents


# -- what is encoded --------------------------------------------------------------------------------------------------


def test_latents_are_samples_of_the_vae_as_diffusers_scripts_take_them(photos: Path, pipe: Any) -> None:
    image = Image.open(photos / "3.png").resize((16, 16), Image.Resampling.LANCZOS)  # twice as large as asked for
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 * 2 - 1
    with torch.no_grad():
        seen = pipe.vae.encode(values).latent_dist
    noise = torch.from_numpy(generator(0, "row", 0, 3).standard_normal((4, 4, 4), np.float32))
    expected = (seen.mean[0] + seen.std[0] * noise) * pipe.vae.config.scaling_factor
    found = latents(Images(photos, pipe, resolution=16), ROWS)
    assert found.shape == (3, 4, 4, 4)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_the_vaes_shift_and_statistics_are_undone_as_pipelines_do_them(photos: Path, pipe: Any) -> None:
    images = Images(photos, pipe, resolution=16, center_crop=True)
    plain = latents(images, [0])
    images._scaling = type(pipe.vae.config)({**pipe.vae.config, "shift_factor": 0.5})
    torch.testing.assert_close(latents(images, [0]), plain - 0.5 * pipe.vae.config.scaling_factor)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    images._scaling = type(pipe.vae.config)({**pipe.vae.config, "latents_mean": mean, "latents_std": std})
    decoded = latents(images, [0]) * torch.tensor(std).view(1, 4, 1, 1) / pipe.vae.config.scaling_factor
    decoded = decoded + torch.tensor(mean).view(1, 4, 1, 1)  # as StableDiffusionXLPipeline does before it decodes
    torch.testing.assert_close(decoded, plain / pipe.vae.config.scaling_factor)


def test_conditions_are_the_pipelines_own(photos: Path, pipe: Any) -> None:
    found = Images(photos, pipe, resolution=16).conditions([1, None])
    (expected, empty) = pipe.encode_prompt(CAPTIONS[1], "cpu", 1, True)
    assert found.keys() == {"encoder_hidden_states"}
    torch.testing.assert_close(found["encoder_hidden_states"], torch.cat([expected, empty]))


def test_sdxl_is_told_sizes_and_crops(photos: Path) -> None:
    pipe = large_with_text()
    centred = Images(photos, pipe, resolution=16, center_crop=True).conditions([2, None])
    embeddings, _, pooled, empty = pipe.encode_prompt(CAPTIONS[2], device="cpu")
    torch.testing.assert_close(centred["encoder_hidden_states"][:1], embeddings)
    torch.testing.assert_close(centred["text_embeds"], torch.cat([pooled, empty]))
    # a picture of 16 x 40 keeps its height, and loses 12 columns on each side
    assert centred["time_ids"].tolist() == [[16, 40, 0, 12, 16, 16], [16, 16, 0, 0, 16, 16]]
    places = {
        tuple(Images(photos, pipe, resolution=16, seed=s).conditions([2])["time_ids"][0].tolist()) for s in (0, 1)
    }
    assert len(places) == 2  # random crops follow from the seed
    assert all(place[:3] == (16, 40, 0) and 0 <= place[3] <= 24 for place in places)


def test_a_mirrored_row_is_what_is_seen_at_its_corner(tmp_path: Path) -> None:
    places = np.zeros((16, 64, 3), np.uint8)
    places[..., 0] = np.arange(64)
    Image.fromarray(places).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red circle")
    images = Images(tmp_path, large_with_text(), resolution=16, random_flip=True, seed=3)
    left = int(images.conditions([0])["time_ids"][0, 3])
    plain, mirrored = ((images._pixels([0], [flip])[0, 0, 0, 0] + 1) * 127.5 for flip in (False, True))
    assert left not in (0, 24, 48)
    assert round(float(plain)) == left
    assert round(float(mirrored)) == 63 - left


def test_sizes_are_those_of_the_image_whatever_its_caption(photos: Path) -> None:
    source = Images(photos, large_with_text(), resolution=16, center_crop=True)
    noise_schedule = NoiseSchedule.of(DDPMScheduler())
    for options in ({"guidance_pairs": True}, {"proportion_empty_prompts": 0.9}, {"random_conditioning": True}):
        batches = Batches(source, noise_schedule, 10, **options)  # type: ignore[arg-type]
        told = batches.batch(0, range(10)).conditions["time_ids"]
        copies = 2 if "guidance_pairs" in options else 1
        rows = [batches._index(row // copies) for row in range(10)]
        assert told[:, :2].tolist() == [[*SIZES[row]] for row in rows]
        assert told.tolist() == source.conditions(rows)["time_ids"].tolist()


def test_images_are_mirrored_anew_at_every_step(photos: Path, pipe: Any, tmp_path: Path) -> None:
    shutil.copy(photos / "0.png", tmp_path / "0.png")
    image = Image.open(photos / "0.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "1.png")
    for name in "01":
        (tmp_path / f"{name}.txt").write_text("a red circle")
    images = Images(tmp_path, pipe, resolution=16, random_flip=True)
    as_it_is, mirrored = (images._seen([row], [False])[0] for row in (0, 1))
    found = {step: images._seen([0], [draws([0], step)[0].random() < 0.5])[0] for step in range(8)}
    for step, seen in found.items():
        mean = latents(images, [0], step) / pipe.vae.config.scaling_factor
        noise = draws([0], step)[0]
        noise.random()
        expected = seen[0] + seen[1] * torch.from_numpy(noise.standard_normal((4, 4, 4), np.float32))
        torch.testing.assert_close(mean[0], expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(seen, as_it_is) or torch.allclose(seen, mirrored)
    assert 0 < sum(torch.allclose(seen, mirrored) for seen in found.values()) < 8


def test_photos_that_lie_on_a_side_stand_up(tmp_path: Path, pipe: Any) -> None:
    upright = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 16, 3), np.uint8))
    upright.save(tmp_path / "upright.png")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    for name in ("upright", "turned"):
        (tmp_path / f"{name}.txt").write_text("a red circle")
    turned_image, upright_image = captioned(tmp_path)
    assert turned_image.size == upright_image.size == (32, 16)
    images = Images(tmp_path, pipe, resolution=16, center_crop=True)
    assert torch.equal(*images._seen([0, 1], [False, False]))


# -- captions ---------------------------------------------------------------------------------------------------------


def test_captions_are_found_in_every_layout(photos: Path, tmp_path: Path) -> None:
    expected = [(f"{i}.png", CAPTIONS[i], SIZES[i]) for i in range(5)]
    table, beside = write_images(tmp_path / "table" / "train").parent, write_images(tmp_path / "beside")
    with (table / "train" / "metadata.csv").open("w", newline="") as lines:
        csv.writer(lines).writerows([("file_name", "words"), *((name, text) for name, text, _ in expected)])
    for name, text, _ in expected:
        (beside / name).with_suffix(".txt").write_text(f"{text}\n")
    for folder, column in ((photos, "text"), (table, "words"), (beside, "text")):
        assert [(i.path.name, i.caption, i.size) for i in captioned(folder, column)] == expected


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"random_flip": True}], ids=["plain", "flipped"])
def test_a_cache_gives_the_same_without_the_models(
    photos: Path, tmp_path: Path, pipe: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def images(**more: Any) -> Images:
        return Images(photos, pipe, resolution=16, **options, **more)

    direct, cached = images(), images(cache=tmp_path / "cache")
    again = images(cache=tmp_path / "cache")
    assert direct.fingerprint() == cached.fingerprint()
    monkeypatch.setattr(pipe.vae, "encode", None)
    monkeypatch.setattr(pipe, "encode_prompt", None)
    for step in range(3):
        found = [latents(one, ROWS, step) for one in (cached, again)]
        assert torch.equal(*found)
    monkeypatch.undo()
    torch.testing.assert_close(latents(direct, ROWS, 2), found[0], rtol=1e-4, atol=1e-4)
    for name, value in direct.conditions([1, None, 2]).items():
        torch.testing.assert_close(cached.conditions([1, None, 2])[name], value)
    assert cached.conditions([None])["encoder_hidden_states"].shape == (1, 24, 96)


def test_what_differs_is_told_by_name(photos: Path, tmp_path: Path, pipe: Any) -> None:
    cache = tmp_path / "cache"
    Images(photos, pipe, resolution=16, cache=cache)
    with pytest.raises(TuningError, match="another resolution: 16 then, 32 now"):
        Images(photos, pipe, resolution=32, cache=cache)
    with pytest.raises(TuningError, match="another choice of crops: random, seed 0 then, centre now"):
        Images(photos, pipe, resolution=16, center_crop=True, cache=cache)
    bias = pipe.vae.encoder.conv_in.bias.data
    bias += 1
    try:
        with pytest.raises(TuningError, match="another VAE"):
            Images(photos, pipe, resolution=16, cache=cache)
    finally:
        bias -= 1


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_folders_are_refused(photos: Path, tmp_path: Path, pipe: Any) -> None:
    def refused(folder: Path, reason: str, **options: Any) -> None:
        with pytest.raises(TuningError, match=reason):
            Images(folder, pipe, **{"resolution": 16, **options})

    refused(tmp_path / "none", "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "there are no images")
    refused(write_images(tmp_path / "silent"), r"5 of 5 images have no caption\n    0.png")
    refused(photos, "there is no text in a column 'txt'(.|\n)*did you mean 'text'", caption_column="txt")
    refused(photos, "the resolution is 18, and the VAE scales by 4", resolution=18)
    halved = write_photos(tmp_path / "halved", 1)
    (halved / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "half of \\ud83d"}')
    refused(halved, "half a character is in 'half of")
    gone = write_photos(tmp_path / "gone")
    (gone / "2.png").unlink()
    refused(gone, r"1 images are missing\n    2.png: metadata.jsonl has a row for it")
    damaged = write_photos(tmp_path / "damaged")
    (damaged / "1.png").write_bytes(b"nothing")
    refused(damaged, r"1 of 5 images cannot be read\n    1.png: it is no image")
    (damaged / "metadata.jsonl").write_text('{"file_name": "0.png"\n')
    refused(damaged, "metadata.jsonl cannot be read(.|\n)*row 1")


def test_an_image_that_ends_early_is_named(tmp_path: Path, pipe: Any) -> None:
    cut = write_photos(tmp_path / "cut")
    (cut / "3.png").write_bytes((cut / "3.png").read_bytes()[:900])
    with pytest.raises(TuningError, match=r"cannot be read(.|\n)*3.png"):
        Images(cut, pipe, resolution=16, cache=tmp_path / "cache")


def test_broken_images_are_left_out_on_request(
    photos: Path, tmp_path: Path, pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    broken = write_photos(tmp_path / "broken")
    (broken / "1.png").write_bytes(b"nothing")
    (broken / "3.png").write_bytes((broken / "3.png").read_bytes()[:900])
    (broken / "4.png").unlink()
    whole = Images(photos, pipe, resolution=16)
    for cache in (None, tmp_path / "cache"):
        caplog.clear()
        images = Images(broken, pipe, resolution=16, cache=cache, skip_broken=True)
        assert "3 of 5 images cannot be read, and are left out\n    1.png: it is no image" in caplog.text
        assert "\n    3.png: " in caplog.text
        assert "\n    4.png: it is no file" in caplog.text
        assert list(images.contents.rows) == [whole.contents.rows[row] for row in (0, 2)]
        for mine, its in ((0, 0), (1, 2)):
            expected = whole.samples([its], draws([its])).latents
            torch.testing.assert_close(images.samples([mine], draws([its])).latents, expected)
    for name in ("0.png", "2.png"):
        (broken / name).unlink()
    with pytest.raises(TuningError, match="5 of 5 images cannot be read"):
        Images(broken, pipe, resolution=16, skip_broken=True)


@pytest.mark.slow
def test_other_processes_decode_the_same(tmp_path: Path, pipe: Any) -> None:
    folder = write_photos(tmp_path / "photos")
    plain, shared = (
        Images(folder, pipe, resolution=16, random_flip=True, dataloader_num_workers=workers) for workers in (0, 2)
    )
    assert plain.fingerprint() == shared.fingerprint()
    for step in range(3):
        assert torch.equal(latents(plain, ROWS, step), latents(shared, ROWS, step))
    kept = Images(folder, pipe, resolution=16, cache=tmp_path / "cache", dataloader_num_workers=2)
    alone = Images(folder, pipe, resolution=16, cache=tmp_path / "alone")
    assert torch.equal(latents(kept, ROWS), latents(alone, ROWS))
    (folder / "3.png").write_bytes(b"nothing")
    with pytest.raises(TuningError, match=r"1 of 5 images cannot be read\n    3.png"):
        latents(shared, ROWS)
    for process in [*_pool(2)._processes.values()]:
        process.kill()
        process.join()
    with pytest.raises(TuningError, match="a process that decodes images has died") as error:
        latents(shared, [0])
    assert error.value.where == "dataloader_num_workers"
    assert torch.equal(latents(plain, [0]), latents(shared, [0]))  # in new processes


def test_a_new_or_changed_image_costs_one_encoding(tmp_path: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = write_photos(tmp_path / "photos"), tmp_path / "cache"
    encoded: list[str] = []

    def counted(self: Images, rows: list[int]) -> dict[str, Tensor]:
        encoded.extend(self._images[row].path.name for row in rows)
        return plain(self, rows)

    plain = Images._encoded
    monkeypatch.setattr(Images, "_encoded", counted)

    def read() -> list[str]:
        encoded.clear()
        Images(folder, pipe, resolution=16, center_crop=True, cache=cache)
        return sorted(encoded)

    assert len(read()) == 5
    assert read() == []
    table = folder / "metadata.jsonl"
    Image.new("RGB", (16, 16), "red").save(folder / "new.png")
    table.write_text(table.read_text() + '{"file_name": "new.png", "text": "red"}\n')
    assert read() == ["new.png"]
    (folder / "1.png").write_bytes((folder / "3.png").read_bytes())
    assert read() == ["1.png"]
    table.write_text(table.read_text().replace('"red"', '"crimson"'))
    assert read() == ["new.png"]  # its caption is encoded as well
    (folder / "0.png").rename(folder / "zero.png")
    table.write_text(table.read_text().replace("0.png", "zero.png"))
    assert read() == []


def test_a_vae_that_overflows_is_told(photos: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Images(photos, pipe, resolution=16)
    monkeypatch.setattr(pipe.vae.quant_conv.bias, "data", torch.full_like(pipe.vae.quant_conv.bias, torch.nan))
    with pytest.raises(TuningError, match=r"values that are not finite, in torch.float32(.|\n)*pipe.vae.to\(torch"):
        latents(images, [0])


def test_pipelines_without_text_encoder_or_with_guidance_embedding_are_refused(
    photos: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "text_encoder", None)
        with pytest.raises(TuningError, match="has no text encoder"):
            Images(photos, pipe, resolution=16)
    with monkeypatch.context() as patch:
        patch.setattr(
            pipe.unet, "_internal_dict", type(pipe.unet.config)({**pipe.unet.config, "time_cond_proj_dim": 8})
        )
        with pytest.raises(TuningError, match="embedding of the guidance scale"):
            Images(photos, pipe, resolution=16)


def test_captions_that_are_cut_or_empty_are_told_of(
    pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_images(tmp_path / "photos", 3)
    for number, text in enumerate(("a red circle " * 100, " \n", "a red circle")):
        (folder / f"{number}.txt").write_text(text)
    with caplog.at_level("WARNING", "sdgraph"):
        Images(folder, pipe, resolution=16)
        MoreCaptions(Images(folder, pipe, resolution=16), ["a red circle " * 100], pipe)
    said = [record.getMessage() for record in caplog.records]
    assert sum("are longer than the" in text for text in said) == 3
    assert sum("captions 1 are empty" in text for text in said) == 2
