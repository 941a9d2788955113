"""A run resumes bit for bit, from whatever moment it was stopped at; a run that was changed is not resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler

import sdgraph
from sdgraph import errors
from sdgraph.tuning import Denoising, Output, Tensors
from sdgraph.tuning.train_state import read

from ..models import CROSS, build
from .conftest import Tune, equal, tensors

pytestmark = pytest.mark.slow


@pytest.mark.law("A resumed training run equals an uninterrupted one, bit for bit.")
@pytest.mark.parametrize("use_ema", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(tune: Tune, use_ema: bool, tmp_path: Path) -> None:
    settings = {"use_ema": use_ema, "checkpointing_steps": 2, "random_conditioning": True}
    settings |= {"learning_rates": {"mid_block.**": 0.5, "**.bias": 3}} if use_ema else {}
    settings |= {"proportion_empty_prompts": 0.1, "lr_warmup_steps": 5, "lr_scheduler": "constant_with_warmup"}
    whole, report = tune(max_train_steps=7, output_dir=tmp_path / "whole", **settings)
    tune(max_train_steps=3, output_dir=tmp_path / "parts", **settings)
    resumed, resumed_report = tune(max_train_steps=7, output_dir=tmp_path / "parts", **settings)

    assert equal(tensors(whole), tensors(resumed))
    for name in ("step", "loss", "gradient_norm", "learning_rate"):
        assert list(report.column(name)) == list(resumed_report.column(name)), name


SCRIPT = """
import sys, torch, sdgraph
from diffusers import DDPMScheduler
from sdgraph.tuning import Tensors
torch.set_num_threads(1)
folder, out = sys.argv[1:]
student, teacher = (sdgraph.GraphUNet.from_pretrained(f"{folder}/{name}") for name in ("student", "teacher"))
kept = torch.load(f"{folder}/data.pt")
data = Tensors(kept["latents"], {"encoder_hidden_states": kept["captions"]})
sdgraph.tune(student, teacher, data, scheduler=DDPMScheduler(), max_train_steps=30, output_dir=out, train_batch_size=4,
             learning_rate=2e-3, report_to="none", use_ema=True, checkpointing_steps=1)
"""


@pytest.mark.law("A training run that is killed at any moment continues bit for bit.")
@pytest.mark.long
def test_a_run_that_is_killed_at_any_moment_goes_on_bit_for_bit(
    student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(1)
    kept = {
        name: torch.randn(10, *shape, generator=draw)
        for name, shape in (("latents", (4, 8, 8)), ("captions", (5, CROSS)))
    }
    torch.save(kept, tmp_path / "data.pt")
    student.save_pretrained(tmp_path / "student")
    teaching.save_pretrained(tmp_path / "teacher")

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), str(tmp_path / out)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def reached() -> int:
        return max((int(p.name.partition("-")[2]) for p in (tmp_path / "killed").glob("checkpoint-*")), default=0)

    assert start("whole").wait() == 0
    for moment in (0.0, 0.05, 0.15):  # after a checkpoint appears: in a step, or while the next one is written
        process, before = start("killed"), reached()
        while reached() < before + 2 and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start("killed").wait() == 0
    whole, killed = (sdgraph.GraphUNet.from_pretrained(tmp_path / name / "unet") for name in ("whole", "killed"))
    assert equal(tensors(whole), tensors(killed))
    assert not [p for p in (tmp_path / "killed").iterdir() if p.name.startswith(".checkpoint")]


def test_old_checkpoints_are_deleted(tune: Tune, tmp_path: Path) -> None:
    tune(max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    files = [path for path in (tmp_path / "run" / "checkpoint-5").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}


@pytest.mark.parametrize("resumable", [True, False])
def test_an_interrupt_says_at_which_step_and_how_to_go_on(
    tune: Tune, resumable: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(Output):
        calls = 0

        def __call__(self, *args: Any) -> torch.Tensor:
            Interrupted.calls += 1
            if Interrupted.calls == (3 if resumable else 1):
                raise KeyboardInterrupt
            return super().__call__(*args)

    with pytest.raises(KeyboardInterrupt):
        tune(losses=(Interrupted(),))
    said = caplog.text.partition("stopped after step ")[2]
    if not resumable:
        assert said.startswith("0 of 4; there is no checkpoint yet. The same call")
        return
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert said.startswith(f"2 of 4; {checkpoint} is kept. The same call, or the same command, goes on")
    whole, _ = tune(losses=(Interrupted(),), output_dir=tmp_path / "whole")
    capsys.readouterr()
    resumed, _ = tune(losses=(Interrupted(),))
    assert f"tuning goes on from {checkpoint}, step 2 of 4\n" in capsys.readouterr().err
    assert equal(tensors(whole), tensors(resumed))


TERMINATED = """
import os, signal, sys, torch
from sdgraph.tuning.processes import terminable
try:
    with terminable():
        assert callable(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        torch.zeros(1)
        raise AssertionError("the signal is not heard")
except SystemExit as leaving:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, handler := lambda *_: None)
    with terminable():
        assert signal.getsignal(signal.SIGTERM) is handler
    raise
