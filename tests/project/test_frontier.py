"""The frontier: its solvers, its published methods, its margins, and that it goes on where it was stopped."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from sdgraph.schedules import SamplingRun

from ..documents import ROOT

SCENES = DDIMScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction", steps_offset=1
).config


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # as `python -m` does


def module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.measuring.{name}")


def test_ten_steps_of_ays_are_the_published_ones() -> None:
    scheduler = module("solvers").SOLVERS["AYS"](SCENES)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == pytest.approx([999, 850, 736, 645, 545, 455, 343, 233, 124, 24], abs=1)
    for steps in (5, 50):
        scheduler.set_timesteps(steps)
        assert len(set(scheduler.timesteps.tolist())) == steps


def test_every_solver_begins_at_pure_noise() -> None:
    for name, solver in module("solvers").SOLVERS.items():
        scheduler = solver(SCENES)
        scheduler.set_timesteps(10)
        assert (float(scheduler.timesteps[0]) == 999) == (name != "DDIM of the model")


def test_spectrum_refreshes_as_often_as_published() -> None:
    published = module("published")
    assert len(published.GrowingWindow().calls(SamplingRun(50))) == 14
    assert len(published.GrowingWindow(growth=3.0).calls(SamplingRun(50))) == 10
    assert published.GrowingWindow().calls(SamplingRun(20)) == (0, 1, 2, 3, 4, 6, 8, 11, 15)


def test_spectrums_forecast_is_a_regression_and_a_line() -> None:
    published = module("published")
    known, call = (0, 1, 2, 3, 4, 6), 7
    exact = published.Chebyshev(ridge=1e-9, line=0.0, calls=8).weights(known, call, SamplingRun(20))
    values = [number**4 - 3 * number for number in known]
    assert np.dot(exact, values) == pytest.approx(call**4 - 3 * call, rel=1e-3)
    line = published.Chebyshev(line=1.0).weights(known, call, SamplingRun(20))
    assert line == pytest.approx((0, 0, 0, 0, -0.5, 1.5))


class _OneImage(torch.nn.Module):
    """The exact UNet of data that is one image: a line leads from every noise to it."""

    dtype, device, config = torch.float64, torch.device("cpu"), None

    def __init__(self, image: torch.Tensor, levels: Any) -> None:
        super().__init__()
        self.image, self.levels, self.calls = image, levels, 0

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        self.calls += 1
        alpha, sigma, _ = self.levels(timestep)
        noise = (sample - alpha * self.image) / sigma
        return (alpha * noise - sigma * self.image,)


@pytest.mark.parametrize("skipped", [(), (12,), (12, 13)])
def test_sada_skips_calls_and_predicts_the_next_latents(skipped: tuple[int, ...]) -> None:
    published, solvers = module("published"), module("solvers")
    scheduler = solvers.SOLVERS["DPM++ 2M"](SCENES)
    scheduler.set_timesteps(20)
    torch.manual_seed(0)
    image, latents = torch.randn(1, 4, 4, 4).double(), torch.randn(1, 4, 4, 4).double()
    unet = _OneImage(image, lambda timestep: sada._levels(timestep))
    sada = published.Sada(unet, SimpleNamespace(scheduler=scheduler))
    sada._skips = lambda latents: sada.call in skipped
    before = latents
    for number, timestep in enumerate(scheduler.timesteps):
        if number in (12, 13, 14):
            assert (sada.expected - latents).abs().mean() < 0.05 < (latents - before).abs().mean()
        before = latents
        output = sada(torch.cat([latents, latents]), timestep)[0]
        latents = scheduler.step(output.chunk(2)[0], timestep, latents, return_dict=False)[0]
    assert unet.calls == 20 - len(skipped)
    assert (latents - image).abs().max() < 0.02


def test_sada_computes_the_first_calls_and_the_last() -> None:
    published = module("published")
    unet = SimpleNamespace(config=None, dtype=None, device=None)
    sada = published.Sada(unet, None)
    sada.expected = torch.zeros(1)
    sada.slopes.extend([torch.zeros(1), torch.zeros(1), torch.ones(1)])
    against = -torch.ones(1)
    for call, in_a_row, skips in ((9, 0, False), (10, 0, True), (23, 3, True), (23, 4, False), (24, 0, False)):
        sada.call, sada.in_a_row = call, in_a_row
        assert sada._skips(against) is skips
        assert not sada._skips(-against)


def _figures(**methods: tuple[str, str, float, float | None]) -> dict[str, dict[str, Any]]:
    keys = ("kind", "solver", "time", "psnr")
    return {name: {**dict(zip(keys, method, strict=True)), "unit": "b"} for name, method in methods.items()}


def test_a_margin_is_over_the_best_plain_solver_at_that_time() -> None:
    pareto = module("pareto")
    methods = _figures(
        a=("plain", "one", 0.5, 40.0),
        b=("plain", "one", 1.0, 60.0),
        c=("plain", "other", 0.6, 47.0),
        d=("plain", "other", 0.9, 50.0),
        mine=("ours", "one", 0.6, 49.0),
        slow=("ours", "one", 1.5, 70.0),
        equal=("ours", "one", 0.6, None),
    )
    assert pareto.margin(methods, "mine", "psnr") == pytest.approx(49 - 47)  # the one solver has 44 there
    methods["mine"]["time"] = 0.9
    assert pareto.margin(methods, "mine", "psnr") == pytest.approx(49 - 56)
    assert [pareto.margin(methods, name, "psnr") for name in ("a", "slow", "equal")] == [None] * 3


def test_the_front_is_what_no_method_beats() -> None:
    pareto = module("pareto")
    methods = _figures(
        a=("plain", "one", 0.5, 40.0),
        b=("ours", "one", 0.6, 39.0),
        c=("ours", "one", 0.7, 50.0),
        d=("reference", "one", 0.1, None),
        e=("ours", "one", 0.2, 99.0),
    )
    methods["e"]["unit"] = "another runtime's"
    assert pareto.front(methods, "psnr") == ["a", "c"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "name"),
    [("plans", "fitted 2"), ("inheritance", "searched, forecast"), ("attention", "tomesd, ratio 0.5")],
)
def test_quality_against_time_is_measured_and_goes_on(kind: str, name: str, tmp_path: Path) -> None:
    out, folder = tmp_path / "result.json", tmp_path / "kept"
    command = [sys.executable, "-m", "benchmarks.frontier", kind, "--quick", "--folder", str(folder)]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        words = [*command, "--out", str(out), *options]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    first = run()
    assert first.returncode == 0, first.stderr
    result = json.loads(out.read_text())
    assert any(name in method for method in result["methods"])
    assert result["methods"][result["reference"]]["psnr"] is None  # the same images
    nearness = [method["psnr"] for method in result["methods"].values() if method["psnr"] is not None]
    assert all(0 < psnr < 120 for psnr in nearness)
    assert out.with_suffix(".svg").read_text().startswith("<?xml")
    assert len(list((folder / "worst").glob("*.png"))) == len(result["methods"]) - 1

    *others, lost = sorted((folder / "images").rglob("*.npz"), key=lambda file: file.stat().st_mtime_ns)
    written = [file.stat().st_mtime_ns for file in others]
    lost.unlink()
    assert run("--complete").returncode == 0
    assert len(json.loads(out.read_text())["methods"]) == len(result["methods"]) - 1
    assert not lost.exists()
    assert run().returncode == 0
    assert lost.exists()
    assert [file.stat().st_mtime_ns for file in others] == written  # only what was lost is generated again
