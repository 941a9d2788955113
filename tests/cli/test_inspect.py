"""`sdgraph inspect`, of every kind of folder; of exported UNets see `test_export`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from scenes.pipeline import MODEL

import sdgraph
from sdgraph.__main__ import main

from ..models import ONE_LEVEL, build


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run that was stopped: a checkpoint with its record and its UNet."""
    folder = tmp_path_factory.mktemp("run")
    saved = folder / "checkpoint-30"
    saved.mkdir()
    (saved / "state.json").write_text(json.dumps({"step": 30, "settings": {"learning_rate": 1e-4, "seed": None}}))
    sdgraph.apply(build(), "PruneBlocks('mid_block')", verify=False).save_pretrained(saved / "unet")
    return folder


@pytest.mark.parametrize(
    ("folder", "wanted"),
    [
        (MODEL, ["a pipeline, StableDiffusionPipeline", "AutoencoderKL", "images of 64x64 pixels", "passes: none"]),
        (MODEL / "unet", ["unet: a UNet\n", "5.59 M parameters, F16"]),
    ],
)
def test_folders_of_diffusers(folder: Path, wanted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in wanted), said


def test_a_saved_unet_tells_what_its_calls_inherit(reusing_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(reusing_folder), "--calls", "6"]) == 0
    said = capsys.readouterr().out
    assert "a UNet, saved by sdgraph" in said
    assert "passes: CleanUp(), InheritFeatures" in said
    assert "6 calls: ■ computed □ reused" in said


def test_a_switch_says_who_computes_when(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {"large": build(**ONE_LEVEL), "small": build(**ONE_LEVEL, seed=1)}
    sdgraph.switch(members, boundary_ratio=0.5, verify=False).save_pretrained(tmp_path / "unet")
    assert main(["inspect", str(tmp_path / "unet"), "--calls", "4"]) == 0
    said = capsys.readouterr().out
    assert "a switch of several UNets, saved by sdgraph" in said
    assert "schedule: ByTimestep(('large', 'small'), starts=(500.0,))" in said
    assert "  ■■··  large computes\n  ··■■  small computes\n" in said


def test_a_training_run_and_its_checkpoint(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run_folder)]) == 0
    assert "a training run; checkpoints of the steps 30; it has not ended" in capsys.readouterr().out
    assert main(["inspect", str(run_folder / "checkpoint-30")]) == 0
    said = capsys.readouterr().out
    assert "a checkpoint of a training run, after step 30" in said
    assert "learning_rate  0.0001" in said
    assert "passes: PruneBlocks('mid_block')" in said
    # a checkpoint is a UNet to other commands
    assert main(["show", str(run_folder / "checkpoint-30"), "--depth", "2"]) == 0
    assert "PruneBlocks('mid_block')" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "apply", "evaluate", "bench", "show"])
def test_a_folder_without_permission(
    command: str, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def access(path: str | Path, mode: int) -> bool:
        return Path(path) != MODEL

    monkeypatch.setattr(os, "access", access)
    more = {"apply": ["CleanUp"], "evaluate": ["CleanUp", "--prompts", str(prompts)]}.get(command, [])
    assert main([command, str(MODEL), *more]) == 2
    said = capsys.readouterr().err
    assert f"there is no permission to read {MODEL}" in said
    assert "chmod" in said


def test_an_output_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert main(["apply", str(MODEL), "CleanUp", "--save", str(tmp_path / "made" / "unet")]) == 2
    assert f"there is no permission to write in {tmp_path}" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    assert main(["apply", str(MODEL), "CleanUp", "--save", str(tmp_path / "file" / "unet")]) == 2
    assert f"{tmp_path / 'file'} is a file, not a folder" in capsys.readouterr().err


def test_a_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "it holds notes.txt" in capsys.readouterr().err
