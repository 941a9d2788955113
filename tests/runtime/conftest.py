"""A UNet that was cleaned up and one that was pruned, whose folder may be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph import GraphUNet

from ..models import build


@pytest.fixture(scope="module")
def pair() -> tuple[UNet2DConditionModel, GraphUNet]:
    """A UNet and its graph, cleaned up."""
    unet = build()
    return unet, sdgraph.apply(unet, "CleanUp")


@pytest.fixture(scope="session")
def pruned() -> GraphUNet:
    return sdgraph.apply(build("sd15"), "CleanUp, PruneBlocks('mid_block')", verify=False)


@pytest.fixture(scope="session")
def saved(pruned: GraphUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "unet"
    pruned.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved folder to damage."""
    return Path(shutil.copytree(saved, tmp_path / "unet"))
