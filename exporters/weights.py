"""The weights of several models in one file, each once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

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
        path.touch()

    def take(self, model: onnx_ir.Model) -> None:
        """Let the initialisers of a model lie in the file."""
        import onnx_ir

        with self.path.open("ab") as file:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < INLINE_BYTES:
                    continue
                content = tensor.tobytes()
                digest = hashlib.sha256(content).digest()
                if digest not in self._places:
                    file.write(bytes(-file.tell() % (PAGE if len(content) >= LARGE_BYTES else LINE)))
                    self._places[digest] = file.tell()
                    file.write(content)
                value.const_value = onnx_ir.ExternalTensor(
                    self.path.name,
                    self._places[digest],
                    len(content),
                    tensor.dtype,
                    shape=tensor.shape,
                    name=str(value.name),
                    base_dir=str(self.path.parent),
                )
