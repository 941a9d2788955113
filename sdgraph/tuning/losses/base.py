"""What a loss is: a small frozen dataclass that compares a student with its teacher on one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...errors import SpecError
from ...graph import Graph
from ...spec import Spec
from ..batch import Batch
from ..noising import Noising
from ..observe import Tap

TapPairs = Sequence[tuple[Tap, Tap | None]]
Values = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Comparison:
    """A batch and what the two models predict for it.

    Args:
        batch: the inputs.
        noising: the noise schedule.
        student: the student's prediction, (B, C, H, W).
        teacher: the teacher's prediction, (B, C, H, W).
    """

    batch: Batch
    noising: Noising
    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class Loss(Spec):
    """A term of what training minimises. Terms add up by their weights, and are logged apart, without weights.

    A loss of your own is a frozen dataclass with `__call__`, and with `taps` if it compares values inside the models.

    Args:
        weight: the factor of the term in the sum.
        until: the share of the run at whose end the weight has fallen to zero, linearly; None keeps it.
    """

    weight: float = field(default=1.0, kw_only=True)
    until: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise SpecError(
                f"the weight {self.weight} is not a positive number", where=type(self).__name__, hint="leave it out"
            )
        if self.until is not None and not 0 < self.until <= 1:
            raise SpecError(
                f"until={self.until} is no share of a run", where=type(self).__name__, hint="a number from 0 to 1"
            )

    def weight_at(self, progress: float) -> float:
        """Return the weight after a share of the run."""
        return self.weight if self.until is None else self.weight * max(0.0, 1 - progress / self.until)

    def taps(self, student: Graph, teacher: Graph) -> TapPairs:
        """Return the values inside the student and the teacher that the loss compares, in pairs.

        None in the place of the teacher's asks for the student's alone.
        """
        return ()

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        """Return the term, a scalar.

        Args:
            comparison: the batch and the predictions.
            values: the values of `taps`, of the student and the teacher, in pairs; an empty tensor for None.
        """
        raise NotImplementedError
