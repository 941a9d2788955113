"""Weights that cannot be written while the code of others runs: a write is refused before it happens.

Every operation of PyTorch passes through a dispatcher, whatever it was called by: under `no_grad`, on `.data` and
`detach()`, as a storage, or by an optimizer. There the memory that an operation writes is compared with that of the
weights. Nothing is copied. Arrays of NumPy over the weights are read-only.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Refuse = Callable[[str], Exception]  # the error for the name of a weight that was about to be written

_RESIZED = ("aten::resize_", "aten::resize_as_")  # views in place by their tags, which give memory back all the same
_this_thread = threading.local()


class Memory:
    """The memory of named tensors.

    Args:
        refuse: returns the error for a tensor that was about to be written.
    """

    def __init__(self, refuse: Refuse) -> None:
        self.refuse = refuse
        self._starts: list[int] = []  # of spans that do not overlap, in order
        self._ends: list[int] = []
        self._names: list[str] = []

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add tensors. Those on the meta device have no memory."""
        for name, tensor in tensors.items():
            start, end = span(tensor)
            first, behind = bisect.bisect_right(self._ends, start), bisect.bisect_left(self._starts, end)
            if start == end or (first < behind and self._starts[first] <= start and end <= self._ends[first]):
                continue
            start, end = min(start, *self._starts[first:behind], start), max(end, *self._ends[first:behind], end)
            self._starts[first:behind], self._ends[first:behind], self._names[first:behind] = [start], [end], [name]

    def name_at(self, start: int, end: int) -> str | None:
        """Return the name of a tensor whose memory overlaps with a span; None if there is none."""
        at = bisect.bisect_right(self._ends, start)
        return self._names[at] if start < end and at < len(self._starts) and self._starts[at] < end else None

    def check(self, tensor: torch.Tensor) -> None:
        """Refuse a tensor whose memory overlaps with that of one of these."""
        name = self.name_at(*span(tensor))
        if name is not None:
            raise self.refuse(name)


@contextlib.contextmanager
def read_only(tensors: Mapping[str, torch.Tensor], refuse: Refuse) -> Iterator[None]:
    """Refuse writes to the memory of tensors in this thread, for the duration of the context.

    Args:
        tensors: the tensors by name.
        refuse: returns the error for the name of a tensor that was about to be written.
    """
    memory, outer = Memory(refuse), getattr(_this_thread, "memory", None)
    memory.add(tensors)
    _this_thread.memory = memory
    try:
        with _Writes(memory), _Arrays(memory):
            yield
    finally:
        _this_thread.memory = outer


def also_read_only(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse writes to these tensors too, as long as the innermost `read_only` lasts; none where there is none."""
    memory = getattr(_this_thread, "memory", None)
    if memory is not None:
        memory.add(tensors)


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where the memory of a tensor starts and ends; (0, 0) if it has no memory itself."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return 0, 0
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    except (RuntimeError, NotImplementedError):  # a tensor that stands for others: their operations pass here too
        return 0, 0


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Checks the tensors that operations write."""

    supports_higher_order_operators = True

    def __init__(self, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, name in _written(func):
            value = args[place] if place < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, torch.Tensor):
                    self.memory.check(tensor)
        return func(*args, **kwargs)


@functools.cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Return place and name of the arguments whose memory an operation writes."""
    schema = getattr(func, "_schema", None)
    if schema is None or (torch.Tag.inplace_view in func.tags and schema.name not in _RESIZED):
        return ()
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


class _Arrays(TorchFunctionMode):
    """Makes arrays over the memory read-only, and copies for other libraries, which do not know of the refusal."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__dlpack__ and self.memory.name_at(*span(args[0])):
            args = (args[0].clone(), *args[1:])
        result = func(*args, **(kwargs or {}))
        if isinstance(result, np.ndarray):
            start = result.__array_interface__["data"][0]
            if self.memory.name_at(start, start + max(result.nbytes, 1)):
                result.flags.writeable = False
        return result
