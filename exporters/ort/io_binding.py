"""Runs of a session on PyTorch's tensors, without copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Tensors = Mapping[str, torch.Tensor]
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}


def run(session: Any, inputs: Tensors, outputs: Tensors) -> None:
    """Run a session.

    Args:
        session: the ONNX Runtime session.
        inputs: its inputs by name, contiguous and on its device or the CPU.
        outputs: the tensors that it writes to, by name, likewise.
    """
    _wait(outputs)
    session.run_with_iobinding(_bound(session, inputs, outputs))


class Captured:
    """A session with a CUDA graph for one set of shapes, which reads and writes the same memory at each run.

    Args:
        session: the ONNX Runtime session.
        inputs: the inputs of the first run by name.
        outputs: the tensors that every run writes to, by name.
        number: the number of the CUDA graph in its session.
    """

    def __init__(self, session: Any, inputs: Tensors, outputs: Tensors, number: int) -> None:
        import onnxruntime

        self.session = session
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.outputs = dict(outputs)
        self.binding = _bound(session, self.inputs, self.outputs)
        self.options = onnxruntime.RunOptions()
        self.options.add_run_config_entry("gpu_graph_id", str(number))

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Return copies of the outputs by name; the next run overwrites the originals."""
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        _wait(self.outputs)
        self.session.run_with_iobinding(self.binding, self.options)
        return {name: value.clone() for name, value in self.outputs.items()}


def _bound(session: Any, inputs: Tensors, outputs: Tensors) -> Any:
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_input(name, *_buffer(value))
    for name, value in outputs.items():
        binding.bind_output(name, *_buffer(value))
    return binding


def _wait(outputs: Tensors) -> None:
    """Synchronise PyTorch's current stream; ONNX Runtime uses its own and synchronises it when a run ends."""
    device = next(iter(outputs.values())).device
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _buffer(tensor: torch.Tensor) -> tuple[str, int, Any, list[int], int]:
    """Return the binding of a contiguous tensor: its device, the device's index, element type, shape and address."""
    return tensor.device.type, tensor.device.index or 0, _NUMPY[tensor.dtype], list(tensor.shape), tensor.data_ptr()
