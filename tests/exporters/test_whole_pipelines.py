"""Exported pipelines: the layout that optimum loads, the images of the source, tiles, and refusals."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from scenes import models

import sdgraph
from sdgraph.__main__ import main
from sdgraph.errors import CallError, ExportError, SavedError, SpecError
from sdgraph.exporters.onnx import export_pipeline
from sdgraph.exporters.onnx import pipeline as exporter
from sdgraph.exporters.ort import ORTVAE, open_pipeline, parts
from sdgraph.exporters.ort.providers import CPU

from ..models import ONE_LEVEL, build
from ..pipelines import large_with_text, vae

OPTIMUM = "SDGRAPH_OPTIMUM"  # the Python of an environment with optimum-onnx, which `make optimum` creates
STEPS, PROMPT = 4, "a large red circle"


def small() -> Any:
    """A pipeline of Stable Diffusion with the words of the scenes and one level."""
    words = models.tokenizer()
    torch.manual_seed(4)
    encoder = models.text_encoder(words).eval()
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=encoder,
        tokenizer=words,
        unet=build(**{**ONE_LEVEL, "cross_attention_dim": models.TEXT_WIDTH}),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_of(pipe: Any, **call: Any) -> np.ndarray[Any, Any]:
    pipe.set_progress_bar_config(disable=True)
    usual = {"num_inference_steps": STEPS, "output_type": "np", "generator": torch.Generator().manual_seed(3)}
    image: np.ndarray[Any, Any] = pipe(PROMPT, **{**usual, **call}).images[0]
    return image


@pytest.fixture(scope="module")
def source() -> Any:
    pipe = small()
    pipe.unet = sdgraph.apply(pipe.unet, "InheritFeatures.deep_cache(2)", verify=False)
    sdgraph.attach(pipe)
    return pipe


@pytest.fixture(scope="module")
def folder(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("pipeline") / "new" / "exported"
    report = export_pipeline(source, target, calls=STEPS, progress=False)
    assert all(comparison.holds for comparison in report.comparisons)
    assert "vae_decoder" in str(report)
    return target


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def opened(folder: Path, **options: Any) -> Any:
    return open_pipeline(folder, provider=CPU, **options)


def ports(path: Path) -> tuple[dict[str, list[int | str]], dict[str, list[int | str]]]:
    graph = onnx.load(path, load_external_data=False).graph
    inputs, outputs = (
        {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        for values in (graph.input, graph.output)
    )
    return inputs, outputs


@pytest.mark.slow
def test_the_unet_has_the_ports_of_optimum(folder: Path) -> None:
    inputs, outputs = ports(folder / "unet" / "model.onnx")
    latents = ["batch_size", 4, "latent_height", "latent_width"]
    assert inputs == {
        "sample": latents,
        "timestep": [],
        "encoder_hidden_states": ["batch_size", "sequence_length", models.TEXT_WIDTH],
    }
    assert outputs == {"out_sample": latents}
    assert sorted(path.name for path in (folder / "unet").glob("variant_*.onnx")) == [
        "variant_0.onnx",
        "variant_1.onnx",
    ]


@pytest.mark.slow
def test_the_other_parts_have_the_ports_of_optimum(folder: Path) -> None:
    inputs, outputs = ports(folder / "vae_decoder" / "model.onnx")
    batch, height, width = (f"vae_decoder_{name}" for name in ("batch_size", "latent_height", "latent_width"))
    assert inputs == {"latent_sample": [batch, 4, height, width]}
    assert outputs == {"sample": [batch, 3, f"{height} * 2", f"{width} * 2"]}  # which optimum evaluates
    inputs, outputs = ports(folder / "vae_encoder" / "model.onnx")
    assert list(inputs) == ["sample"]
    assert list(outputs) == ["latent_parameters"]
    assert outputs["latent_parameters"][2:] == ["vae_encoder_sample_height / 2", "vae_encoder_sample_width / 2"]
    inputs, outputs = ports(folder / "text_encoder" / "model.onnx")
    assert list(inputs) == ["input_ids"]
    assert list(outputs) == ["last_hidden_state", "pooler_output"]  # pipelines take the first


@pytest.mark.slow
def test_each_part_has_a_configuration_and_names_of_sizes_of_its_own(folder: Path) -> None:
    named: dict[str, str] = {}
    for path in sorted(folder.glob("*/model.onnx")):
        assert json.loads((path.parent / "config.json").read_text())
        for shape in ports(path)[0].values():
            for size in shape:
                assert isinstance(size, int) or named.setdefault(size, path.parent.name) == path.parent.name
    weights = onnx.load(folder / "vae_decoder" / "model.onnx").graph.initializer
    assert {w.data_type for w in weights} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}  # nothing to upcast
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (folder / "tokenizer").iterdir()}


@pytest.mark.slow
def test_images_are_those_of_the_source(source: Any, folder: Path) -> None:
    pipe = opened(folder)
    expected = image_of(source, height=32, width=48)
    np.testing.assert_allclose(image_of(pipe, height=32, width=48), expected, atol=1e-4)
    plain = small()
    assert np.abs(image_of(plain, height=32, width=48) - expected).max() > 1e-3  # the plan acts


@pytest.mark.slow
@pytest.mark.parametrize("task", ["image-to-image", "inpainting"])
def test_images_from_images(task: str, source: Any, folder: Path) -> None:
    kind = {
        "image-to-image": diffusers.StableDiffusionImg2ImgPipeline,
        "inpainting": diffusers.StableDiffusionInpaintPipeline,
    }
    call: dict[str, Any] = {"image": Image.new("RGB", (48, 32), "red"), "strength": 0.6}
    if task == "inpainting":
        call |= {"mask_image": Image.new("L", (48, 32), 255), "height": 32, "width": 48}
    theirs = kind[task](**source.components, requires_safety_checker=False)
    with sdgraph.attach(theirs):
        expected = image_of(theirs, **call)
    np.testing.assert_allclose(image_of(opened(folder, task=task), **call), expected, atol=1e-4)


@pytest.mark.slow
def test_a_callback_stops_a_generation(folder: Path) -> None:
    steps = []

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = step == 1
        return values

    image_of(opened(folder), callback_on_step_end=stop)
    assert steps == [0, 1]


@pytest.mark.slow
def test_the_command_generates(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(folder), PROMPT, "a circle " * 20, "--provider", CPU, "--steps", "5", "--out"]
    size, preview = ["--height", "32", "--width", "48"], tmp_path / "preview.png"
    assert main([*words, str(tmp_path / "a.png"), *size, "--preview", str(preview)]) == 0
    assert "CLIP reads 24 tokens, and the prompt has" in capsys.readouterr().err
    first = Image.open(tmp_path / "a-0.png")
    assert first.size == (48, 32)
    assert preview.is_file()
    expected = image_of(
        opened(folder), num_inference_steps=5, height=32, width=48, generator=torch.Generator().manual_seed(0)
    )
    np.testing.assert_allclose(np.asarray(first) / 255, expected, atol=1 / 255)
    assert main([*words, str(tmp_path / "a.png")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "b.png"), "--height", "30"]) == 2
    assert "24 or 32: multiples of 8 pixels" in capsys.readouterr().err


def damaged(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:-1] + b"?")

    return damage


def leading_out(folder: Path) -> None:
    """A link to a file elsewhere."""
    target = folder / "vae_decoder" / "config.json"
    elsewhere = folder.parent / "elsewhere.json"
    target.rename(elsewhere)
    target.symlink_to(elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (damaged("vae_decoder/model.onnx"), "vae_decoder/model.onnx is not the file that was exported"),
        (damaged("text_encoder/model.onnx.data"), "text_encoder/model.onnx.data is not the file"),
        (damaged("model_index.json"), "model_index.json is not the file"),
        (damaged("pipeline.json"), "pipeline.json"),
        (lambda folder: (folder / "tokenizer" / "vocab.json").unlink(), "tokenizer/vocab.json is missing"),
        (lambda folder: (folder / "pipeline.json").unlink(), "no exported pipeline"),
        (lambda folder: shutil.rmtree(folder / "unet"), "there is no folder"),
        (leading_out, "is a link out of its folder"),
    ],
)
def test_damaged_folders_are_refused(damage: Callable[[Path], None], complaint: str, copied: Path) -> None:
    damage(copied)
    with pytest.raises(SavedError, match=complaint):
        opened(copied)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scheduler", "os.system"),
        ("scheduler", "StableDiffusionPipeline"),
        ("tokenizers", {"tokenizer": "AutoModel"}),
        ("files", {"../../etc/passwd": "0" * 64}),
        ("kind", "FluxPipeline"),
    ],
)
def test_manifests_that_name_other_things_are_refused(field: str, value: Any, copied: Path) -> None:
    from sdgraph.exporters.bundle.manifest_file import digest

    path = copied / "pipeline.json"
    plain = {**json.loads(path.read_text()), field: value}
    del plain["sha256"]
    path.write_text(json.dumps({**plain, "sha256": digest(plain)}))
    with pytest.raises(SavedError):
        opened(copied)


class Other(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    ("part", "value", "complaint"),
    [
        ("safety_checker", Other(), "the safety_checker of this pipeline is not exported"),
        ("image_encoder", Other(), "the image_encoder of this pipeline is not exported"),
        ("text_encoder", Other(), "the text encoder is a Other"),
        ("tokenizer", None, "the pipeline has no tokenizer"),
    ],
)
def test_parts_that_are_not_covered_are_named(part: str, value: Any, complaint: str, tmp_path: Path) -> None:
    pipe = small()
    setattr(pipe, part, value)
    with pytest.raises(ExportError, match=complaint):
        export_pipeline(pipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_other_pipelines_and_latents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a DDPMPipeline is not covered"):
        export_pipeline(
            diffusers.DDPMPipeline(unet=torch.nn.Identity(), scheduler=models.scheduler()), tmp_path / "out"
        )
    pipe = small()
    pipe.vae.register_to_config(latent_channels=8)
    with pytest.raises(ExportError, match="latents with 8 channels, and the UNet makes latents with 4"):
        export_pipeline(pipe, tmp_path / "out")
    with pytest.raises(SpecError, match="'vae' cannot be left out"):
        export_pipeline(pipe, tmp_path / "out", leave_out=["vae"])


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(part: Any, folder: Path, opset: int) -> None:
        folder.mkdir()
        (folder / "model.onnx").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporter, "write_part", full)
    with pytest.raises(ExportError, match="writing failed: No space left on device"):
        export_pipeline(small(), tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


class Doubling:
    """A decoder whose pixels depend on one latent each: its tiles are exact, whatever the blending."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        self.sizes.append(tuple(latents.shape[-2:]))
        return {"sample": latents.repeat_interleave(2, -1).repeat_interleave(2, -2)}


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (20, 33), (8, 100)])
def test_tiles_make_the_whole_image(size: tuple[int, int]) -> None:
    decoder = Doubling()
    decoder_of = object.__new__(ORTVAE)
    decoder_of.__dict__ |= {"tile": 8, "factor": 2, "_decoder": decoder}
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    image = decoder_of.decode(latents).sample
    torch.testing.assert_close(image, Doubling()(latents)["sample"])
    assert max(max(tile) for tile in decoder.sizes) == 8
    starts = list(parts._starts(size[1], 8))
    assert all(after - before <= 6 for before, after in pairwise(starts))  # a quarter is shared


