"""`python -m benchmarks.drop_in`, on tests of a pipeline as diffusers writes its own."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..documents import ROOT

SUITE = """
import unittest

import torch
from scenes import models


class PipelineFastTests(unittest.TestCase):
    def get_dummy_components(self):
        tokenizer = models.tokenizer()
        pipe = models.pipeline(tokenizer, models.text_encoder(tokenizer), models.vae(), models.unet())
        return {**pipe.components, "unet": pipe.unet.train()}

    def generate(self, change=1.0, **options):
        components = self.get_dummy_components()
        if change != 1.0 and type(components["unet"]).__name__ == "GraphUNet":
            next(components["unet"].parameters()).data.mul_(change)
        pipe = models.pipeline(*(components[name] for name in ("tokenizer", "text_encoder", "vae", "unet")))
        generator = torch.Generator().manual_seed(0)
        pipe("a red square", num_inference_steps=1, output_type="latent", generator=generator, **options)

    def test_the_same(self):
        self.generate()

    def test_refused(self):
        self.generate(cross_attention_kwargs={"ip_adapter_masks": []})

    def test_other_numbers(self):
        self.generate(change=1.5)

    def test_fails_with_both(self):
        self.fail("in any case")

    @unittest.skip("needs more")
    def test_skipped(self):
        pass
"""


@pytest.mark.long
def test_tests_are_compared_by_outcome_and_by_every_bit(tmp_path: Path) -> None:
    suite = tmp_path / "tests" / "pipelines" / "small"
    suite.mkdir(parents=True)
    (suite / "test_small.py").write_text(SUITE)
    out = tmp_path / "outcomes.json"
    command = ["-m", "benchmarks.drop_in", tmp_path, "--suites", "small", "--modes", "traced", "--draft", "--out", out]
    run = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT / "examples")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    table = run.stdout[run.stdout.index("diffusers ") :]
    assert "4 tests, 1 fail with diffusers' UNet" in table
    assert (
        "traced: 1 fail only with ours, 0 only with diffusers'; 1 of 2 that pass with both give other numbers" in table
    )
    assert "1  refused  CallError: cross_attention_kwargs['ip_adapter_masks'] is not covered" in table
    assert "DIFFERS  tests/pipelines/small/test_small.py::PipelineFastTests::test_other_numbers" in table
    small = json.loads(out.read_text())["modes"]["traced"]["small"]
    assert (small["tests"], small["fail with diffusers' own"], small["pass with both"]) == (4, 1, 2)
    (refused,) = small["fail only with ours"].values()
    assert refused["refusal"]
    assert len(small["of these, other numbers"]) == 1


def test_outcomes_are_compared_by_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    drop_in = importlib.import_module("benchmarks.drop_in")

    def test(outcome: str, outputs: str = "", cause: str = "", refusal: bool = False) -> dict[str, Any]:
        return {"outcome": outcome, "cause": cause, "refusal": refusal, "outputs": outputs}

    names = [
        f"tests/pipelines/small/test_small.py::{name}" for name in ("same", "other", "refused", "fails", "skipped")
    ]
    own = [test("passed", "a"), test("passed", "b"), test("passed", "c"), test("failed"), test("skipped")]
    ours = [test("passed", "a"), test("passed", "x"), test("failed", "", "CallError: no", True), test("passed"),
            test("skipped")]  # fmt: skip
    outcomes = {drop_in.OWN: dict(zip(names, own, strict=True)), "traced": dict(zip(names, ours, strict=True))}
    table = drop_in.table(outcomes)
    assert "4 tests, 1 fail with diffusers' UNet" in table
    assert (
        "traced: 1 fail only with ours, 1 only with diffusers'; 1 of 2 that pass with both give other numbers" in table
    )
    assert "1  refused  CallError: no" in table
    assert f"DIFFERS  {names[1]}" in table
    assert drop_in.summary(outcomes, ["small"]) == {
        "traced": {
            "small": {
                "tests": 4,
                "fail with diffusers' own": 1,
                "fail only with ours": {names[2]: {"cause": "CallError: no", "refusal": True}},
                "pass with both": 2,
                "of these, other numbers": [names[1]],
            }
        }
    }
