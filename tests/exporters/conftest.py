"""Exports by name, each made once per session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from sdgraph.errors import SdgraphError
from sdgraph.exporters.onnx import export
from sdgraph.exporters.ort import providers

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


@pytest.fixture(params=[providers.CPU, providers.OPENVINO])
def provider(request: pytest.FixtureRequest) -> str:
    """The name of a provider of the CPU; what holds for bundles holds on all of them."""
    try:
        providers.choose(request.param, None, None, "float32")
    except SdgraphError as error:
        pytest.skip(error.what)
    return str(request.param)
