"""The gradient of one optimizer step: batches through teacher and student, the losses, and the way back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batches
from .feature_extractor import FeatureExtractor
from .fsdp import full_tensor
from .noise_schedule import NoiseSchedule
from .objective import Objective
from .random_numbers import generator
from .settings import Settings


@dataclass(frozen=True)
class TrainStep:
    """Computes the gradient of a step, a function of the weights and the number of the step.

    Args:
        accelerator: of accelerate.
        settings: of the run.
        batches: of the run.
        noise_schedule: the noise schedule, on the device.
        objective: the losses.
        teacher: returns the prediction and the features that the losses compare with.
        student: returns its own; as accelerate has prepared it.
        trained: the parameters.
    """

    accelerator: Any
    settings: Settings
    batches: Batches
    noise_schedule: NoiseSchedule
    objective: Objective
    teacher: FeatureExtractor
    student: nn.Module
    trained: Sequence[nn.Parameter]

    def __call__(self, step: int) -> dict[str, float]:
        """Leave the gradient of a step in the parameters.

        Returns:
            The norm of the gradient before clipping, the loss and its terms, of all processes, by name.
        """
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        # Whatever is random inside modules, such as dropout, follows from the step as well.
        torch.manual_seed(int(generator(self.settings.seed, "modules", step, process).integers(2**62)))
        parts, size = self.settings.gradient_accumulation_steps, self.settings.train_batch_size
        terms = torch.zeros(1 + len(self.objective.names), device=self.accelerator.device)
        for part in range(parts):
            begin = (part * processes + process) * size
            last = part == parts - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.student):
                loss, seen = self._loss(step, range(begin, begin + size))
                self.accelerator.backward(loss / parts)
            terms += torch.cat([loss.detach().float().reshape(1), seen]) / parts
        largest = self.settings.max_grad_norm or math.inf
        norm = full_tensor(torch.as_tensor(self.accelerator.clip_grad_norm_(self.trained, largest)))
        figures = self.accelerator.reduce(torch.cat([norm.detach().reshape(1).to(terms), terms]), "mean")
        return dict(zip(("gradient_norm", "loss", *self.objective.names), figures.tolist(), strict=True))

    def _loss(self, step: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        batch = self.batches.batch(step, rows).to(self.accelerator.device)
        with torch.no_grad(), self.accelerator.autocast():
            expected = [value.float() for value in self.teacher(batch.inputs)]
        progress = step / self.settings.steps
        return self.objective(batch, self.noise_schedule, self.student(batch.inputs), expected, progress)
