"""Weights that the models of a folder share: each tensor once in the file, and once on a device."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdgraph.errors import SavedError

from .manifest import AGAIN
from .untrusted import nodes_of

if TYPE_CHECKING:
    import onnx
    import onnx_ir

# Small tensors stay in the model: shape inference does not read constants from external data.
INLINE_BYTES = 1024
# Large tensors begin at a page, so that they can be mapped into memory without a copy.
LARGE_BYTES, PAGE, LINE = 1 << 20, 4096, 64


class Weights:
    """A file of tensors, identified by their content.

    Args:
        path: the path of the file, which is created empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}
        self._names: dict[str, bytes] = {}
        path.touch()

    def take(self, model: onnx_ir.Model) -> None:
        """Move the initialisers of a model to the file. A name stands for the same tensor in all models."""
        import onnx_ir

        with self.path.open("ab") as file:
            for value in list(model.graph.initializers.values()):
                tensor = value.const_value
                if tensor is None or tensor.nbytes < INLINE_BYTES:
                    continue
                content = tensor.tobytes()
                digest = hashlib.sha256(content).digest()
                name = str(value.name)
                while self._names.setdefault(name, digest) != digest:
                    name += "_"
                if name != value.name:
                    del model.graph.initializers[str(value.name)]
                    value.name = name
                    model.graph.register_initializer(value)
                if digest not in self._places:
                    file.write(bytes(-file.tell() % (PAGE if len(content) >= LARGE_BYTES else LINE)))
                    self._places[digest] = file.tell()
                    file.write(content)
                value.const_value = onnx_ir.ExternalTensor(
                    self.path.name,
                    self._places[digest],
                    len(content),
                    tensor.dtype,
                    shape=onnx_ir.Shape(tensor.shape.numpy()),
                    name=name,
                    base_dir=str(self.path.parent),
                )


def _shares(node: onnx.NodeProto) -> bool:
    return node.op_type in ("Conv", "MatMul", "Gemm") and not node.domain


class SharedWeights:
    """The weights that several sessions share on a device, each once; on the CPU they are mapped from the file.

    ONNX Runtime replaces initialisers by the given tensors after it has optimised the graph. Its transpose optimizer
    changes operands of additions and multiplications without changing their names, so replacing those would give wrong
    numbers. Only the kernels of convolutions and matrix products are shared: nearly all bytes, and never changed.

    Args:
        folder: the folder of the models.
        device: the device of the sessions.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self._lent: dict[str, tuple[int, torch.Tensor, Any]] = {}  # sessions have their addresses only
        self._users: dict[str, set[Path]] = {}

    def of(self, path: Path) -> dict[str, Any]:
        """Return the weights of a model that sessions may share, as OrtValues by name.

        Args:
            path: the file of the model.
        Raises:
            SavedError: a name stands for two weights.
        """
        import onnx
        import onnxruntime

        lent = {}
        graph = onnx.load(path, load_external_data=False).graph
        others = {name for node in nodes_of(graph) for i, name in enumerate(node.input) if not (i and _shares(node))}
        for tensor in graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL or len(tensor.dims) < 2 or tensor.name in others:
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            offset = int(place.get("offset", 0))
            self._users.setdefault(tensor.name, set()).add(path)
            if tensor.name in self._lent:
                if self._lent[tensor.name][0] != offset:
                    raise SavedError(f"{tensor.name} is two weights", where=str(path), hint=AGAIN)
                lent[tensor.name] = self._lent[tensor.name][2]
                continue
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            lies = np.memmap(self.folder / place["location"], dtype, "c", offset, tuple(tensor.dims))
            weight = torch.from_numpy(lies).to(self.device)
            lent[tensor.name] = onnxruntime.OrtValue.from_dlpack(weight)
            self._lent[tensor.name] = offset, weight, lent[tensor.name]
        return lent

    def release(self, path: Path) -> None:
        """Free the weights that no other model uses, because the session of a model has closed.

        Args:
            path: the file of the model.
        """
        for name, users in list(self._users.items()):
            users.discard(path)
            if not users:
                del self._users[name]
                self._lent.pop(name, None)
