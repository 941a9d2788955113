"""The models that commands load, and their dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdgraph.cli import main
from sdgraph.cli.sources import load_unet

from ..models import build


def test_exports_are_refused_before_the_model_is_loaded(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "no/such/model", "--out", str(bundle)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", str(bundle), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "is exported already" in said
    assert "sdgraph inspect" in said


def test_the_command_loads_in_the_dtype_that_is_asked_for(
    reusing_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """diffusers' `to` warns of "modules that should be kept in float32: []"."""
    build("sd15").save_pretrained(tmp_path / "unet")
    for folder in (tmp_path / "unet", reusing_folder):
        assert load_unet(str(folder), "float16").dtype == torch.float16
    assert "float32" not in capfd.readouterr().err
