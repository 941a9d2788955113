"""Every command on folders of every kind: it runs, or says in our words what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from scenes.pipeline import MODEL

import sdgraph
from sdgraph.__main__ import main

from ..models import build

RUNS_ON_IMAGES = "the pipeline does not run on prompts"


@pytest.fixture(scope="module")
def models(pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, plain and as a variant, and separate UNets, to be copied."""
    folder = tmp_path_factory.mktemp("models")
    pipe.save_pretrained(folder / "plain")
    pipe.save_pretrained(folder / "variant", variant="fp16")
    build().save_pretrained(folder / "unet")
    build().save_pretrained(folder / "unet-variant", variant="fp16")
    build().save_pretrained(folder / "unet-shards", variant="fp16", max_shard_size="20KB")
    graph = sdgraph.apply(build(), "PruneBlocks('mid_block')")
    graph.save_pretrained(folder / "graph")
    graph.save_pretrained(folder / "graph-variant", variant="fp16")
    return folder


def index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    plain = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in plain.items() if value is not ...}))


def with_index(**changes: Any) -> Callable[[Path, Path], None]:
    def make(models: Path, folder: Path) -> None:
        shutil.copytree(models / "plain", folder)
        index(folder, **changes)

    return make


def copied(name: str) -> Callable[[Path, Path], None]:
    return lambda models, folder: shutil.copytree(models / name, folder) and None


def without(part: str) -> Callable[[Path, Path], None]:
    def make(models: Path, folder: Path) -> None:
        shutil.copytree(models / "plain", folder)
        shutil.rmtree(folder / part)

    return make


def two_variants(models: Path, folder: Path) -> None:
    shutil.copytree(models / "unet-variant", folder)
    weights = folder / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(weights, folder / "diffusion_pytorch_model.ema.safetensors")


def one_part_is_a_variant(models: Path, folder: Path) -> None:
    shutil.copytree(models / "plain", folder)
    shutil.rmtree(folder / "unet")
    shutil.copytree(models / "variant/unet", folder / "unet")


def code_in_the_folder(models: Path, folder: Path) -> None:
    with_index(_class_name=["pipeline", "Mine"])(models, folder)
    (folder / "pipeline.py").write_text("raise SystemExit('this was run')")


