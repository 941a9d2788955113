"""Exports by name, each made once per session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from sdgraph.exporters.onnx.export import export

from ..pipelines import PIPELINES
from .exports import EXPORTS, Exported


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """One of `EXPORTS`. Shared: call it, copy its folder, and change neither."""

    @functools.cache
    def of(name: str) -> Exported:
        unet, options = EXPORTS[name]()
        directory = tmp_path_factory.mktemp("export") / "new" / name.replace(" ", "-")
        return Exported(unet, directory, export(unet, directory, progress=False, **options))

    return of


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A tiny pipeline, whose UNet the exports are of."""
    return PIPELINES["text"][0]()