@pytest.mark.slow
def test_tiling_and_clip_skip_of_an_exported_pipeline(folder: Path) -> None:
    pipe = opened(folder, tile=8)
    assert image_of(pipe, height=32, width=48).shape == (32, 48, 3)
    with pytest.raises(SpecError, match="tile"):
        pipe.vae.enable_tiling(4)
    with pytest.raises(CallError, match="states between its layers"):
        image_of(pipe, clip_skip=1)


@pytest.mark.long
def test_sdxl_and_optimum(tmp_path: Path) -> None:
    pipe = large_with_text()
    expected = image_of(pipe, height=32, width=48)
    export_pipeline(pipe, tmp_path / "out", progress=False)
    np.testing.assert_allclose(image_of(opened(tmp_path / "out"), height=32, width=48), expected, atol=1e-4)
    assert list(ports(tmp_path / "out" / "text_encoder_2" / "model.onnx")[1])[:3] == [
        "text_embeds",
        "last_hidden_state",
        "hidden_states.0",
    ]
    np.testing.assert_allclose(of_optimum("ORTStableDiffusionXLPipeline", tmp_path / "out"), expected, atol=1e-3)


@pytest.mark.long
def test_optimum_loads_the_folder_unchanged(folder: Path) -> None:
    theirs = of_optimum("ORTStableDiffusionPipeline", folder)
    np.testing.assert_allclose(theirs, image_of(small(), height=32, width=48), atol=1e-3)


def of_optimum(kind: str, folder: Path) -> Any:
    """Return the image of optimum, which is the same with and without IO binding."""
    python = os.environ.get(OPTIMUM)
    if python is None:
        pytest.skip(f"no {OPTIMUM} names the Python of an environment with optimum-onnx; `make optimum` makes one")
    code = f"""
import sys, numpy, torch
from optimum.onnxruntime import {kind}
images = []
for binding in (False, True):
    pipe = {kind}.from_pretrained(sys.argv[1], use_io_binding=binding)
    generator = torch.Generator().manual_seed(3)
    images.append(pipe({PROMPT!r}, num_inference_steps={STEPS}, output_type="np", generator=generator,
                       height=32, width=48).images[0])
assert (images[0] == images[1]).all()
numpy.save(sys.argv[2], images[0])
"""
    result = folder.parent / "image.npy"
    done = subprocess.run([python, "-c", code, str(folder), str(result)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "expects a non scalar timestep" not in done.stderr
    return np.load(result)
