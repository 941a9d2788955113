"""One training step: a batch through teacher and student, the losses, and the backward pass."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import TuningError
from ..ir.nodes import values as values_of
from ..runtime.feature_extractor import FeatureExtractor
from ..runtime.unet import GraphUNet
from .batch import Batch, Batches
from .learned_pruning import PruningMasks
from .learned_routing import RoutingMasks
from .losses import Comparison, Denoising, Features, Loss, Output, Trajectory
from .losses.base import TapPairs
from .noise_schedule import NoiseSchedule
from .random_numbers import generator
from .settings import Settings

DEFAULT = (Output(), Features("stage", weight=10.0), Denoising(weight=0.01))
"""The losses of a run for which none are named; `Denoising` counts where noise was added to the data."""


class Student(nn.Module):
    """The student as it is trained: its prediction, and its features in the teacher's widths.

    Args:
        unet: the student.
        pairs: the values to compare, of the student and the teacher.
        teacher: the teacher, whose graph knows the widths.
        inputs: the names of the inputs of a call.
        gradient_checkpointing: whether to recompute the blocks in the backward pass, which saves memory.
        masks: the masks of the regions whose removal is learned; None if none is.
    """

    def __init__(
        self,
        unet: GraphUNet,
        pairs: TapPairs,
        teacher: GraphUNet,
        inputs: frozenset[str],
        gradient_checkpointing: bool = False,
        masks: PruningMasks | RoutingMasks | None = None,
    ) -> None:
        super().__init__()
        gated = () if masks is None else masks.paths
        self.features = FeatureExtractor(unet, [tap for tap, _ in pairs], inputs, gradient_checkpointing, gated)
        self.masks = masks
        self.adapters = nn.ModuleDict()
        for number, (tap, teacher_tap) in enumerate(pairs):
            if teacher_tap is None:
                continue
            value, _ = values_of(tap.node(unet.graph))
            teacher_value, _ = values_of(teacher_tap.node(teacher.graph))
            dim = 1 if value.ndim == 4 and tap.part == "output" else -1
            width, teacher_width = value.shape[dim], teacher_value.shape[dim]
            if tap.part == "output" and width != teacher_width:
                self.adapters[str(number)] = (
                    nn.Conv2d(width, teacher_width, 1) if dim == 1 else nn.Linear(width, teacher_width)
                )

    @property
    def temporary(self) -> nn.Module:
        """The modules that are trained with the UNet and thrown away afterwards."""
        return self.adapters if self.masks is None else nn.ModuleDict({"adapters": self.adapters, "masks": self.masks})

    def forward(self, inputs: dict[str, Tensor], noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the prediction (B, C, H, W), and the features in order.

        Args:
            inputs: the inputs of the UNet by name, (B, ...) each.
            noise: the noise of the masks that are drawn, as their `noise` returns it; None without masks.
        """
        gates = None if self.masks is None or noise is None else self.masks(noise, inputs["timestep"])
        prediction, *features = self.features(inputs, gates)
        for number, adapter in self.adapters.items():
            features[int(number)] = adapter(features[int(number)])
        return prediction, *features


