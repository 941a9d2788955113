"""`python -m benchmarks.drop_in`, on tests of a pipeline as diffusers writes its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
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
