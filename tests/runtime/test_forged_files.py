"""Whatever the files of a folder or a bundle hold, reading them works or raises our error, soon."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdgraph.errors import SavedError, SdgraphError
from sdgraph.exporters.bundle.manifest_file import digest, read_manifest
from sdgraph.ir.dims import evaluate
from sdgraph.runtime.recipe import read_recipe
from sdgraph.spec import read
from sdgraph.untrusted import read_config

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 10**30, 1e300, "", "x", "../x", "H" * 5000, "1<<999999999", "(" * 500, [], {}, [[]]]),
    st.recursive(st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
)


def mutated(plain: Any, data: st.DataObject) -> Any:
    """A copy in which one place holds something else, or nothing."""
    plain = copy.deepcopy(plain)
    inner, steps = plain, data.draw(st.integers(1, 4))
    for step in range(steps):
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if step == steps - 1 or not isinstance(inner[key], dict | list):
            if data.draw(st.integers(0, 4)) == 0:
                del inner[key]
            else:
                inner[key] = data.draw(JUNK)
            break
        inner = inner[key]
    return plain


def forged(folder: Path, name: str, data: st.DataObject, read: Callable[[], Any], digest: Any = None) -> None:
    """Whatever a file holds, reading it either works or raises our error, and calls few functions."""
    kept = (folder / name).read_text()
    try:
        plain = mutated(json.loads(kept), data)
        if digest is not None:
            plain.pop("sha256", None)
            plain["sha256"] = digest(plain)
        (folder / name).write_text(json.dumps(plain))
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            with contextlib.suppress(SavedError):
                read()
        finally:
            sys.setprofile(None)
        assert calls < 1_000_000
    finally:
        (folder / name).write_text(kept)


@pytest.mark.law("A saved folder with any content is loaded or refused with an error of sdgraph.")
@given(data=st.data())
@settings(max_examples=200)
def test_forged_recipes(saved: Path, data: st.DataObject) -> None:
    forged(saved, "sdgraph.json", data, functools.partial(read_recipe, saved))


@given(data=st.data())
@settings(max_examples=200)
def test_forged_configurations(saved: Path, data: st.DataObject) -> None:
    forged(saved, "config.json", data, functools.partial(read_config, saved / "config.json", "save again"))


@pytest.mark.law("A bundle with any manifest is loaded or refused with an error of sdgraph.")
@given(data=st.data())
@settings(max_examples=400)
def test_forged_manifests(bundle: Path, data: st.DataObject) -> None:
    """Guards that are read can be asked for the sizes of a call, which are refused or not."""
    flat = {
        "sample": torch.zeros(2, 2, 8, 12),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(2, 5, 24),
    }

    def read() -> None:
        manifest = read_manifest(bundle)
        with contextlib.suppress(SdgraphError):
            sizes = manifest.check(flat)
            for model in manifest.variants:
                for spec in (*manifest.session_inputs(model), *manifest.session_outputs(model)):
                    for dim in spec.shape or ():
                        assert isinstance(dim if isinstance(dim, int) else evaluate(dim, sizes), int)

    forged(bundle, "sdgraph.json", data, read, digest)


@pytest.mark.parametrize("power", [1e300, 1, "x"])
def test_a_schedule_that_would_never_end_is_refused(power: Any) -> None:
    with pytest.raises(SdgraphError):
        read(f"DenseEarly(2, power={power!r})")