def no_weights(models: Path, folder: Path) -> None:
    shutil.copytree(models / "plain", folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()


def damaged_weights(models: Path, folder: Path) -> None:
    shutil.copytree(models / "plain", folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")


def of_another_size(models: Path, folder: Path) -> None:
    shutil.copytree(models / "plain", folder)
    shutil.copy(models / "unet/diffusion_pytorch_model.safetensors", folder / "unet")


def no_json(models: Path, folder: Path) -> None:
    shutil.copytree(models / "plain", folder)
    (folder / "model_index.json").write_text("{")


def unet_of_another_class(models: Path, folder: Path) -> None:
    shutil.copytree(models / "plain", folder)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    index(folder, unet=["diffusers", "UNet2DModel"])


def single_file(models: Path, folder: Path) -> None:
    save_file({"model.diffusion_model.time_embed.0.weight": torch.zeros(1)}, folder)


# By name: how the folder comes about; what a command that wants a UNet says; what one that wants a pipeline says. None:
# it runs.
FOLDERS: dict[str, tuple[Callable[[Path, Path], Any], str | None, str | None]] = {
    "variant": (copied("variant"), None, None),
    "one part is a variant": (one_part_is_a_variant, None, None),
    "unet": (copied("unet"), None, "it holds a UNet alone"),
    "unet-variant": (copied("unet-variant"), None, "it holds a UNet alone"),
    "unet-shards": (copied("unet-shards"), None, "it holds a UNet alone"),
    "graph": (copied("graph"), None, "it holds a UNet alone"),
    "graph-variant": (copied("graph-variant"), None, "it holds a UNet alone"),
    "two variants": (two_variants, "holds the variants ema, fp16", "it holds a UNet alone"),
    "unknown class": (with_index(_class_name="MyOwnPipeline"), None, "diffusers has no pipeline MyOwnPipeline"),
    "code in the folder": (code_in_the_folder, None, "which is not run"),
    "no class": (with_index(_class_name=...), "does not name the class", "does not name the class"),
    "unknown library": (with_index(vae=["my_library", "MyVAE"]), None, "my_library"),
    "unknown class of a part": (with_index(vae=["diffusers", "MyVAE"]), None, "MyVAE"),
    "no unet in the index": (with_index(unet=...), "has no UNet, only", "has no UNet, only"),
    "empty unet": (with_index(unet=[None, None]), "has no UNet, only", "has no UNet, only"),
    "no folder unet": (without("unet"), "neither a pipeline nor a UNet", "there is no folder unet"),
    "no folder vae": (without("vae"), None, "there is no folder vae"),
    "no weights": (no_weights, "cannot be loaded", "cannot be loaded"),
    "damaged weights": (damaged_weights, "cannot be loaded", "cannot be loaded"),
    "weights of another size": (of_another_size, "cannot be loaded", "cannot be loaded"),
    "no json": (no_json, "model_index.json is not JSON", "model_index.json is not JSON"),
    "another pipeline": (with_index(_class_name="FluxPipeline"), None, "cannot be loaded"),
    "of images to images": (with_index(_class_name="StableDiffusionImg2ImgPipeline"), None, RUNS_ON_IMAGES),
    "a unet of another class": (unet_of_another_class, "is a UNet2DModel", "is a UNet2DModel"),
    "a single file": (single_file, "from_single_file", "from_single_file"),
    "empty": (lambda models, folder: folder.mkdir(), "neither a pipeline nor a UNet", "there is no pipeline"),
}


@pytest.mark.slow
@pytest.mark.usefixtures("ways_in_this_process")
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_command_reads_the_folder_or_says_what_is_wrong(
    kind: str, models: Path, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, of_unet, of_pipeline = FOLDERS[kind]
    source = tmp_path / "model.safetensors"
    make(models, source)
    few = ["--prompts", prompts, "--steps", "1"]
    commands: dict[str, tuple[list[Any], str | None]] = {
        "apply": (["apply", source, "CleanUp", "--no-verify"], of_unet),
        "evaluate": (["evaluate", source, "CleanUp", *few], of_pipeline),
        "bench": (["bench", source], ""),
    }
    if of_unet is not None:  # what runs takes long, and loads by the same function
        commands["export"] = ["export", source, "--unet-only", "--out", tmp_path / "out"], of_unet
    if of_pipeline not in (None, RUNS_ON_IMAGES):
        many = tmp_path / "many.txt"
        many.write_text("".join(f"a red circle {number}\n" for number in range(24)))
        search = ["search", source, "--prompts", many, "--steps", "1"]
        commands["search"] = [*search, "--budget", "0.5", "--folder", tmp_path / "kept"], of_pipeline
        analyse = ["analyse", source, *few, "--levels", "block", "--target", "none", "--calls", "1"]
        commands["analyse"] = [*analyse, "--folder", tmp_path / "analysed"], of_pipeline
        config = tmp_path / "tune.json"
        settings = {
            "pretrained_model_name_or_path": str(source),
            "output_dir": str(tmp_path / "tuned"),
            "max_train_steps": 1,
        }
        config.write_text(json.dumps(settings | {"prompts": str(prompts), "passes": "PruneBlocks('mid_block')"}))
        commands["tune"] = ["tune", config], of_pipeline
    assert main(["inspect", str(source)]) in (0, 1, 2)  # it describes what it can; 3 would be a defect
    capsys.readouterr()
    for name, (arguments, expected) in commands.items():
        status = main([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert (status == 0) == (expected is None), (name, said)
        if expected is not None:
            assert status == (1 if expected == RUNS_ON_IMAGES else 2), (name, said)
            assert expected in said, name
            assert "  hint:  " in said, name
        elif "variant" in kind and "graph" not in kind:
            assert "holds the variant fp16, which is loaded" in said, name
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_variant_is_chosen_by_name(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_variants(models, tmp_path / "two")
    assert main(["apply", str(tmp_path / "two"), "CleanUp", "--variant", "ema", "--no-verify"]) == 0
    assert main(["apply", str(tmp_path / "two"), "CleanUp", "--variant", "bf16"]) == 2
    assert "variants: ema, fp16" in capsys.readouterr().err
    assert main(["apply", str(models / "unet"), "CleanUp", "--variant", "fp16"]) == 2
    assert "leave --variant out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pipeline_of_an_imported_class_is_loaded(tmp_path: Path, prompts: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "own")
    index(tmp_path / "own", _class_name="ScenePipeline")
    given = ["evaluate", str(tmp_path / "own"), "CleanUp", "--prompts", str(prompts), "--steps", "1"]
    assert main([*given, "--import", "scenes.pipeline"]) == 0
