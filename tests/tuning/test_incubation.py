"""Stages that are trained apart: found from the graph, refused where they overlap, assembled by weights."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

import sdgraph
from sdgraph import errors
from sdgraph.atomic import owned
from sdgraph.passes import PruneBlocks
from sdgraph.tuning import Images, IncubationReport, Output, Prompts, Tensors, assemble, chain, incubate
from sdgraph.tuning.incubation import changed_blocks
from sdgraph.tuning.random_numbers import generator

from ..models import build
from ..photos import write_photos
from .conftest import equal, tensors

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {
    "scheduler": DDPMScheduler(),
    "train_batch_size": 4,
    "learning_rate": 2e-3,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def deep() -> sdgraph.GraphUNet:
    """A teacher with four levels. Leave it as it is."""
    return sdgraph.GraphUNet(sdgraph.trace(build("sd15-levels")))


@pytest.fixture(scope="module")
def stages(teaching: sdgraph.GraphUNet) -> tuple[PruneBlocks, ...]:
    return PruneBlocks("bk-sdm-base").stages(teaching.graph)


def test_stages_are_blocks_that_share_skips(deep: sdgraph.GraphUNet) -> None:
    def blocks(preset: str) -> list[set[str]]:
        stages = PruneBlocks(preset).stages(deep.graph)
        return [{".".join(path.split(".")[:2]) for path in stage.blocks} for stage in stages]

    assert blocks("bk-sdm-base") == [{f"down_blocks.{i}", f"up_blocks.{3 - i}"} for i in range(4)]
    small = {"down_blocks.3", "mid_block", "up_blocks.0"}  # what is left of the mid block are its neighbours
    assert blocks("bk-sdm-small") == [*blocks("bk-sdm-base")[:3], small]


@pytest.mark.parametrize("preset", ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"])
def test_stages_together_are_the_whole(deep: sdgraph.GraphUNet, preset: str) -> None:
    stages = PruneBlocks(preset).stages(deep.graph)
    together = sdgraph.apply(deep, stages, verify=False)
    assert set(together.graph.removed) == set(sdgraph.apply(deep, [PruneBlocks(preset)], verify=False).graph.removed)
    trained = [block for stage in stages for block in changed_blocks(sdgraph.apply(deep, [stage], verify=False), deep)]
    assert len(trained) == len(set(trained))


def test_a_stage_trains_its_blocks_alone(
    stages: tuple[PruneBlocks, ...], teaching: sdgraph.GraphUNet, data: Tensors, tmp_path: Path
) -> None:
    student = sdgraph.apply(teaching, [stages[0]], verify=False)
    blocks = changed_blocks(student, teaching)
    assert blocks == ("down_blocks.0", "up_blocks.1")
    before = tensors(student)
    tuned, _ = sdgraph.tune(student, teaching, data, max_train_steps=2, output_dir=tmp_path, train=blocks, **OPTIONS)
    for name, weight in tensors(tuned).items():
        assert torch.equal(weight, before[name]) != name.startswith(blocks), name


@pytest.mark.parametrize("progressive", [False, pytest.param(True, marks=pytest.mark.long)])
def test_incubated_stages_are_assembled(
    progressive: bool, stages: tuple[PruneBlocks, ...], teacher: UNet2DConditionModel, data: Tensors, tmp_path: Path
) -> None:
    def run() -> tuple[sdgraph.GraphUNet, IncubationReport]:
        options: dict[str, Any] = {"stage_steps": 3, "max_train_steps": 2, "losses": (Output(),), **OPTIONS}
        return incubate(teacher, stages, data, output_dir=tmp_path, progressive=progressive, **options)

    tuned, report = run()
    student, parts = sdgraph.apply(teacher, stages, verify=False), []
    for number, stage in enumerate(stages, 1):
        blocks = changed_blocks(sdgraph.apply(teacher, [stage], verify=False), sdgraph.apply(teacher, ()))
        parts.append((blocks, sdgraph.GraphUNet.from_pretrained(tmp_path / f"stage-{number}" / "unet")))
    plain, alone = sdgraph.tune(
        assemble(student, parts), teacher, data, max_train_steps=2, output_dir=tmp_path / "alone", losses=(Output(),),
        **OPTIONS,
    )  # fmt: skip
    assert list(report.whole.column("loss")) == list(alone.column("loss"))
    assert equal(tensors(tuned), tensors(plain))
    assert len(report.stages) == len(stages)
    again, _ = run()
    assert equal(tensors(tuned), tensors(again))


@pytest.mark.law("Stages that are trained in several processes equal those of one process.")
@pytest.mark.long
def test_processes_give_what_one_process_gives(
    stages: tuple[PruneBlocks, ...], teacher: UNet2DConditionModel, data: Tensors, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    results = [
        incubate(
            teacher,
            stages,
            data,
            stage_steps=2,
            max_train_steps=1,
            output_dir=tmp_path / str(processes),
            processes=processes,
            **OPTIONS,
        )[0]
        for processes in (1, 2)
    ]
    assert equal(*map(tensors, results))


def test_parts_that_do_not_fit_are_refused(
    teacher: UNet2DConditionModel,
    teaching: sdgraph.GraphUNet,
    student: sdgraph.GraphUNet,
    data: Tensors,
    tmp_path: Path,
) -> None:
    def run(stages: Sequence[Any], data: Tensors = data, **more: Any) -> None:
        incubate(teacher, stages, data, stage_steps=1, max_train_steps=1, output_dir=tmp_path, **{**OPTIONS, **more})

    overlapping = [PruneBlocks("up_blocks.1.resnets.1"), PruneBlocks("up_blocks.1.resnets.2")]
    with pytest.raises(errors.TuningError, match=r"two stages change up_blocks\.1"):
        run(overlapping)
    with pytest.raises(errors.TuningError, match="there is no option"):
        run(["PruneBlocks('mid_block')"], rate=3)
    with pytest.raises(errors.TuningError, match="cannot be trained at the same time"):
        run(["PruneBlocks('mid_block')"], progressive=True, processes=2)
    unpicklable = Tensors(torch.zeros(2, 4, 8, 8), {})
    unpicklable.local = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(errors.TuningError, match="cannot be sent to another process"):
        run(["PruneBlocks('mid_block')"], unpicklable, processes=2)
    unchanged = sdgraph.apply(teaching, [], verify=False)
    with pytest.raises(errors.TuningError, match="changes no block"):
        changed_blocks(unchanged, teaching)
    with pytest.raises(errors.EditError, match=r"down_blocks\.0 is not the same in both"):
        assemble(student, [(("down_blocks.0",), teaching)])
    with pytest.raises(errors.TuningError, match="chain has no passes"):
        chain(teacher, [], data, max_train_steps=1, output_dir=tmp_path)


def test_a_chain_teaches_link_by_link(teacher: UNet2DConditionModel, data: Tensors, tmp_path: Path) -> None:
    links = ["PruneBlocks('mid_block')", PruneBlocks("up_blocks.0.resnets.1")]
    last, reports = chain(teacher, links, data, max_train_steps=2, output_dir=tmp_path, losses=(Output(),), **OPTIONS)
    assert set(last.graph.removed) == {"mid_block", "up_blocks.0.resnets.1"}
    assert [report.output_dir.name for report in reports] == ["link-1", "link-2"]


STAGES = """
import sys, torch, sdgraph
from diffusers import DDPMScheduler
from sdgraph.passes import PruneBlocks
from sdgraph.tuning import Tensors, incubate
if __name__ == "__main__":
    torch.set_num_threads(1)
    teacher = sdgraph.GraphUNet.from_pretrained(sys.argv[1])
    data = Tensors(torch.randn(4, 4, 8, 8), {"encoder_hidden_states": torch.randn(4, 5, 24)})
    incubate(teacher, PruneBlocks("bk-sdm-base").stages(teacher.graph), data, scheduler=DDPMScheduler(),
             max_train_steps=1,
             stage_steps=10**6, output_dir=sys.argv[2], processes=2, train_batch_size=1, report_to="none")
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="it knows one way to end a process")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_of_stages_end_with_the_one_that_started_them(
    number: signal.Signals, teaching: sdgraph.GraphUNet, tmp_path: Path
) -> None:
    def steps() -> list[int]:
        logs = [tmp_path / "run" / f"stage-{number}" / "loss.csv" for number in (1, 2)]
        return [log.read_text().count("\n") if log.exists() else 0 for log in logs]

    teaching.save_pretrained(tmp_path / "teacher")
    (tmp_path / "script.py").write_text(STAGES)
    command = [sys.executable, "-W", "ignore", *(str(tmp_path / name) for name in ("script.py", "teacher", "run"))]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as parent:
        while min(steps()) < 3 and parent.poll() is None:
            time.sleep(0.05)
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) >= 2
        parent.send_signal(number)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    for stage in ("stage-1", "stage-2"):
        with owned(tmp_path / "run" / stage, errors.TuningError, "output_dir"):
            kept = bool(list((tmp_path / "run" / stage).glob("checkpoint-*")))
            assert kept == (number == signal.SIGINT)  # the others leave no time for it


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_after_an_error_in_a_stage_no_other_begins(
    processes: int, deep: sdgraph.GraphUNet, data: Tensors, tmp_path: Path
) -> None:
    stages = PruneBlocks("bk-sdm-base").stages(deep.graph)
    (tmp_path / "stage-1" / "checkpoint-9").mkdir(parents=True)  # from which nothing can go on
    run: dict[str, Any] = {"stage_steps": 10**6, "max_train_steps": 1, "processes": processes}
    with pytest.raises(
        errors.TuningError, match=r"stage-1 failed, which trains down_blocks\.0, up_blocks\.3: "
    ) as error:
        incubate(deep, stages, data, output_dir=tmp_path, **run, **OPTIONS)
    assert "the same call goes on" in str(error.value)
    begun = {path.name for path in tmp_path.glob("stage-?") if any(path.glob("loss.csv"))}
    assert len(stages) == 4
    assert begun <= {"stage-2"}
    assert processes == 2 or not begun


def test_encoded_data_are_sent_to_processes(pipe: Any, tmp_path: Path) -> None:
    images = Images(write_photos(tmp_path / "photos"), pipe, resolution=16, cache=tmp_path / "cache")
    call: dict[str, Any] = {"num_inference_steps": 2, "calls_per_prompt": 1, "height": 16, "width": 16}
    for source in (images, Prompts(["a red circle"], pipe, cache=tmp_path / "calls", **call)):
        other = pickle.loads(pickle.dumps(source))
        assert other.fingerprint() == source.fingerprint()
        draws = [[generator(0, "row", 0)] for _ in range(2)]
        assert torch.equal(other.samples([0], draws[0]).latents, source.samples([0], draws[1]).latents)