class Objective:
    """The weighted sum of losses of a student against its teacher.

    Args:
        losses: the terms.
        student: the student.
        teacher: the teacher.
    Raises:
        PathError: a loss names a module that one of them does not have.
    """

    def __init__(self, losses: Sequence[Loss], student: GraphUNet, teacher: GraphUNet) -> None:
        self.losses = tuple(losses)
        taps = [tuple(loss.taps(student.graph, teacher.graph)) for loss in self.losses]
        self.pairs = tuple(dict.fromkeys(pair for pairs in taps for pair in pairs))
        self.teacher_taps = tuple(tap for _, tap in self.pairs if tap is not None)
        for unet, named in ((student, [tap for tap, _ in self.pairs]), (teacher, self.teacher_taps)):
            for tap in named:
                tap.node(unet.graph)  # refuses unknown paths before anything is computed
        self._places = [[self.pairs.index(pair) for pair in pairs] for pairs in taps]
        self.reads_teacher = any(loss.reads_teacher for loss in self.losses)
        self.reads_following = any(loss.reads_following for loss in self.losses)
        self.names = tuple(_numbered([type(loss).__name__ for loss in self.losses]))

    def __call__(
        self,
        batch: Batch,
        noise_schedule: NoiseSchedule,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        progress: float = 0.0,
        following: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum, a scalar, and the terms without weights, (losses,).

        Args:
            batch: the batch that both models have seen.
            noise_schedule: the noise schedule.
            student: the prediction (B, C, H, W) and the features that `Student` returns.
            teacher: the prediction (B, C, H, W) of the teacher, and its values at `teacher_taps`.
            progress: the share of the run that is over, from 0 to 1.
            following: the student's prediction (B, C, H, W) at the next point of a path, if a loss reads it.
        Raises:
            TuningError: a loss returns no scalar, or the sum has no gradient.
        """
        comparison = Comparison(batch, noise_schedule, student[0], teacher[0], following)
        teacher_values = iter(teacher[1:])
        nothing = teacher[0].new_zeros(0)
        values = [
            (value, nothing if teacher_tap is None else next(teacher_values))
            for value, (_, teacher_tap) in zip(student[1:], self.pairs, strict=True)
        ]
        terms = [
            loss(comparison, [values[place] for place in places])
            for loss, places in zip(self.losses, self._places, strict=True)
        ]
        for loss, term in zip(self.losses, terms, strict=True):
            _check_term(loss, term)
        weights = [loss.weight_at(progress) for loss in self.losses]
        total = sum((weight * term for weight, term in zip(weights, terms, strict=True)), torch.zeros(()))
        if student[0].requires_grad and not total.requires_grad:
            raise TuningError(
                "the losses have no gradient",
                where=", ".join(self.names),
                hint="compute a loss from the student's prediction or its values, and detach the teacher's alone",
            )
        return total, torch.stack([term.detach().float() for term in terms])


@dataclass(frozen=True)
class TrainStep:
    """The forward and backward passes of a training step, a function of the weights and the number of the step.

    Args:
        accelerator: the accelerator of accelerate.
        settings: the settings of the run.
        batches: the batches of the run.
        noise_schedule: the noise schedule, on the device.
        objective: the losses.
        teacher: the teacher, which returns its prediction and the features that the losses compare with.
        student: the student as accelerate has prepared it, which returns its own.
        trained: the parameters that are trained.
        masks: the masks of the regions whose removal is learned; None if none is.
    """

    accelerator: Any
    settings: Settings
    batches: Batches
    noise_schedule: NoiseSchedule
    objective: Objective
    teacher: FeatureExtractor
    student: nn.Module
    trained: Sequence[nn.Parameter]
    masks: PruningMasks | RoutingMasks | None = None

    def __call__(self, step: int) -> dict[str, float]:
        """Leave the gradients of a step in the parameters, clipped to `max_grad_norm`.

        Args:
            step: the number of the step, from 0.
        Returns:
            The norm of the gradient before clipping, the loss and its terms, means over all processes, by name.
        """
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        # Whatever is random inside modules, such as dropout, follows from the step as well.
        torch.manual_seed(int(generator(self.settings.seed, "modules", step, process).integers(2**62)))
        parts, size = self.settings.gradient_accumulation_steps, self.settings.train_batch_size
        figures = torch.zeros(1 + len(self.objective.names), device=self.accelerator.device)
        for part in range(parts):
            begin = (part * processes + process) * size
            last = part == parts - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.student):
                loss, terms = self.forward(step, range(begin, begin + size))
                self.accelerator.backward(loss / parts)
            figures += torch.cat([loss.detach().float().reshape(1), terms]) / parts
        norm = self.accelerator.clip_grad_norm_(self.trained, self.settings.max_grad_norm or math.inf)
        norm = torch.as_tensor(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        figures = self.accelerator.reduce(torch.cat([norm.detach().reshape(1).to(figures), figures]), "mean")
        return dict(zip(("gradient_norm", "loss", *self.objective.names), figures.tolist(), strict=True))

    def forward(self, step: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar, and its terms without weights, (losses,).

        Args:
            step: the number of the step, from 0.
            rows: the numbers of the rows of its batch.
        """
        batch = self.batches.batch(step, rows).to(self.accelerator.device)
        with torch.no_grad(), self.accelerator.autocast():
            called = self.teacher(batch.inputs) if self.objective.reads_teacher else [batch.noisy.new_zeros(0)]
            teacher = [value.float() for value in called]
            following = self.student(batch.following_inputs)[0].float() if self.objective.reads_following else None
        progress = step / self.settings.last_step
        more: tuple[Tensor, ...] = ()
        if self.masks is not None:
            draw = generator(self.settings.seed, "mask", step, rows[0])
            more = (self.masks.noise(draw, progress).to(self.accelerator.device),)
        student = self.student(batch.inputs, *more)
        return self.objective(batch, self.noise_schedule, student, teacher, progress, following)


def losses_for(losses: Sequence[Loss] | None, row: Batch, snr_gamma: float | None) -> list[Loss]:
    """Return the losses of a run, with the weights of timesteps that its settings ask for.

    Args:
        losses: the losses that were passed; None stands for those of `DEFAULT` that the data allow, and for
            `Trajectory` where they are paths.
        row: a row of the data.
        snr_gamma: the limit of min-SNR, for all losses that leave it out.
    Raises:
        TuningError: a loss cannot be computed on the data, or none takes `snr_gamma`.
    """
    if losses is None:
        losses = [loss for loss in DEFAULT if row.noise is not None or not isinstance(loss, Denoising)]
        losses = losses if row.target is None else [Trajectory()]
    for loss in losses:
        loss.check(row)
    terms = [copy.copy(loss) for loss in losses]
    weighed = [term for term in terms if getattr(term, "snr_gamma", snr_gamma) is None]
    for term in weighed:
        object.__setattr__(term, "snr_gamma", snr_gamma)  # and no replace(), which would lose what is no field
    if snr_gamma is not None and not weighed:
        raise TuningError(
            f"snr_gamma is {snr_gamma}, and no loss takes it: {', '.join(map(str, losses))}",
            where="snr_gamma",
            hint="leave it out; Output, Denoising and Guidance weigh timesteps, where their own snr_gamma is left out",
        )
    return terms


def _check_term(loss: Loss, term: object) -> None:
    if not isinstance(term, Tensor) or term.ndim:
        kind = f"a tensor of shape {tuple(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
        raise TuningError(
            f"the loss returns {kind}", where=str(loss), hint="return a scalar tensor, the mean over rows"
        )


def _numbered(names: Sequence[str]) -> list[str]:
    """Number the names that occur more than once."""
    return [f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
