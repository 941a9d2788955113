"""Saved folders: what comes back is the same; what is damaged or unsafe is refused before anything runs."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sdgraph
from sdgraph import Graph, GraphUNet, Pass
from sdgraph.errors import ModeError, SavedError

from .models import answer, build, call_of, load_ip_adapter

PASSES = "CleanUp, PruneBlocks('mid_block')"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pruned() -> GraphUNet:
    return sdgraph.apply(build("sd15"), PASSES, verify=False)


@pytest.fixture(scope="module")
def saved(pruned: GraphUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "unet"
    pruned.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved folder to damage."""
    return Path(shutil.copytree(saved, tmp_path / "unet"))


def test_round_trip(pruned: GraphUNet, folder: Path) -> None:
    back = GraphUNet.from_pretrained(folder)
    assert {p.name for p in folder.iterdir()} == {"config.json", "sdgraph.json", WEIGHTS}
    assert [str(p) for p in back.graph.passes] == ["CleanUp()", "PruneBlocks('mid_block')"]
    call = call_of(pruned)
    assert torch.equal(answer(back, call), answer(pruned, call))
    assert back.config.in_channels == pruned.config.in_channels
    half = GraphUNet.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "lcm", "class-timestep", "upscaler"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    unet = sdgraph.apply(build(name).to(torch.bfloat16), "CleanUp", verify=False)
    unet.save_pretrained(tmp_path / "unet")
    back = GraphUNet.from_pretrained(tmp_path / "unet")
    call = call_of(unet)
    assert back.dtype == torch.bfloat16
    assert torch.equal(answer(back, call), answer(unet, call))


def test_a_pass_that_changes_only_weights_comes_back(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class HalveConvIn(Pass):
        def run(self, graph: Graph) -> None:
            old = graph.module("conv_in")
            new = copy.deepcopy(old)
            with torch.no_grad():
                new.weight = nn.Parameter(old.weight / 2)
            graph.add_module("conv_in", new)

    unet = sdgraph.apply(build("sd15"), [HalveConvIn()])
    unet.save_pretrained(tmp_path / "unet")
    back = GraphUNet.from_pretrained(tmp_path / "unet")
    call = call_of(unet)
    assert torch.equal(answer(back, call), answer(unet, call))
    assert not torch.equal(answer(back, call), answer(build("sd15"), call))


def test_trained_weights_are_what_is_saved(tmp_path: Path) -> None:
    unet = sdgraph.apply(build("sd15"), "CleanUp", verify=False).train()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.5)
    unet.save_pretrained(tmp_path / "unet")
    back = GraphUNet.from_pretrained(tmp_path / "unet")
    call = call_of(unet)
    assert torch.equal(answer(back, call), answer(unet.eval(), call))


def test_saving_again_replaces_and_leaves_nothing_else(pruned: GraphUNet, folder: Path) -> None:
    pruned.save_pretrained(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["unet"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SavedError, match="holds other files: notes"):
        pruned.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failed_save_leaves_the_old_folder(pruned: GraphUNet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        pruned.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["unet"]


def recipe(folder: Path, **changes: Any) -> None:
    file = folder / "sdgraph.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: truncate(f / WEIGHTS), "not the one that was saved"),
        (lambda f: flip(f / WEIGHTS), "not the one that was saved"),
        (lambda f: flip(f / "config.json"), "not the one that was saved"),
        (lambda f: (f / WEIGHTS).unlink(), "the file is missing"),
        (lambda f: (f / "config.json").unlink(), "the file is missing"),
        (lambda f: (f / "sdgraph.json").unlink(), "cannot read it"),
        (lambda f: truncate(f / "sdgraph.json"), "cannot read it"),
        (lambda f: (f / "sdgraph.json").write_text("[]"), "not a JSON object"),
        (lambda f: recipe(f, weights="../../etc/passwd"), "outside of its folder"),
        (lambda f: recipe(f, weights="/etc/passwd"), "outside of its folder"),
        (lambda f: recipe(f, files={"../x": "0", WEIGHTS: "0", "config.json": "0"}), "outside of its folder"),
        (lambda f: recipe(f, files={}), "no checksum of"),
        (lambda f: recipe(f, format=99), "upgrade sdgraph"),
        (lambda f: recipe(f, passes="CleanUp()"), "no valid 'passes'"),
        (lambda f: recipe(f, passes=["Unheard()"]), "no pass named 'Unheard'"),
        (lambda f: recipe(f, passes=["CleanUp()"]), "gives another graph"),
        (lambda f: recipe(f, dtype="load"), "unknown dtype"),
    ],
)
def test_damage_is_refused(folder: Path, damage: Any, words: str) -> None:
    damage(folder)
    with pytest.raises(SavedError, match=words):
        GraphUNet.from_pretrained(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SavedError, match="outside of its folder"):
        GraphUNet.from_pretrained(folder)


def test_what_cannot_come_back_is_not_saved(tmp_path: Path) -> None:
    adapted = sdgraph.apply(load_ip_adapter(build("sd15"), "base"), [], verify=False)
    with pytest.raises(ModeError, match="save the source UNet"):
        adapted.save_pretrained(tmp_path / "unet")
    assert list(tmp_path.iterdir()) == []


def test_options_that_would_be_ignored_are_refused(pruned: GraphUNet, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SavedError, match=r"(?s)push_to_hub.*unet.push_to_hub"):
        pruned.save_pretrained(tmp_path / "other", push_to_hub=True)
    with pytest.raises(SavedError, match="quantization_config"):
        GraphUNet.from_pretrained(folder, quantization_config={"load_in_8bit": True})
    with pytest.raises(SavedError, match="no folder"):
        GraphUNet.from_pretrained("nobody/nothing")
    pruned.save_pretrained(tmp_path / "variant", variant="fp16")
    assert (tmp_path / "variant" / "diffusion_pytorch_model.fp16.safetensors").exists()
    GraphUNet.from_pretrained(tmp_path / "variant", variant="fp16")
