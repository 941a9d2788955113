"""Whether a conditioning tensor is still what it was."""

from __future__ import annotations

import weakref

import torch


class Constant:
    """A conditioning tensor as it was when a generation began.

    PyTorch counts edits of a tensor, but neither those of inference tensors nor those through NumPy or `.data`. So the
    contents are compared, where that does not make a device wait: it would at an attached pipeline on an accelerator.
    """

    def __init__(self, tensor: torch.Tensor, waits: bool) -> None:
        self._ref = weakref.ref(tensor)
        self._version = _version(tensor)
        compared = waits or tensor.device.type == "cpu" or tensor.is_inference()
        self._contents = tensor.detach().clone() if compared else None

    def still_is(self, tensor: torch.Tensor) -> bool:
        return (
            self._ref() is tensor
            and self._version == _version(tensor)
            and (self._contents is None or torch.equal(self._contents, tensor))
        )


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
