"""The installed packages are `sdgraph`, `sdgraph.passes` and `sdgraph.exporters`, whatever the folders are."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from ..documents import ROOT

FOLDERS = {"sdgraph": "sdgraph", "sdgraph.passes": "passes", "sdgraph.exporters": "exporters"}
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def imported_from(cwd: Path, *path: Path) -> dict[str, Path]:
    """The folder of each package in a fresh interpreter in `cwd`, with `path` first on its `sys.path`."""
    code = f"""
import importlib, json, sys
sys.path[:0] = sys.argv[1:]
print(json.dumps({{name: importlib.import_module(name).__file__ for name in {list(FOLDERS)}}}))
"""
    files = json.loads(run(sys.executable, "-c", code, *path, cwd=cwd))
    return {name: Path(file).resolve().parent for name, file in files.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from: setuptools builds in place, and what it leaves gets into the next wheel."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


@pytest.mark.slow
def test_wheel_holds_every_file_as_sdgraph_and_nothing_else(source: Path, wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files >= {"sdgraph/__init__.py", "sdgraph/passes/__init__.py", "sdgraph/exporters/__init__.py"}
    assert "sdgraph/py.typed" in files
    assert files == {
        f"{package.replace('.', '/')}/{file.relative_to(source / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for file in (source / folder).rglob("*")
        if file.is_file()
    }


@pytest.mark.slow
def test_installed_wheel_imports_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    assert imported_from(tmp_path, installed) == {package: installed / package.replace(".", "/") for package in FOLDERS}


@pytest.mark.slow
def test_wheel_declares_the_passes_of_pyproject(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(name="sdgraph-compiler", path=[str(installed)])
    declared = {entry.name: entry.value for entry in distribution.entry_points if entry.group == "sdgraph.passes"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert declared == project["entry-points"]["sdgraph.passes"]


def test_declared_passes_load() -> None:
    entries = importlib.metadata.entry_points(group="sdgraph.passes")
    assert {"CleanUp", "PruneBlocks"} <= entries.names
    for entry in entries:
        assert entry.load().__name__ == entry.name


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_editable_install_imports_the_checkout(inside: bool, tmp_path: Path) -> None:
    origin = importlib.metadata.distribution("sdgraph-compiler").read_text("direct_url.json")
    if not json.loads(origin or "{}").get("dir_info", {}).get("editable"):
        pytest.skip("the environment holds sdgraph as a wheel")
    expected = {package: ROOT / folder for package, folder in FOLDERS.items()}
    assert imported_from(ROOT if inside else tmp_path) == expected


@pytest.mark.slow
def test_submodules_load_when_asked_for(tmp_path: Path) -> None:
    code = "import sdgraph; print(sdgraph.passes.CleanUp(), sdgraph.exporters.onnx.export.__name__, sdgraph.testing)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).startswith("CleanUp() export <module 'sdgraph.testing'")


@pytest.mark.slow
def test_the_core_runs_without_the_extras(tmp_path: Path) -> None:
    """Exporters and pictures say which extra they need; everything else works."""
    code = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
missing = ("onnx", "onnxruntime", "onnxscript", "matplotlib", "transformers", "accelerate", "peft")
PathFinder.find_spec = staticmethod(
    lambda name, *rest, **more: None if name.split(".")[0] in missing else find(name, *rest, **more)
)
import torch, sdgraph
from diffusers import UNet2DConditionModel
unet = UNet2DConditionModel(block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8,
    attention_head_dim=2, layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval()
pruned = sdgraph.apply(unet, "CleanUp, PruneBlocks('mid_block')")
str(pruned.graph)
for extra, need in (("onnx", lambda: sdgraph.exporters.onnx.export(pruned, "x")),
                    ("plots", lambda: pruned.graph.draw("x.svg"))):
    try:
        need()
    except sdgraph.errors.ExtraError as error:
        print(extra, f"pip install -e '.[{extra}]'" in str(error))
"""
    assert run(sys.executable, "-W", "ignore", "-c", code, cwd=tmp_path).split() == ["onnx", "True", "plots", "True"]
