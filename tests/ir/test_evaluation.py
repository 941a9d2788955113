"""Results that are remembered are those that PyTorch computes, and results share no memory."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdgraph.ir.evaluation import computed


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


image, tokens = tensor(2, 8, 6, 5), tensor(2, 7, 8)
with torch.device("meta"):
    CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
        "linear": (nn.Linear(8, 3).forward, (tokens,), {}),
        "a wider linear": (nn.Linear(8, 4).forward, (tokens,), {}),
        "linear of half": (nn.Linear(8, 3).half().forward, (tokens.half(),), {}),
        "conv": (nn.Conv2d(8, 4, 3, padding=1).forward, (image,), {}),
        "conv with a stride": (nn.Conv2d(8, 4, 3, padding=1, stride=2).forward, (image,), {}),
        "conv of channels last": (
            nn.Conv2d(8, 4, 3, padding=1).forward,
            (image.to(memory_format=torch.channels_last),),
            {},
        ),
        "group norm": (nn.GroupNorm(4, 8).forward, (image,), {}),
        "layer norm": (nn.LayerNorm(8).forward, (tokens,), {}),
        "attention": (F.scaled_dot_product_attention, (tensor(2, 4, 7, 8), *(tensor(2, 4, 5, 8),) * 2), {}),
        "attention with options": (
            F.scaled_dot_product_attention,
            (tensor(2, 7, 4, 8).transpose(1, 2), *(tensor(2, 5, 4, 8).transpose(1, 2),) * 2),
            {"dropout_p": 0.0, "is_causal": False},
        ),
        "gelu": (F.gelu, (tokens,), {"approximate": "tanh"}),
        "sum that is broadcast": (operator.add, (image, tensor(2, 8, 1, 1)), {}),
        "sum with an integer": (operator.add, (tensor(3, dtype=torch.int64), 1), {}),
        "sum with a float": (operator.add, (tensor(3, dtype=torch.int64), 1.0), {}),
        "sum of numbers": (operator.add, (3, 4), {}),
        "quotient of views": (operator.truediv, (tokens.transpose(1, 2), 2), {}),
        "view": (nn.Flatten().forward, (image,), {}),
    }


@pytest.mark.parametrize("name", CALLS)
def test_what_is_remembered_is_what_is_computed(name: str) -> None:
    code, args, kwargs = CALLS[name]
    with torch.no_grad():
        expected = code(*args, **kwargs)
    for found in (computed(code, args, kwargs), computed(code, args, kwargs)):
        if isinstance(expected, Tensor):
            assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
            assert found.is_meta
        else:
            assert found == expected


def test_results_share_no_memory() -> None:
    first, second = (computed(operator.add, (image, image), {}) for _ in range(2))
    storages = {value.untyped_storage()._cdata for value in (image, first, second)}
    assert len(storages) == 3


def test_an_error_is_raised_every_time() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="channels"):
            computed(nn.GroupNorm(4, 12).forward, (image,), {})
