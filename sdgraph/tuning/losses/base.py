"""What a loss is: a small frozen dataclass that compares a student with its teacher on one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from torch import Tensor

from ...errors import TuningError
from ...graph import Graph
from ...options import Bounds, Positive
from ...spec import Spec
from ..batch import Batch
from ..feature_extractor import Tap
from ..noise_schedule import NoiseSchedule

TapPairs = Sequence[tuple[Tap, Tap | None]]
Values = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Comparison:
    """A batch and what the two models predict for it.

    Args:
        batch: the inputs.
        noise_schedule: the noise schedule.
        student: the student's prediction, (B, C, H, W).
        teacher: the teacher's prediction, (B, C, H, W).
    """

    batch: Batch
    noise_schedule: NoiseSchedule
    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class Loss(Spec, abstract=True):
    """A term of what training minimises. Terms add up by their weights, and are logged apart, without weights.

    A loss of your own is a frozen dataclass with `__call__`, and with `taps` if it compares values inside the models.
    It is the mean of what it says about single rows: then accumulated batches, and processes, have the gradient of one
    large batch. What is divided by a sum over rows has not.

    Args:
        weight: the factor of the term in the sum.
        until: the share of the run at whose end the weight has fallen to zero, linearly; None keeps it.
    """

    has_text: ClassVar[bool] = False  # a loss may hold a model, such as a decoder

    weight: Positive = field(default=1.0, kw_only=True)
    until: Annotated[float, Bounds(gt=0, le=1)] | None = field(default=None, kw_only=True)

    def weight_at(self, progress: float) -> float:
        """Return the weight after a share of the run."""
        return self.weight if self.until is None else self.weight * max(0.0, 1 - progress / self.until)

    def check(self, batch: Batch) -> None:
        """Refuse data that the loss cannot be computed on, before a run begins.

        Args:
            batch: a row of the data.
        Raises:
            TuningError: the row does not have what the loss needs.
        """

    def taps(self, student: Graph, teacher: Graph) -> TapPairs:
        """Return the values inside the student and the teacher that the loss compares, in pairs.

        None in the place of the teacher's asks for the student's alone.
        """
        return ()

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        """Return the term, a scalar, the mean over rows.

        Args:
            comparison: the batch and the predictions.
            values: the values of `taps`, of the student and the teacher, in pairs; an empty tensor for None.
        """
        raise TuningError("the loss computes nothing", where=str(self), hint="define __call__ of it")
