"""Folders of switches that are damaged, forged or of another kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import sdgraph
from sdgraph import GraphUNet, SwitchUNet, errors
from sdgraph.atomic import sha256

from ..models import ONE_LEVEL, build


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("switches") / "unet"
    large, small = build(**ONE_LEVEL), build(**ONE_LEVEL, seed=1)
    small.conv_in = large.conv_in
    sdgraph.switch({"large": large, "small": small}, boundary_ratio=0.5, verify=False).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved switch to damage."""
    return Path(shutil.copytree(saved, tmp_path / "unet"))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the description of a switch."""
    recipe = json.loads((folder / "switch.json").read_text())
    change(recipe)
    (folder / "switch.json").write_text(json.dumps(recipe))


def of_the_second(recipe: dict[str, Any]) -> None:
    del recipe["members"]["small"]


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a newer format": (lambda recipe: recipe.update(format=99), "has format 99"),
    "no schedule": (lambda recipe: recipe.pop("schedule"), "schedule"),
    "a schedule of sites": (lambda recipe: recipe.update(schedule="Uniform(3)"), "names no UNets"),
    "a member is missing": (of_the_second, "names a UNet 'small'"),
    "a member too many": (
        lambda recipe: recipe["members"].update(third=recipe["members"]["small"]), "weights do not fit"
    ),
    "no members": (lambda recipe: recipe.update(members={}), "members"),
    "a name that leads out": (lambda recipe: recipe["members"].update({"../x": recipe["members"]["small"]}), "members"),
    "another graph": (lambda recipe: recipe["members"]["small"].update(passes=["PruneBlocks('mid')"]), "give a graph"),
    "another digest": (lambda recipe: recipe["members"]["small"].update(structure="0" * 64), "gives another graph"),
    "weights elsewhere": (lambda recipe: recipe.update(weights="../w.safetensors"), "weights"),
    "a stored tensor is missing": (
        lambda recipe: recipe["same"].update({"small.conv_in.weight": "large.nothing"}), "the weights have no"
    ),
    "a tensor of another shape": (
        lambda recipe: recipe["same"].update({"small.conv_in.weight": "large.conv_out.bias"}), "weights do not fit"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_description_that_does_not_fit(folder: Path, name: str) -> None:
    change, message = CHANGES[name]
    edit(folder, change)
    with pytest.raises(errors.SavedError, match=message):
        SwitchUNet.from_pretrained(folder)


def test_weights_that_are_gone_or_others(folder: Path) -> None:
    weights = folder / "sdgraph.safetensors"
    tensors = load_file(weights)
    tensors.pop("large.conv_in.weight")
    save_file(tensors, weights)
    with pytest.raises(errors.SavedError, match="not the one that was saved"):
        SwitchUNet.from_pretrained(folder)
    edit(folder, lambda recipe: recipe["files"].update({weights.name: sha256(weights)}))
    with pytest.raises(errors.SavedError, match="the weights"):
        SwitchUNet.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(errors.SavedError, match="the file is missing"):
        SwitchUNet.from_pretrained(folder)


def test_folders_of_other_kinds_name_their_reader(saved: Path, reusing_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.SavedError, match=r"SwitchUNet\.from_pretrained reads it"):
        GraphUNet.from_pretrained(saved)
    with pytest.raises(errors.SavedError, match=r"GraphUNet\.from_pretrained reads one UNet"):
        SwitchUNet.from_pretrained(reusing_folder)
    with pytest.raises(errors.SavedError, match=r"there is no switch\.json"):
        SwitchUNet.from_pretrained(tmp_path)


def test_shards_and_a_second_saving(saved: Path, tmp_path: Path) -> None:
    unet = SwitchUNet.from_pretrained(saved)
    unet.save_pretrained(tmp_path / "unet")
    unet.save_pretrained(tmp_path / "unet", max_shard_size="20KB", variant="fp32")
    assert len(list((tmp_path / "unet").glob("*.fp32-*-of-*.safetensors"))) > 1
    again = SwitchUNet.from_pretrained(tmp_path / "unet", variant="fp32")
    parts = dict(unet.named_parameters())
    assert all(parts[name].equal(parameter) for name, parameter in again.named_parameters())
    assert again.members["small"].conv_in.weight.data_ptr() == again.members["large"].conv_in.weight.data_ptr()
