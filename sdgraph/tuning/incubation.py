"""Runs of several trainings: incubation trains the stages of a student apart, a chain prunes and tunes in turns."""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
import signal
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..compiler.passes import Pass, as_passes
from ..errors import SdgraphError, TuningError
from ..options import Bounds, Count, Text, checked
from ..runtime.apply import apply
from ..runtime.unet import GraphUNet
from .checks import check_output
from .losses import Features, Loss, Output
from .processes import alone, begin_worker
from .report import TuningReport
from .settings import Settings
from .sources import Source, as_source
from .tune import tune
from .validation import Validate


@dataclass(frozen=True)
class IncubationReport:
    """The logs of an incubation.

    Args:
        stages: the logs of the stages, in order.
        whole: the log of the tuning of the assembled student.
    Example:
        `print(report)` after `tuned, report = sdgraph.tuning.incubate(...)`
    """

    stages: tuple[TuningReport, ...]
    whole: TuningReport

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.stages, self.whole)))


@checked(TuningError, options=Settings.check_names)
def incubate(
    teacher: GraphUNet | UNet2DConditionModel,
    stages: Annotated[Sequence[Pass | str], Bounds(length=1)],
    data: Source | Iterable[Mapping[str, Tensor]],
    *,
    scheduler: Any,
    stage_steps: Count,
    max_train_steps: Count | None = None,
    output_dir: Text | Path,
    losses: Annotated[Sequence[Loss], Bounds(length=1)] | None = None,
    validate: Validate | None = None,
    progressive: bool = False,
    processes: Count = 1,
    **settings: Any,
) -> tuple[GraphUNet, IncubationReport]:
    """Train the stages of a student inside its teacher, assemble them, and tune the whole.

    A stage is a pass that changes some blocks. Its blocks are trained while all others are the teacher's and stay as
    they are, on the teacher's output through the rest of the teacher, and on the features of the blocks themselves.
    Stages do not depend on each other, so they may run at the same time. Every stage, and the tuning, is a resumable
    run of `sdgraph.tune` in a separate folder.

    Args:
        teacher: the UNet to learn from.
        stages: the passes, whose changes lie in different blocks, such as `PruneBlocks("bk-sdm-base").stages(graph)`.
        data: the latents and conditions, as for `sdgraph.tune`.
        scheduler: the diffusers scheduler, as for `sdgraph.tune`.
        stage_steps: the number of optimizer steps of every stage.
        max_train_steps: the number of optimizer steps of the assembled student; alternatively `num_train_epochs`.
        output_dir: the folder of all runs: `stage-1/`, `stage-2/`, ... and `whole/`.
        losses: the terms that the assembled student minimises, as for `sdgraph.tune`.
        validate: the validation of the assembled student, as for `sdgraph.tune`.
        progressive: train a stage inside the teacher with all earlier stages in place, one after the other.
        processes: the number of stages that are trained at the same time, in separate processes. The data must then be
            picklable.
        settings: further options, those of `sdgraph.tuning.Settings`.
    Returns:
        The tuned student in evaluation mode, and the logs of all runs.
    Raises:
        TuningError: two stages change the same block, or a stage changes nothing that could be trained; or stages are
            to be trained both one after the other and at the same time.
    Example:
        ```python
        stages = PruneBlocks("bk-sdm-base").stages(sdgraph.trace(pipe.unet))
        tuned, report = sdgraph.tuning.incubate(
            pipe.unet, stages, data, scheduler=pipe.scheduler, stage_steps=1000, max_train_steps=2000,
            output_dir="incubated",
        )
        ```
    Source:
        Ni et al., "Deep Incubation: Training Large Models by Divide-and-Conquering", 2023; A-SDM, model assembly. The
        frozen teacher in the place of their meta model is our decision.
    """
    of_stages = {name: value for name, value in settings.items() if name != "num_train_epochs"}
    Settings.of({"max_train_steps": max_train_steps, **settings})
    Settings.of({"max_train_steps": stage_steps, **of_stages})
    if progressive and processes > 1:
        raise TuningError(
            "stages that are trained one after the other cannot be trained at the same time",
            where="progressive, processes",
            hint="leave one of them out",
        )
    folder, source = Path(output_dir), as_source(data)
    check_output(folder, [teacher], source)
    frozen_teacher = apply(teacher, (), verify=False)
    passes = [as_passes(stage) for stage in stages]
    begun = [apply(frozen_teacher, stage, verify=False) for stage in passes]
    trained = [changed_blocks(student, frozen_teacher) for student in begun]
    _check_apart(trained, passes)
    with alone(folder):
        jobs = [
            Job(folder / f"stage-{number}", blocks, stage_steps, {"scheduler": scheduler, **of_stages})
            for number, blocks in enumerate(trained, 1)
        ]
        student = apply(frozen_teacher, [p for stage in passes for p in stage], verify=False)
        tuned: list[tuple[tuple[str, ...], GraphUNet]] = []
        if processes > 1:
            frozen_teacher.save_pretrained(folder / "teacher")
            _run_apart(jobs, begun, folder / "teacher", source, processes)
            tuned = [(job.blocks, GraphUNet.from_pretrained(job.output_dir / "unet")) for job in jobs]
        else:
            for number, job in enumerate(jobs):
                first = begun[number]
                if progressive:
                    earlier = [p for stage in passes[: number + 1] for p in stage]
                    first = assemble(apply(frozen_teacher, earlier, verify=False), tuned)
                tuned.append((job.blocks, job.run(first, frozen_teacher, source)))
        whole = assemble(student, tuned)
        options = {"scheduler": scheduler, "losses": losses, "validate": validate, **settings}
        run = {"max_train_steps": max_train_steps, "output_dir": folder / "whole", **options}
        result, report = tune(whole, frozen_teacher, source, **run)
        return result, IncubationReport(tuple(TuningReport.of(job.output_dir) for job in jobs), report)


