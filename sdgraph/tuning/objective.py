"""The sum of losses, and the two models as it reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ir.nodes import values
from ..runtime.unet import GraphUNet
from .batch import Batch
from .losses import Comparison, Loss
from .noising import Noising
from .observe import Observed, Tap


class Student(nn.Module):
    """The student as training runs it: its prediction, and its features in the teacher's widths.

    Args:
        unet: the student.
        pairs: the values to compare, of the student and the teacher.
        teacher: the teacher, whose graph knows the widths.
        given: the inputs of its calls, by name.
        recompute: compute the blocks again on the way back, to save memory.
    """

    def __init__(
        self,
        unet: GraphUNet,
        pairs: Sequence[tuple[Tap, Tap]],
        teacher: GraphUNet,
        given: frozenset[str],
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.observed = Observed(unet, [mine for mine, _ in pairs], given, recompute)
        self.adapters = nn.ModuleDict()
        for number, (mine, its) in enumerate(pairs):
            (student, _), (other, _) = values(mine.node(unet.graph)), values(its.node(teacher.graph))
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
        for mine, its in self.pairs:  # refuses unknown paths before anything is computed
            mine.node(student.graph), its.node(teacher.graph)
        self._places = [[self.pairs.index(pair) for pair in pairs] for pairs in taps]
        self.names = tuple(_distinct([type(loss).__name__ for loss in self.losses]))

    def __call__(
        self, batch: Batch, noising: Noising, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the sum, a scalar, and the terms without weights, (losses,).

        Args:
            batch: the inputs.
            noising: the noise schedule.
            student: the prediction and the features of `Student`.
            teacher: the same of the teacher.
        """
        comparison = Comparison(batch, noising, student[0], teacher[0])
        terms = [
            loss(comparison, [(student[1 + place], teacher[1 + place]) for place in places])
            for loss, places in zip(self.losses, self._places, strict=True)
        ]
        total = sum((loss.weight * term for loss, term in zip(self.losses, terms, strict=True)), torch.zeros(()))
        return total, torch.stack([term.detach().float() for term in terms])


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that occur more than once."""
    return [f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
