"""Whether a conditioning tensor is still what it was."""

from __future__ import annotations

import weakref

import torch


class Constant:
    """A conditioning tensor as it was when a generation began.

    A tensor with the same contents is the same, if it was made anew. PyTorch counts edits of a tensor, but neither
    those of inference tensors nor those through NumPy or `.data`. So the contents of the very same tensor are compared
    too, where that does not make a device wait: it would at an attached pipeline on an accelerator.
    """

    def __init__(self, tensor: torch.Tensor, waits: bool) -> None:
        self._compared = waits or tensor.device.type == "cpu" or tensor.is_inference()
        self._contents = tensor.detach().clone()
        self.follow(tensor)

    def follow(self, tensor: torch.Tensor) -> None:
        """Take note of the tensor that has the contents now."""
        self._ref, self._version = weakref.ref(tensor), _version(tensor)

    @property
    def exists(self) -> bool:
        """Whether the tensor may be passed to another call."""
        return self._ref() is not None

    def is_very(self, tensor: torch.Tensor) -> bool:
        return self._ref() is tensor

    def still_is(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of the same shape and dtype is the one of the generation, or has its contents."""
        untouched = self._ref() is tensor and self._version == _version(tensor)
        return (untouched and not self._compared) or torch.equal(self._contents, tensor)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
