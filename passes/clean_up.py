"""`CleanUp`: remove operations without effect."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from sdgraph import Contract, Example, Fixpoint, NoMatch, Pass, Rewrite


@dataclass(frozen=True)
class RemoveDropout(Rewrite):
    """`dropout(x)` with p = 0 is `x`, in training too."""

    contract: ClassVar[Contract] = Contract.EXACT
    examples: ClassVar[tuple[Example, ...]] = (
        Example(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)), {"x": ("B", 4)}),
        Example(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), {"x": ("B", 4)}, changes=False),
    )

    def pattern(self, x: Any, dropout: nn.Dropout) -> Any:
        return dropout(x)

    def check(self, x: Any, dropout: nn.Dropout) -> None:
        if dropout.p != 0:
            raise NoMatch(f"p is {dropout.p}, which matters in training")

    def replace(self, x: Any, dropout: nn.Dropout) -> Any:
        return x


@dataclass(frozen=True)
class RemoveIdentity(Rewrite):
    """`identity(x)` is `x`, a tensor."""

    contract: ClassVar[Contract] = Contract.EXACT
    examples: ClassVar[tuple[Example, ...]] = (
        Example(nn.Sequential(nn.Identity(), nn.Linear(4, 4)), {"x": ("B", 4)}),
        Example(nn.Sequential(nn.SiLU(), nn.Linear(4, 4)), {"x": ("B", 4)}, changes=False),
    )

    def pattern(self, x: Any, identity: nn.Identity) -> Any:
        return identity(x)

    def check(self, x: Any, identity: nn.Identity) -> None:
        if not isinstance(x, fx.Node) or not isinstance(x.meta["val"], torch.Tensor):
            raise NoMatch("it is no tensor")

    def replace(self, x: Any, identity: nn.Identity) -> Any:
        return x


@dataclass(frozen=True)
class RemoveDivisionByOne(Rewrite):
    """`x / 1.0` is `x` for floating `x`."""

    contract: ClassVar[Contract] = Contract.EXACT
    examples: ClassVar[tuple[Example, ...]] = (
        Example(lambda x: x.sin() / 1.0, {"x": ("B", 4)}),
        Example(lambda x: x.sin() / 2.0, {"x": ("B", 4)}, changes=False),
        Example(lambda x: x + x.argsort() / 1, {"x": ("B", 4)}, changes=False),
        Example(lambda x: x.new_ones(2, x.shape[1] // 1) * (x.shape[0] / 1), {"x": ("B", 4)}, changes=False),
    )

    def pattern(self, x: Any) -> Any:
        return x / 1.0

    def check(self, x: Any) -> None:
        _only_a_number(x, (operator.truediv, torch.div))

    def replace(self, x: Any) -> Any:
        return x


@dataclass(frozen=True)
class RemoveMultiplicationByOne(Rewrite):
    """`1 * x` is `x`, where that does not change its type: `1.0 * x` makes floats of integers."""

    contract: ClassVar[Contract] = Contract.EXACT
    examples: ClassVar[tuple[Example, ...]] = (
        Example(lambda x: 1 * x.sin(), {"x": ("B", 4)}),
        Example(lambda x: x + 1 * x.argsort(), {"x": ("B", 4)}),
        Example(lambda x: 1.5 * x.sin(), {"x": ("B", 4)}, changes=False),
        Example(lambda x: x + 1.0 * x.argsort(), {"x": ("B", 4)}, changes=False),
        Example(lambda x: x + 1 * (x > 0), {"x": ("B", 4)}, changes=False),
        Example(lambda x: x.reshape(1 * x.shape[0], 2, 2), {"x": ("B", 4)}, changes=False),
        Example(lambda x: (1 * x[:, ::2]).view(-1), {"x": ("B", 4)}, changes=False),
    )

    def pattern(self, x: Any) -> Any:
        return 1 * x

    def check(self, x: Any) -> None:
        _only_a_number(x, (operator.mul, torch.mul))

    def replace(self, x: Any) -> Any:
        return x


def _only_a_number(x: fx.Node, operations: Collection[Any]) -> None:
    """Decline a place where an operation with the number 1 changes the type, or the layout in memory.

    Args:
        operations: the operations that are looked for among the users of `x`.
    """
    results = [user for user in x.users if user.target in operations and 1 in user.args]
    for key in ("val", "probe"):
        value = x.meta[key]
        if not isinstance(value, torch.Tensor):
            raise NoMatch("it is no tensor")
        for result in (node.meta[key] for node in results):
            if value.dtype != result.dtype:
                raise NoMatch(f"it turns {value.dtype} into {result.dtype}")
            if key == "probe" and value.stride() != result.stride():  # no size is 1 there, so strides are meaningful
                raise NoMatch("it copies a view, as later operations may need")


@dataclass(frozen=True)
class RemoveCast(Rewrite):
    """`x.to(dtype)` is `x` where both have the model's dtype, or both the same fixed one."""

    contract: ClassVar[Contract] = Contract.EXACT
    examples: ClassVar[tuple[Example, ...]] = (
        Example(lambda x: x.sin().to(x.dtype), {"x": ("B", 4)}),
        Example(lambda x: x.sin().float(), {"x": ("B", 4)}, changes=False),
    )

    def pattern(self, x: Any, dtype: Any) -> Any:
        return x.to(dtype)

    def check(self, x: Any, dtype: Any) -> None:
        target = [dtype.meta[key] if isinstance(dtype, fx.Node) else dtype for key in ("val", "probe")]
        if not all(isinstance(t, torch.dtype) for t in target):
            raise NoMatch("it moves between devices")
        if [x.meta[key].dtype for key in ("val", "probe")] != target:
            raise NoMatch("the dtypes differ when the model's dtype changes")

    def replace(self, x: Any, dtype: Any) -> Any:
        return x


@dataclass(frozen=True)
class RemoveKeywordCast(RemoveCast):
    """`x.to(dtype=dtype)`, as `RemoveCast`."""

    examples: ClassVar[tuple[Example, ...]] = (
        Example(lambda x: x.sin().to(dtype=x.dtype), {"x": ("B", 4)}),
        Example(lambda x: x.sin().to(dtype=torch.float64), {"x": ("B", 4)}, changes=False),
    )

    def pattern(self, x: Any, dtype: Any) -> Any:
        return x.to(dtype=dtype)


@dataclass(frozen=True)
class CleanUp(Fixpoint):
    """Remove dead dropout, identities, divisions and multiplications by one, casts and copies without effect.

    Every bit of every output stays the same, for all sizes and dtypes. A UNet with nothing to remove is no error.
    """

    passes: tuple[Pass, ...] = (
        RemoveDropout(),
        RemoveIdentity(),
        RemoveDivisionByOne(),
        RemoveMultiplicationByOne(),
        RemoveCast(),
        RemoveKeywordCast(),
    )
    may_change_nothing: ClassVar[bool] = True
