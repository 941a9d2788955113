"""What users read first: the examples and the benchmark."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import sdgraph
from sdgraph.errors import NoChangeError
from sdgraph.testing import check

from .models import answer, build, call_of

ROOT = Path(__file__).parent.parent


def load(path: str) -> ModuleType:
    """A script as a module."""
    name = "tested_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the demo sets it: let go of it afterwards


# -- examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def custom_pass() -> ModuleType:
    return load("examples/custom_pass.py")


def test_the_custom_pass_claims_what_it_does(custom_pass: ModuleType) -> None:
    check(custom_pass.SubsampleKeys())
    assert sdgraph.parse("SubsampleKeys(4, at_least=64)") == (custom_pass.SubsampleKeys(4, at_least=64),)


def test_the_custom_pass_reads_fewer_keys_at_every_size(custom_pass: ModuleType) -> None:
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


def test_the_custom_pass_runs(custom_pass: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    custom_pass.main()
    out = capsys.readouterr().out
    assert "SubsampleKeys(4)" in out
    assert "1024 tokens are fewer than 4096" in out
    assert "[:, :, ::4]" in out


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    demo = load("examples/demo.py")
    for name, value in {"STEPS": 3, "IMAGES": 8}.items():
        monkeypatch.setattr(demo, name, value)
    demo.main(tmp_path / "made")
    out = capsys.readouterr().out
    assert re.search(r"^traced, no passes .* inf dB", out, re.MULTILINE)
    dbs = {
        name: float(re.search(rf"^{name} .* (\S+) dB", out, re.MULTILINE)[1])
        for name in ("pruned", "pruned, ONNX Runtime")
    }  # type: ignore[index]
    assert dbs["pruned"] == pytest.approx(dbs["pruned, ONNX Runtime"], abs=0.5)
    assert dbs["pruned"] < 60
    assert "3 calls: ■ refreshed □ inherited · not needed" in out
    with Image.open(tmp_path / "made" / "images.png") as image:
        assert image.size == (3 * 64 * 8, 3 * 64 * 5)
        source, traced, pruned, _, inheriting = np.split(np.asarray(image), 5)
    assert np.array_equal(source, traced)
    assert not np.array_equal(source, pruned)
    assert not np.array_equal(source, inheriting)
    for name in ("graph.svg", "graph.png", "graph-before.txt", "graph-after.txt", "unet-onnx/model.onnx"):
        assert (tmp_path / "made" / name).stat().st_size > 0
        assert name.partition("/")[0] in out
    for name in ("pruned/evaluation.png", "traced/evaluation.json"):
        assert (tmp_path / "made" / name).stat().st_size > 0


# -- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "docs/deploying.md", "docs/measurements.md"])
def test_the_figures_in_documents_are_the_results(name: str) -> None:
    table, document = load("benchmarks/table.py"), (ROOT / name).read_text()
    blocks = list(table.MARKED.finditer(document))
    assert blocks
    for block in blocks:
        assert table.filled(document, ROOT / block["file"]) == document


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    script, out = ROOT / "benchmarks" / "overhead.py", tmp_path / "result.json"
    cases = [
        "forward/tiny/16",
        "apply/tiny",
        "prune/tiny/16",
        "inherit/tiny/16",
        "experts/tiny/16",
        "attention/tiny/16",
    ]
    run = subprocess.run(
        [sys.executable, str(script), "--quick", "--seconds", "0.1", "--out", str(out), *cases],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    forward, apply, prune, inherit, experts, attention = result["cases"]
    assert forward["largest_difference"] == 0
    assert len(forward["samples"]["eager"]) == len(forward["samples"]["traced"]) >= 3
    assert apply["not_shared_bytes"] == 0
    macs = [prune["sizes"][name]["macs"] for name in ("traced", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")]
    assert macs == sorted(macs, reverse=True)
    assert set(inherit["largest_difference"].values()) == {0}
    assert all(inherit["kept_bytes"][name] > 0 for name in inherit["timetables"])
    assert experts["sizes"]["timestep"]["parameters"] > experts["sizes"]["plain"]["parameters"]
    assert set(attention["alone"]) == set(attention["samples"]) == {"full", "window 8, pool 4"}
    assert load("benchmarks/table.py").report(result) in run.stdout
    assert "smoke test" in run.stdout


@pytest.mark.full
@pytest.mark.parametrize(("kind", "ways"), [("inheritance", "searched, forecast"), ("attention", "tomesd, ratio 0.5")])
def test_quality_against_time_is_measured(kind: str, ways: str, tmp_path: Path) -> None:
    script, out = ROOT / "benchmarks" / "frontier.py", tmp_path / "result.json"
    run = subprocess.run(
        [sys.executable, str(script), kind, "--quick", "--folder", str(tmp_path / "search"), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(out.read_text())["ways"]
    assert any(ways in name for name in figures)
    whole = figures.pop("all steps")
    assert whole["psnr"] is None  # the same images
    assert all(10 < each["psnr"] < 100 and each["frechet"] > 0 for each in figures.values())
    assert out.with_suffix(".svg").read_text().startswith("<?xml")


@pytest.mark.full
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    """So that nothing is found broken on the day that there is a GPU."""
    script, out = ROOT / "benchmarks" / "gpu.py", tmp_path / "result.json"
    run = subprocess.run(
        [sys.executable, str(script), "--device", "cpu", "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (case,) = json.loads(out.read_text())["cases"]
    assert not {name: way["failed"] for name, way in case["ways"].items() if "failed" in way}
    inheriting = [
        way["difference"]["4"] for name, way in case["ways"].items() if "inherit" in name or "DeepCache" in name
    ]
    whole = [
        way["difference"]["4"] for name, way in case["ways"].items() if not ("inherit" in name or "DeepCache" in name)
    ]
    assert max(whole) < 1e-3 < min(inheriting)
    assert "no CUDA graphs" in run.stderr  # it says why
