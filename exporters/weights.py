"""The weights of several models in one file, each once; and on a device, each once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdgraph.errors import SavedError

from .manifest import AGAIN

if TYPE_CHECKING:
    import onnx_ir

# Small tensors stay in the model: shape inference does not read constants from external data.
INLINE_BYTES = 1024
# Large tensors begin at a page, so that they can be mapped into memory as they lie.
LARGE_BYTES, PAGE, LINE = 1 << 20, 4096, 64


class Weights:
    """A file of tensors, told apart by their content.

    Args:
        path: of the file; it is made, empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}
        self._names: dict[str, bytes] = {}
        path.touch()

    def take(self, model: onnx_ir.Model) -> None:
        """Let the initialisers of a model lie in the file. A name stands for the same tensor in all models."""
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


class SharedWeights:
    """The weights of several sessions on a device. Left to itself, each session brings its own there.

    Args:
        folder: of the models.
        device: of the sessions.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self._lent: dict[str, tuple[int, torch.Tensor, Any]] = {}  # sessions have their addresses only

    def lend(self, path: Path, session_options: Any) -> None:
        """Let the session that will open a model take its weights from here."""
        import onnx
        import onnxruntime

        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            place = {each.key: each.value for each in tensor.external_data}
            offset = int(place.get("offset", 0))
            if tensor.name in self._lent:
                if self._lent[tensor.name][0] != offset:
                    raise SavedError(f"{tensor.name} is two weights", where=str(path), cure=AGAIN)
                continue
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            lies = np.memmap(self.folder / place["location"], dtype, "c", offset, tuple(tensor.dims))
            weight = torch.from_numpy(lies).to(self.device)
            value = onnxruntime.OrtValue.from_dlpack(weight)
            session_options.add_initializer(tensor.name, value)
            self._lent[tensor.name] = offset, weight, value