def _check_options(names: Iterable[str]) -> None:
    """Refuse names that are neither arguments of `tune` nor settings."""
    Settings.check_names(name for name in names if name not in inspect.signature(tune).parameters)


@checked(TuningError, options=_check_options)
def chain(
    teacher: GraphUNet | UNet2DConditionModel,
    passes: Sequence[Pass | str],
    data: Source | Iterable[Mapping[str, Tensor]],
    *,
    max_train_steps: Count | None = None,
    output_dir: Text | Path,
    **options: Any,
) -> tuple[GraphUNet, tuple[TuningReport, ...]]:
    """Apply passes one after the other, and tune after each of them; the result of a link teaches the next.

    Args:
        teacher: the first teacher.
        passes: the passes of the links, in order; each is a pass or the text of several.
        data: the data, as for `sdgraph.tune`.
        max_train_steps: the number of optimizer steps of every link; alternatively `num_train_epochs`.
        output_dir: the folder of the runs: `link-1/`, `link-2/`, ...
        options: further arguments of `sdgraph.tune`.
    Returns:
        The last student, and the logs of all links.
    Raises:
        TuningError: there are no passes.
    Example:
        `chain(unet, ["PruneBlocks('mid_block')", "PruneBlocks('bk-sdm-base')"], data, **options)`
    Source:
        Fang et al., "TinyFusion", 2025: a student of a student recovers better than one that was cut at once.
    """
    if not passes:
        raise TuningError("a chain has no passes", where="passes", hint="pass at least one")
    source = as_source(data)
    check_output(Path(output_dir), [teacher], source)
    links = [as_passes(link) for link in passes]
    last = apply(teacher, (), verify=False)
    apply(last, [one for link in links for one in link], verify=False)  # what cannot be applied is refused at once
    reports = []
    with alone(Path(output_dir)):
        for number, link in enumerate(links, 1):
            run: dict[str, Any] = {
                "max_train_steps": max_train_steps,
                "output_dir": Path(output_dir) / f"link-{number}",
            }
            student = apply(last, link, verify=False)
            last, report = tune(student, last, source, **run, **options)
            reports.append(report)
    return last, tuple(reports)


@dataclass(frozen=True)
class Job:
    """The training of one stage.

    Args:
        output_dir: the folder of the run.
        blocks: the blocks that are trained.
        max_train_steps: the number of optimizer steps.
        options: further arguments of `tune`.
    """

    output_dir: Path
    blocks: tuple[str, ...]
    max_train_steps: int
    options: dict[str, Any]

    @property
    def begin(self) -> Path:
        """The folder of the student before its first step, for a separate process."""
        return self.output_dir.with_name(f"{self.output_dir.name}-begin")

    def run(self, student: GraphUNet, teacher: GraphUNet, data: Source) -> GraphUNet:
        """Train the stage, and return the student with its blocks tuned.

        Args:
            student: the teacher with the stage applied.
            teacher: the teacher.
            data: the data.
        Raises:
            TuningError: the training failed; the error names the stage.
        """
        run: dict[str, Any] = {"max_train_steps": self.max_train_steps, "output_dir": self.output_dir}
        losses = (Output(), Features(self.blocks))
        try:
            return tune(student, teacher, data, losses=losses, train=self.blocks, **run, **self.options)[0]
        except Exception as error:
            reason = error.what if isinstance(error, SdgraphError) else f"{type(error).__name__}: {error}"
            hint = error.hint if isinstance(error, SdgraphError) and error.hint else "mend what the reason names"
            raise TuningError(
                f"{self.output_dir.name} failed, which trains {', '.join(self.blocks)}: {reason}",
                where=(error.where if isinstance(error, SdgraphError) else "") or str(self.output_dir),
                hint=f"{hint}; the same call goes on, and stages that are finished are not trained again",
            ) from error


