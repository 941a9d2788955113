"""The training loop: resumable, with checkpoints, averaged weights, a progress bar and a log of the loss.

accelerate runs it on the CPU, on a GPU or on several. All random numbers of a step follow from (seed, step, process),
so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

Module = TypeVar("Module", bound=nn.Module)
Draw = Callable[[np.random.Generator, int], tuple[Tensor, ...]]
SAVE_SECONDS = 300
LOG_STEPS = 25
SEED = 2026
ON_CPU = not torch.accelerator.is_available()  # accelerate joins CPU processes only on request
AVERAGE = "average.safetensors"  # the averaged weights, beside the files of accelerate
LOG = "loss.csv"  # step, seconds so far, mean loss since the previous line


class OutOfTimeError(Exception):
    """The time limit has passed. The checkpoint is written."""


class _Progress:
    """The step and the seconds spent so far, which accelerate saves."""

    step, seconds = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]


def fit(
    name: str,
    module: Module,
    draw: Draw,
    folder: Path,
    *,
    steps: int,
    batch: int,
    rate: float,
    decay: float = 0.999,
    until: float = math.inf,
) -> Module:
    """Train a module with AdamW, or resume its training.

    The learning rate rises over the first 2 % of the steps, and falls along a cosine. The state is kept in
    `folder`/`name`, from which a later run resumes.

    Args:
        name: the name of the stage.
        module: the module, whose output is the loss.
        draw: a function of a random generator and a number of samples, which returns arguments of the module.
        folder: the folder of all stages.
        steps: the number of training steps.
        batch: the number of samples per step, of all processes together.
        rate: the largest learning rate.
        decay: the decay per step of the moving average of the weights.
        until: the time limit, in seconds of `time.monotonic()`.
    Returns:
        The module with the averaged weights.
    Raises:
        OutOfTimeError: the time limit has passed; the state is saved.
        ValueError: the processes cannot share the batch evenly.
    """
    state, log = folder / name / "state", folder / name / LOG
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    warm = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(i / steps, 1))))
    )
    accelerator = Accelerator(cpu=ON_CPU)
    average = AveragedModel(module, device=accelerator.device, multi_avg_fn=get_ema_multi_avg_fn(decay))
    trained, optimizer = accelerator.prepare(module, optimizer)
    progress = _Progress()
    accelerator.register_for_checkpointing(progress, average, schedule)
    if state.exists():
        accelerator.load_state(str(state))
    if accelerator.is_main_process:
        log.parent.mkdir(parents=True, exist_ok=True)
        _forget_after(log, progress.step)

    share, rest = divmod(batch, accelerator.num_processes)
    if rest:
        raise ValueError(f"{accelerator.num_processes} processes cannot share a batch of {batch} evenly")
    saved = begun = time.monotonic()
    bar = tqdm(total=steps, initial=progress.step, desc=name, unit="step", disable=not accelerator.is_main_process)
    losses, spent = [], progress.seconds
    trained.train()
    while progress.step < steps:
        key = (SEED, progress.step, accelerator.process_index)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
        samples = (tensor.to(accelerator.device) for tensor in draw(np.random.default_rng(key), share))
        loss = trained(*samples)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(accelerator.unwrap_model(trained))
        progress.step += 1
        progress.seconds = spent + time.monotonic() - begun
        losses.append(loss.item())
        bar.update()
        if progress.step % LOG_STEPS == 0 or progress.step == steps:
            if accelerator.is_main_process:
                mean = sum(losses) / len(losses)
                with log.open("a") as lines:
                    print(f"{progress.step},{progress.seconds:.0f},{mean:.6f}", file=lines)
                bar.set_postfix(loss=f"{mean:.4f}")
            losses.clear()
        now = time.monotonic()
        stop = _agreed(accelerator, now > until)
        if stop or _agreed(accelerator, now > saved + SAVE_SECONDS) or progress.step == steps:
            _save(accelerator, state, average.module)
            saved = now
        if stop:
            raise OutOfTimeError(f"{name}: {progress.step} of {steps} steps are done; the same command goes on")
    bar.close()
    accelerator.wait_for_everyone()
    return average.module.eval()


def _agreed(accelerator: Accelerator, mine: bool) -> bool:
    """Return the decision of the main process, for all processes must save and stop at the same step."""
    if accelerator.num_processes == 1:
        return mine
    return bool(broadcast(torch.tensor(float(mine), device=accelerator.device)).item())


def _save(accelerator: Accelerator, state: Path, average: nn.Module) -> None:
    """Write a new state aside and move it into place, so that a run that is killed while saving keeps the old state."""
    new = state.with_name("state.new")
    accelerator.save_state(str(new))
    if accelerator.is_main_process:
        save_model(average, str(new / AVERAGE))
        old = state.with_name("state.old")
        if state.exists():
            state.rename(old)
        new.rename(state)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _forget_after(log: Path, step: int) -> None:
    """Remove the lines that were logged after the checkpoint from which the run resumes."""
    lines = log.read_text().splitlines() if log.exists() else []
    kept = [line for line in lines if int(line.split(",")[0]) <= step]
    log.write_text("".join(f"{line}\n" for line in kept))


def read_log(log: Path) -> list[tuple[float, float, float]]:
    """Return the step, the seconds and the loss of every line."""
    return [tuple(map(float, line.split(","))) for line in log.read_text().splitlines()]  # type: ignore[misc]
