"""The base class of losses, and the comparison of a student with its teacher on one batch that they are computed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from torch import Tensor

from ...errors import TuningError
from ...graph import Graph
from ...options import Bounds, Positive
from ...runtime.feature_extractor import Tap
from ...spec import Spec
from ..batch import Batch
from ..noise_schedule import NoiseSchedule

TapPairs = Sequence[tuple[Tap, Tap | None]]
Values = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Comparison:
    """A batch and what the two models predict for it.

    Args:
        batch: the inputs of both models.
        noise_schedule: the noise schedule.
        student: the student's prediction, (B, C, H, W).
        teacher: the teacher's prediction, (B, C, H, W); an empty tensor if no loss of the run reads it.
        following: the student's prediction for `batch.following` without gradients, (B, C, H, W), if a loss reads it.
    Example:
        `(comparison.student - comparison.teacher).square().mean()`
    """

    batch: Batch
    noise_schedule: NoiseSchedule
    student: Tensor
    teacher: Tensor
    following: Tensor | None = None


@dataclass(frozen=True)
class Loss(Spec, abstract=True):
    """A term of what training minimises. Terms add up by their weights, and are logged apart, without weights.

    Your own loss is a frozen dataclass with `__call__`, and with `taps` if it compares values inside the models. It is
    the mean of the losses of single rows: then accumulated batches, and several processes, have the gradient of one
    large batch. A term that is divided by a sum over rows does not.

    Args:
        weight: the factor of the term in the sum.
        until: the share of the run at whose end the weight has fallen to zero, linearly; None keeps it.
    Example:
        ```python
        @dataclass(frozen=True)
        class Largest(Loss):
            def __call__(self, comparison: Comparison, values: Values) -> Tensor:
                return (comparison.student - comparison.teacher).abs().amax((1, 2, 3)).mean()
        ```
    """

    has_text: ClassVar[bool] = False  # a loss may hold a model, such as a decoder
    reads_teacher: ClassVar[bool] = True  # otherwise the teacher is not called for it
    reads_following: ClassVar[bool] = False  # whether the student is called at the next point of a path as well

    weight: Positive = field(default=1.0, kw_only=True)
    until: Annotated[float, Bounds(gt=0, le=1)] | None = field(default=None, kw_only=True)

    def weight_at(self, progress: float) -> float:
        """Return the weight at a moment of the run.

        Args:
            progress: the share of the run that is over, from 0 to 1.
        """
        return self.weight if self.until is None else self.weight * max(0.0, 1 - progress / self.until)

    def check(self, batch: Batch) -> None:
        """Refuse data that the loss cannot be computed on, before a run begins.

        Args:
            batch: a batch of one row of the data.
        Raises:
            TuningError: the row does not have what the loss needs.
        """

    def taps(self, student: Graph, teacher: Graph) -> TapPairs:
        """Return the values inside the student and the teacher that the loss compares, in pairs.

        Args:
            student: the graph of the student.
            teacher: the graph of the teacher.
        Returns:
            Pairs of a value of the student and one of the teacher; None in the place of the teacher's asks for the
            student's alone.
        """
        return ()

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        """Return the term, a scalar, the mean over rows.

        Args:
            comparison: the batch and the predictions of both models for it.
            values: the values of `taps`, of the student and the teacher, in pairs; an empty tensor in place of None.
        """
        raise TuningError("the loss computes nothing", where=str(self), hint="define __call__ of it")
