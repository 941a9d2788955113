"""Sizes as text: arithmetic and nothing else."""

from __future__ import annotations

import pytest

from sdgraph import errors
from sdgraph.ir.dims import evaluate

BEYOND = ["1<<999999999", "H*999999999*999999999", "H//0", "Q", "True", "+".join("H" * 99), "(" * 999, "1e400"]


@pytest.mark.parametrize(
    "text", ["().a", "__import__('os')", "9**9", "[1]", "B;H", "'a'", "lambda: 1", "B\nH", "", "{1}", *BEYOND]
)
def test_expressions_are_arithmetic(text: str) -> None:
    with pytest.raises(errors.SpecError, match="no size"):
        evaluate(text, {"B": 2, "H": 8})
