"""Checks of an untrusted model file, before ONNX Runtime opens it."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sdgraph.errors import SavedError

from .manifest import AGAIN


def check_model(path: Path, files: Collection[str]) -> int:
    """Refuse a model file whose weights lie outside of its directory or beyond the end of their file.

    Args:
        path: the model file.
        files: the names of the files that have a hash; weights may lie in no others.
    Returns:
        the bytes of the file and of the weights that it reads.
    Raises:
        SavedError: the file is unsafe or damaged; the message says why.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # the classes of protobuf's errors depend on its implementation
        raise SavedError(f"{path.name} is damaged", where=str(path), hint=AGAIN) from error
    read: dict[tuple[str, int], int] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location, start, end = _check_external(tensor, path, files)
            read[location, start] = end - start
    if model.functions or any(n.domain not in ("", "ai.onnx", "com.microsoft") for n in nodes_of(model.graph)):
        raise SavedError("the model defines operators", where=str(path), hint=AGAIN)
    return path.stat().st_size + sum(read.values())


def nodes_of(graph: Any) -> Iterator[Any]:
    """Iterate over the nodes of an ONNX graph and of the graphs within it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes_of(inner)


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _check_external(tensor: Any, path: Path, files: Collection[str]) -> tuple[str, int, int]:
    """Require that a tensor lies in the directory, in a file with a hash, before its end. Return file, start, end."""
    from onnx import helper

    entry = {entry.key: entry.value for entry in tensor.external_data}
    location = entry.get("location", "")
    if location != os.path.basename(location) or location in ("", ".", "..") or "\\" in location:
        raise SavedError(f"weights outside of the directory: {location[:100]!r}", where=tensor.name, hint=AGAIN)
    if location not in files:
        raise SavedError(f"{location} has no hash in the manifest", where=tensor.name, hint=AGAIN)
    file = path.parent / location
    if not file.is_file():
        raise SavedError(f"{location} is missing", where=str(path.parent), hint=AGAIN)
    try:
        start, length = int(entry.get("offset", 0)), int(entry.get("length", 0))
        wanted = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims)
    except (ValueError, KeyError) as error:
        raise SavedError(f"the place of {tensor.name} is damaged", where=str(path), hint=AGAIN) from error
    if min(start, length, *tensor.dims) < 0:
        raise SavedError(f"the place of {tensor.name} is damaged", where=str(path), hint=AGAIN)
    end = start + max(length, wanted)
    if end > file.stat().st_size:
        raise SavedError(f"{location} is truncated: {tensor.name} ends at {end}", where=str(file), hint=AGAIN)
    return location, start, end