def changed_blocks(student: GraphUNet, teacher: GraphUNet) -> tuple[str, ...]:
    """Return the blocks that a stage trains: those that a pass changed, and the neighbours of those that are gone.

    Args:
        student: the teacher with one stage applied.
        teacher: the teacher.
    Raises:
        TuningError: the stage changes no block.
    """
    before, after = _blocks(teacher), _blocks(student)
    order = list(before)
    kept = [block for block in order if block in after]
    changed = {block for block in kept if before[block] != after[block]}
    for place, block in enumerate(order):
        if block not in after:
            changed |= {next((b for b in side if b in after), block) for side in (order[place::-1], order[place:])}
    result = tuple(block for block in kept if block in changed)
    if not result:
        raise TuningError(
            f"the stage {', '.join(str(p.one) for p in student.graph.passes)} changes no block",
            where="stages",
            hint="a stage is a pass that changes down blocks, the mid block or up blocks",
        )
    return result


def _blocks(unet: GraphUNet) -> dict[str, tuple[str, ...]]:
    """Return the operations of every block, in graph order."""
    blocks: dict[str, list[str]] = {}
    for node in unet.graph.nodes:
        stack = [path for path in node.meta.get("nn_module_stack", {}) if path]
        block = ".".join(stack[0].split(".")[:2]) if stack else ""
        if block.split(".")[0] in ("down_blocks", "mid_block", "up_blocks"):
            blocks.setdefault(block, []).append(f"{node.op} {node.target}")
    return {block: tuple(operations) for block, operations in blocks.items()}


def _check_apart(trained: Sequence[tuple[str, ...]], stages: Sequence[Sequence[Pass]]) -> None:
    owner: dict[str, int] = {}
    for number, blocks in enumerate(trained):
        for block in blocks:
            if block in owner:
                first, second = (", ".join(map(str, stages[i])) for i in (owner[block], number))
                raise TuningError(
                    f"two stages change {block}: {first} and {second}",
                    where=block,
                    hint="join them into one stage, PruneBlocks((...)).stages(graph) finds what must change together",
                )
            owner[block] = number


def assemble(student: GraphUNet, parts: Iterable[tuple[Sequence[str], GraphUNet]]) -> GraphUNet:
    """Return a student with the weights of blocks that were trained apart.

    Args:
        student: the UNet whose graph is kept; it stays as it is.
        parts: the parts, each of them paths of blocks and the UNet that they take their weights from.
    Returns:
        A new UNet with the student's graph.
    Raises:
        EditError, ShapeError: a block is not the same in both UNets, as for `sdgraph.Graph.take_weights`.
    Example:
        `assemble(student, [(("mid_block",), tuned)])`
    Source:
        Ni et al., "Deep Incubation: Training Large Models by Divide-and-Conquering", 2023.
    """
    graph = student.graph.copy()
    for blocks, unet in parts:
        graph.take_weights(blocks, unet.graph)
    return GraphUNet(graph, student.report)


def _run_apart(jobs: Sequence[Job], students: Sequence[GraphUNet], teacher: Path, data: Source, processes: int) -> None:
    """Run stages in separate processes. After an error no stage begins, and those that run keep a checkpoint.

    Raises:
        TuningError: a stage failed, or its process has died; the error names the stages.
    """
    try:
        pickle.dumps((data, [job.options for job in jobs]))
    except Exception as error:  # whatever the data hold
        raise TuningError(
            f"the data or the scheduler cannot be sent to another process: {error}",
            where="data",
            hint="pass sdgraph.tuning.Tensors, a picklable source, or processes=1",
        ) from error
    for job, student in zip(jobs, students, strict=True):
        student.save_pretrained(job.begin)
    threads = max(1, torch.get_num_threads() // processes)
    spawn = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, spawn, _begun, (threads,))
    waiting, running = list(jobs), dict[Future[None], Job]()
    try:
        while waiting or running:
            while waiting and len(running) < processes:  # the pool would begin what it queues, whatever fails
                running[pool.submit(_run_saved, waiting[0], teacher, data)] = waiting[0]
                del waiting[0]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                del running[future]
    except BrokenProcessPool as error:
        raise TuningError(
            f"a process that trains a stage has died, of {', '.join(job.output_dir.name for job in running.values())}",
            where=str(jobs[0].output_dir.parent),
            hint="the memory may be too small for so many processes; the same call goes on from the last checkpoints",
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown()


def _begun(threads: int) -> None:
    """Prepare a process that trains stages."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the steps so far are kept
    begin_worker(threads)


def _run_saved(job: Job, teacher: Path, data: Source) -> None:
    job.run(GraphUNet.from_pretrained(job.begin), GraphUNet.from_pretrained(teacher), data)
