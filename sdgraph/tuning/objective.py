"""The sum of losses, and the two models as it reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import TuningError
from ..ir.nodes import values as values_of
from ..runtime.unet import GraphUNet
from .batch import Batch
from .feature_extractor import FeatureExtractor
from .losses import Comparison, Loss
from .losses.base import TapPairs
from .noise_schedule import NoiseSchedule


class Student(nn.Module):
    """The student as training runs it: its prediction, and its features in the teacher's widths.

    Args:
        unet: the student.
        pairs: the values to compare, of the student and the teacher.
        teacher: the teacher, whose graph knows the widths.
        given: the inputs of its calls, by name.
        gradient_checkpointing: compute the blocks again on the way back, to save memory.
    """

    def __init__(
        self,
        unet: GraphUNet,
        pairs: TapPairs,
        teacher: GraphUNet,
        given: frozenset[str],
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.observed = FeatureExtractor(unet, [mine for mine, _ in pairs], given, gradient_checkpointing)
        self.adapters = nn.ModuleDict()
        for number, (mine, its) in enumerate(pairs):
            if its is None:
                continue
            (student, _), (other, _) = values_of(mine.node(unet.graph)), values_of(its.node(teacher.graph))
            dim = 1 if student.ndim == 4 and mine.part == "output" else -1
            width, wanted = student.shape[dim], other.shape[dim]
            if mine.part == "output" and width != wanted:
                self.adapters[str(number)] = nn.Conv2d(width, wanted, 1) if dim == 1 else nn.Linear(width, wanted)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the prediction (B, C, H, W), and the features in order."""
        prediction, *features = self.observed(inputs)
        for number, adapter in self.adapters.items():
            features[int(number)] = adapter(features[int(number)])
        return prediction, *features


class Objective:
    """The sum of losses of a student against its teacher.

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
        self.teachers = tuple(its for _, its in self.pairs if its is not None)
        for unet, named in ((student, [mine for mine, _ in self.pairs]), (teacher, self.teachers)):
            for tap in named:
                tap.node(unet.graph)  # refuses unknown paths before anything is computed
        self._places = [[self.pairs.index(pair) for pair in pairs] for pairs in taps]
        self.names = tuple(_distinct([type(loss).__name__ for loss in self.losses]))

    def __call__(
        self,
        batch: Batch,
        noise_schedule: NoiseSchedule,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        progress: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum, a scalar, and the terms without weights, (losses,).

        Args:
            batch: the inputs.
            noise_schedule: the noise schedule.
            student: the prediction and the features of `Student`.
            teacher: the prediction of the teacher, and the values of `teachers`.
            progress: the share of the run that is over.
        """
        comparison, its = Comparison(batch, noise_schedule, student[0], teacher[0]), iter(teacher[1:])
        nothing = teacher[0].new_zeros(0)
        values = [
            (mine, nothing if tap is None else next(its))
            for mine, (_, tap) in zip(student[1:], self.pairs, strict=True)
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


def _check_term(loss: Loss, term: object) -> None:
    if not isinstance(term, Tensor) or term.ndim:
        kind = f"a tensor of shape {tuple(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
        raise TuningError(
            f"the loss returns {kind}", where=str(loss), hint="return a scalar tensor, the mean over rows"
        )


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that occur more than once."""
    return [f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