"""


def test_a_terminated_run_unwinds_unless_its_caller_handles_the_signal() -> None:
    assert subprocess.run([sys.executable, "-c", TERMINATED], check=False).returncode == 143


def test_a_finished_run_returns_its_result_again(tune: Tune) -> None:
    tuned, report = tune()
    again, same = tune()
    assert equal(tensors(tuned), tensors(again))
    assert same.rows == report.rows


def test_a_changed_run_is_not_resumed(tune: Tune, data: Tensors, student: sdgraph.GraphUNet, tmp_path: Path) -> None:
    tune()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(errors.TuningError, match=r"learning_rate=0\.002, and now it is 0\.1"):
        tune(learning_rate=0.1)
    with pytest.raises(errors.TuningError, match="another losses: 'Output"):
        tune(losses=(Output(),))
    with pytest.raises(errors.TuningError, match="another batch: '4' then, '2' now"):
        tune(train_batch_size=2)
    with pytest.raises(errors.TuningError, match="another data"):
        tune(data=Tensors(torch.zeros(3, 4, 8, 8), {"encoder_hidden_states": torch.zeros(3, 5, CROSS)}))
    with pytest.raises(errors.TuningError, match="another teacher"):
        sdgraph.tune(student, build("sd15", seed=1, layers_per_block=2), data, scheduler=DDPMScheduler(),
                     max_train_steps=4,
                     output_dir=tmp_path / "run", train_batch_size=4, learning_rate=2e-3, report_to="none")  # fmt: skip
    with pytest.raises(errors.TuningError, match="checkpoints of another run"):
        tune(resume_from_checkpoint=None)
    with pytest.raises(errors.TuningError, match="there are checkpoint-4"):
        tune(resume_from_checkpoint="checkpoint-3")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_checkpoint_beyond_the_last_step_is_not_passed_off_as_the_result(tune: Tune) -> None:
    tune()
    with pytest.raises(errors.TuningError, match="at step 4, beyond the 3 steps"):
        tune(max_train_steps=3)


def test_a_loss_that_fades_knows_its_end(tune: Tune) -> None:
    tune(losses=[Output(until=0.5), Denoising()])
    with pytest.raises(errors.TuningError, match="max_train_steps=4, and now it is 5"):
        tune(losses=[Output(until=0.5), Denoising()], max_train_steps=5)


def test_a_cosine_knows_its_end(tune: Tune) -> None:
    tune(lr_scheduler="cosine")
    with pytest.raises(errors.TuningError, match="max_train_steps=4, and now it is 5"):
        tune(lr_scheduler="cosine", max_train_steps=5)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tune: Tune, tmp_path: Path) -> None:
    tune(checkpointing_steps=2)
    (tmp_path / "run" / "checkpoint-4" / "state.json").write_text("{")
    with pytest.raises(errors.TuningError, match="is not JSON"):
        tune(checkpointing_steps=2)
    tuned, _ = tune(checkpointing_steps=2, resume_from_checkpoint="checkpoint-2")
    assert isinstance(tuned, sdgraph.GraphUNet)


def test_a_full_disk_loses_nothing(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    write, written = safetensors.torch.save_file, []

    def full(tensors: Any, path: Any, **options: Any) -> None:
        written.append(path)
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(errors.TuningError, match="No space left on device"):
        tune(checkpointing_steps=2)
    assert [p.name for p in sorted((tmp_path / "run").iterdir())] == [".lock", "checkpoint-2", "loss.csv"]
    monkeypatch.undo()
    resumed, _ = tune(checkpointing_steps=2)
    assert equal(tensors(resumed), tensors(tune(output_dir=tmp_path / "other", checkpointing_steps=2)[0]))


@pytest.fixture
def stopped(tune: Tune, tmp_path: Path) -> Path:
    """A run of four steps with checkpoints at two and four."""
    tune(checkpointing_steps=2)
    return tmp_path / "run"


def test_a_checkpoint_is_of_the_step_that_its_name_says(tune: Tune, stopped: Path) -> None:
    copied = shutil.copytree(stopped / "checkpoint-4", stopped / "checkpoint-50")
    with pytest.raises(errors.TuningError, match="of step 4") as refused:
        tune(max_train_steps=6)  # it would go on from there at every start, and newer checkpoints be deleted
    assert "checkpoint-50" in refused.value.where
    copied.rename(stopped / "kept by hand")
    (stopped / "checkpoint-9").mkdir()
    with pytest.raises(errors.TuningError, match="no file") as refused:
        tune(max_train_steps=6)
    assert "delete it" in refused.value.hint


@pytest.mark.parametrize("name", ["step", "seconds", "settings", "identity", "versions", "optimizer", "lr_scheduler"])
@pytest.mark.parametrize("value", [None, "x", 3.5])
def test_records_of_other_types_are_refused(name: str, value: object, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    record = {"format": 1, "step": 4, "seconds": 1.5, "changes": []}
    record |= {part: {} for part in ("settings", "identity", "versions", "optimizer", "lr_scheduler")}
    (folder / "state.json").write_text(json.dumps(record))
    assert read(folder) == record
    if (name, value) == ("seconds", 3.5):
        return
    (folder / "state.json").write_text(json.dumps(record | {name: value}))
    with pytest.raises(errors.TuningError, match=f"it has no {name}"):
        read(folder)


@pytest.mark.parametrize(
    ("change", "words"), [({"format": 2}, "has format 2, and this sdgraph reads format 1"), ({}, "states no format")]
)
def test_checkpoints_of_another_format_are_refused(
    change: dict[str, int], words: str, tune: Tune, tmp_path: Path
) -> None:
    tune(max_train_steps=2)
    state = tmp_path / "run" / "checkpoint-2" / "state.json"
    record = json.loads(state.read_text())
    assert record.pop("format") == 1
    state.write_text(json.dumps(record | change))
    with pytest.raises(errors.TuningError, match=f"state.json {words}") as refused:
        tune(max_train_steps=4)
    assert str(state) in str(refused.value)


def test_a_run_that_goes_back_keeps_what_it_writes(tune: Tune, tmp_path: Path) -> None:
    tune(max_train_steps=8, checkpointing_steps=2, checkpoints_total_limit=4)

    def stop(unet: sdgraph.GraphUNet, step: int) -> dict[str, float]:
        raise KeyboardInterrupt

    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "validation_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        tune(max_train_steps=8, resume_from_checkpoint="checkpoint-2", validate=stop, **settings)
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "blank lines", "other text"])
def test_a_damaged_log_does_not_end_a_run(tune: Tune, stopped: Path, damage: str) -> None:
    log = stopped / "loss.csv"
    text = log.read_text()
    changed = {"empty": "", "cut": text[:-20], "blank lines": text.replace("\n", "\n\n"), "other text": "a\nb\n"}
    log.write_text(changed.get(damage, ""))
    if damage == "gone":
        log.unlink()
    kept = {"cut": [1, 2, 3], "blank lines": [1, 2, 3, 4]}.get(damage, [])
    complete = tune()[1]
    assert list(complete.column("step")) == kept if kept else "gone" in str(complete)
    assert list(tune(max_train_steps=5)[1].column("step")) == [*kept, 5]


def test_a_full_disk_is_said_in_our_words(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(errors.TuningError, match=r"step 4 cannot be written: .*No space left"):
        tune()
    monkeypatch.undo()
    monkeypatch.setattr(sdgraph.GraphUNet, "save_pretrained", full)
    with pytest.raises(errors.TuningError, match="the result cannot be written"):
        tune()
    monkeypatch.undo()
    tune()
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(errors.TuningError, match=r"there can be no such folder|output_dir is"):
            tune(output_dir=tmp_path / name)
