"""A run in several processes: the weights are those of one with the whole batch, but for the order of sums."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sdgraph
from sdgraph.errors import TuningError
from sdgraph.tuning import AttentionMaps, Denoising, Features, Output, Similarity, Tensors, Wavelet

from ..models import CROSS
from .conftest import Tune, equal, tensors

LOSSES = (Output(), Denoising(weight=0.5), Features(), AttentionMaps(), Similarity(group=2), Wavelet())
SETTINGS = {"losses": LOSSES, "train_batch_size": 8, "proportion_empty_prompts": 0.2, "use_ema": True}
SCRIPT = """
import sys, torch, sdgraph
from diffusers import DDPMScheduler
from sdgraph.tuning import AttentionMaps, Denoising, Features, Output, Similarity, Tensors, Wavelet, fsdp
folder, *stops = sys.argv[1:]
fsdp.LARGE = 1000

def spread(model, unet, cut=fsdp.shard):
    whole = sum(p.numel() for p in unet.parameters())
    cut(model, unet)
    share = sum(p.to_local().numel() for p in unet.parameters()) / whole
    print(f"spread {share}\\n", end="", flush=True)  # in one piece, because two processes write

fsdp.shard = spread
student, teacher = (sdgraph.GraphUNet.from_pretrained(f"{folder}/{name}") for name in ("student", "teacher"))
kept = torch.load(f"{folder}/data.pt")
data = Tensors(kept["latents"], {"encoder_hidden_states": kept["captions"]}, {"encoder_hidden_states": kept["empty"]})
for stop in stops:
    tuned, _ = sdgraph.tune(
        student, teacher, data, scheduler=DDPMScheduler(), max_train_steps=int(stop), output_dir=f"{folder}/run",
        train_batch_size=2,
        gradient_accumulation_steps=2, gradient_checkpointing=True,
        losses=LOSSES, proportion_empty_prompts=0.2, learning_rate=2e-3, use_ema=True,
        checkpointing_steps=1, report_to="none", validate=lambda unet, _: {"norm": unet.conv_in.weight.norm().item()},
    )
    print(f"norm {tuned.conv_in.weight.norm().item()}\\n", end="", flush=True)
""".replace("LOSSES", f"({', '.join(map(str, LOSSES))})")


def assert_close(found: sdgraph.GraphUNet, expected: sdgraph.GraphUNet, start: sdgraph.GraphUNet) -> None:
    """All weights are close, relative to the way that training has gone."""
    ways = [tensors(unet) for unet in (found, expected, start)]
    far = torch.cat([(ways[1][name] - ways[2][name]).flatten() for name in ways[0]]).norm()
    off = torch.cat([(ways[0][name] - ways[1][name]).flatten() for name in ways[0]]).norm()
    assert far > 0.01
    assert off < 0.01 * far


@pytest.fixture
def kept(student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The data, which are written for `SCRIPT` as the models are."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"latents": (10, 4, 8, 8), "captions": (10, 5, CROSS), "empty": (5, CROSS)}
    kept = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    torch.save(kept, tmp_path / "data.pt")
    student.save_pretrained(tmp_path / "student")
    teaching.save_pretrained(tmp_path / "teacher")
    (tmp_path / "script.py").write_text(SCRIPT)
    return kept


def launched(folder: Path, *stops: int, **environment: str) -> str:
    """Run the script in two processes, as `accelerate launch` starts them for two GPUs; on CPUs it needs MPI."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(folder / "script.py"), str(folder), *map(str, stops)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.law("Two training processes equal one with the whole batch.")
@pytest.mark.long
@pytest.mark.parametrize("spread", [False, True], ids=["whole", "spread"])
def test_two_processes_are_one_with_the_whole_batch(
    spread: bool, kept: dict[str, torch.Tensor], tune: Tune, student: sdgraph.GraphUNet, tmp_path: Path
) -> None:
    said = launched(tmp_path, 2, 3, ACCELERATE_USE_FSDP=str(spread))  # resumed after two steps
    shares = [float(line.split()[1]) for line in said.splitlines() if line.startswith("spread")]
    assert shares == (pytest.approx([0.5] * 4, abs=0.05) if spread else [])

    empty = {"encoder_hidden_states": kept["empty"]}
    data = Tensors(kept["latents"], {"encoder_hidden_states": kept["captions"]}, empty)
    one, report = tune(output_dir=tmp_path / "one", data=data, max_train_steps=3, **SETTINGS)
    two = sdgraph.tuning.TuningReport.of(tmp_path / "run")
    assert two.column("loss") == pytest.approx(report.column("loss"), rel=1e-3)
    written = sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "unet")
    assert_close(written, one, student)
    norms = [float(line.split()[1]) for line in said.splitlines() if line.startswith("norm")]
    assert norms[2:] == pytest.approx([written.conv_in.weight.norm().item()] * 2)  # both return what is written
    for name in ("unet", "unet_ema"):
        checkpoints = [folder / "checkpoint-3" / name for folder in (tmp_path / "run", tmp_path / "one")]
        assert_close(*map(sdgraph.GraphUNet.from_pretrained, checkpoints), student)


@pytest.mark.long
def test_one_process_has_nothing_to_spread(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = tune(output_dir=tmp_path / "plain", max_train_steps=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    asked, _ = tune(output_dir=tmp_path / "asked", max_train_steps=2)
    assert equal(tensors(asked), tensors(plain))


@pytest.mark.long
def test_spread_weights_are_not_kept_in_the_memory_of_the_cpu(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(TuningError, match="memory of the CPU"):
        tune(output_dir=tmp_path)
