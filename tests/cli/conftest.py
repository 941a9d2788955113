"""The inputs of commands: a file of prompts, a folder with a UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdgraph import cli

from ..models import build


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a large red circle\n\na small blue square\n")
    return path


@pytest.fixture(scope="session")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small UNet of diffusers."""
    folder = tmp_path_factory.mktemp("unet")
    build().save_pretrained(folder)
    return folder


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> Any:
        raise SystemExit("something is loaded")  # which no command catches

    monkeypatch.setattr(cli.sources, "_load", load)
