"""A run in several processes: the weights are those of one with the whole batch, but for the order of sums."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sdgraph
from sdgraph.tuning import Denoising, Output, Tensors

from ..models import CROSS
from .conftest import Tune, tensors

LOSSES = (Output(), Denoising(weight=0.5))  # means over rows; `Features` is relative within a forward pass
SETTINGS = {"steps": 3, "losses": LOSSES, "train_batch_size": 8, "proportion_empty_prompts": 0.2}
SCRIPT = """
import sys, torch, sdgraph
from diffusers import DDPMScheduler
from sdgraph.tuning import Denoising, Output, Tensors
folder = sys.argv[1]
student, teacher = (sdgraph.GraphUNet.from_pretrained(f"{folder}/{name}") for name in ("student", "teacher"))
kept = torch.load(f"{folder}/data.pt")
data = Tensors(kept["latents"], {"encoder_hidden_states": kept["captions"]}, {"encoder_hidden_states": kept["empty"]})
sdgraph.tune(student, teacher, data, scheduler=DDPMScheduler(), steps=3, out=f"{folder}/run", train_batch_size=4,
             losses=(Output(), Denoising(weight=0.5)), proportion_empty_prompts=0.2, learning_rate=2e-3,
             report_to="none")
"""


def assert_close(found: sdgraph.GraphUNet, expected: sdgraph.GraphUNet, start: sdgraph.GraphUNet) -> None:
    """All weights are close, relative to the way that training has gone."""
    ways = [tensors(unet) for unet in (found, expected, start)]
    far = torch.cat([(ways[1][name] - ways[2][name]).flatten() for name in ways[0]]).norm()
    off = torch.cat([(ways[0][name] - ways[1][name]).flatten() for name in ways[0]]).norm()
    assert far > 0.01
    assert off < 0.01 * far


@pytest.mark.long
def test_two_processes_are_one_with_the_whole_batch(
    tune: Tune, student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(1)
    shapes = {"latents": (10, 4, 8, 8), "captions": (10, 5, CROSS), "empty": (5, CROSS)}
    kept = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    torch.save(kept, tmp_path / "data.pt")
    student.save_pretrained(tmp_path / "student")
    teaching.save_pretrained(tmp_path / "teacher")
    (tmp_path / "script.py").write_text(SCRIPT)
    # as `accelerate launch` starts processes for several GPUs; on a CPU it starts one, or needs MPI
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

    empty = {"encoder_hidden_states": kept["empty"]}
    data = Tensors(kept["latents"], {"encoder_hidden_states": kept["captions"]}, empty)
    one, report = tune(out=tmp_path / "one", data=data, **SETTINGS)
    two = sdgraph.tuning.TuningReport.of(tmp_path / "run")
    assert two.column("loss") == pytest.approx(report.column("loss"), rel=1e-3)
    assert_close(sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "unet"), one, student)
