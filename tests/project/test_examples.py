"""The examples, which users read first."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import sdgraph
from sdgraph.errors import NoChangeError
from sdgraph.testing import check

from ..documents import load
from ..models import answer, build, call_of


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the demo sets it: let go of it afterwards


@pytest.fixture(scope="module")
def custom_pass() -> ModuleType:
    return load("examples/custom_pass.py")


def test_the_custom_pass_claims_what_it_does(custom_pass: ModuleType) -> None:
    check(custom_pass.SubsampleKeys())
    assert sdgraph.parse("SubsampleKeys(4, at_least=64)") == (custom_pass.SubsampleKeys(4, at_least=64),)


@pytest.mark.slow
@pytest.mark.usefixtures("custom_pass")
def test_the_custom_pass_reads_fewer_keys_at_every_size() -> None:
    unet = build(sample_size=16)
    thinned = sdgraph.apply(unet, "SubsampleKeys(2, at_least=256)")
    attentions = [n for n in thinned.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    tokens = {tuple(a.meta["val"].shape[-2] for a in node.args[:2]) for node in attentions}
    assert tokens == {(256, 128), (256, 77), (64, 64), (64, 77)}
    for sizes in ({"H": 8, "W": 8}, {"H": 9, "W": 7, "B": 3}):
        call = call_of(unet, **sizes)
        found, expected = answer(thinned, call), answer(unet, call)
        assert found.shape == expected.shape
        assert not torch.equal(found, expected)
    one = answer(sdgraph.apply(unet, "SubsampleKeys(1, at_least=256)"), call)
    assert torch.allclose(one, expected, rtol=1e-4, atol=1e-5)  # every key is every key
    with pytest.raises(NoChangeError, match="64 tokens are fewer than 4096"):
        sdgraph.apply(build(), "SubsampleKeys")


@pytest.mark.slow
def test_the_custom_pass_runs(custom_pass: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    custom_pass.main()
    out = capsys.readouterr().out
    assert "SubsampleKeys(4)" in out
    assert "1024 tokens are fewer than 4096" in out
    assert "[:, :, ::4]" in out


@pytest.mark.long
def test_the_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    demo = load("examples/demo.py")
    for name, value in {"STEPS": 6, "IMAGES": 4, "SHOWN": 4, "Quality": partial(demo.Quality, references=200)}.items():
        monkeypatch.setattr(demo, name, value)
    demo.main(tmp_path / "made")
    out = capsys.readouterr().out
    assert re.search(r"^traced, no passes .* inf dB", out, re.MULTILINE)
    found = re.findall(
        r"^(pruned|pruned, tuned|tuned, inheriting|the same, ONNX Runtime) .* (\S+) dB", out, re.MULTILINE
    )
    db = {name: float(value) for name, value in found}
    assert db["tuned, inheriting"] == pytest.approx(db["the same, ONNX Runtime"], abs=0.5)
    assert db["pruned"] + 10 < db["pruned, tuned"] < 60
    assert "6 calls: ■ computed □ reused ◪ forecast · not needed" in out
    with Image.open(tmp_path / "made" / "images.png") as image:
        assert image.size == (3 * 64 * 4, 3 * 64 * 6)
        source, traced, pruned, tuned, inheriting, _ = np.split(np.asarray(image), 6)
    assert np.array_equal(source, traced)
    assert all(not np.array_equal(source, other) for other in (pruned, tuned, inheriting))
    for name in ("graph.svg", "graph.png", "graph-before.txt", "graph-after.txt", "unet-onnx/model.onnx"):
        assert (tmp_path / "made" / name).stat().st_size > 0
        assert name.partition("/")[0] in out
    for name in ("tuned/evaluation.png", "traced/evaluation.json"):
        assert (tmp_path / "made" / name).stat().st_size > 0
