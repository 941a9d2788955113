"""From an fx module to an ONNX graph, through `torch.export` and torch's own translator."""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from onnxscript.optimizer import fold_constants_ir
from torch import fx

from sdgraph.errors import ExportError
from sdgraph.ir.inputs import Input

from ..bundle.manifest import NAMES
from .simplify import simplify

log = logging.getLogger("sdgraph")


class Undecomposed(torch.export.ExportedProgram):
    """A program whose operators the translator knows as they are.

    The translator starts with `run_decompositions`, which traces the program once more: a third of an export's time,
    for nothing here. The graph is functional; convolution, linear, normalisation and attention are translated whole.
    """

    def run_decompositions(self, decomp_table: Any = None, **options: Any) -> torch.export.ExportedProgram:
        if any(node.target in (decomp_table or {}) for node in self.graph.nodes):
            decomposed: torch.export.ExportedProgram = super().run_decompositions(decomp_table, **options)
            simplify(decomposed.graph)
            return decomposed
        return self


def capture(
    module: fx.GraphModule, call: Mapping[str, torch.Tensor], inputs: Sequence[Input]
) -> torch.export.ExportedProgram:
    """The module as ATen operators for all sizes.

    Args:
        call: values of the inputs, by their names, in order.
        inputs: the module's, with their shapes.
    Raises:
        ExportError: torch.export failed.
    """
    names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    dynamic = {
        name: {i: torch.export.Dim.DYNAMIC for i, dim in enumerate(spec.shape or ()) if isinstance(dim, str)}
        for name, spec in zip(names, inputs, strict=True)
    }
    given = dict(zip(names, call.values(), strict=True))
    module = fx.GraphModule(module, module.graph)  # without those weights of the UNet that this one does not read
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(module, (), given, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export failed: {type(error).__name__}: {error}",
            hint="a pass may have written Python numbers where sizes belong; the cause is chained",
        ) from error
    simplify(program.graph)
    return program


def translate(program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    """The program as an ONNX model; its initialisers are the program's own tensors.

    Raises:
        ExportError: an operator has no translation.
    """
    try:
        return _translate(program, opset, Undecomposed)
    except torch.onnx.errors.OnnxExporterError as error:
        log.info("decomposing after all: %s", _reason(error))
    try:
        return _translate(program, opset, torch.export.ExportedProgram)
    except torch.onnx.errors.OnnxExporterError as error:
        hint = "an operator that a pass inserted may have no ONNX counterpart; the cause is chained"
        raise ExportError(f"the translation to ONNX failed: {_reason(error)}", hint=hint) from error


def _reason(error: BaseException) -> str:
    """Return the first line of the root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0]


def _translate(program: Any, opset: int, kind: type[torch.export.ExportedProgram]) -> ir.Model:
    program.__class__ = kind
    with quiet():
        exported = torch.onnx.export(program, opset_version=opset, dynamo=True, optimize=False, verbose=False)
    assert exported is not None
    return exported.model


def compact(model: ir.Model, inputs: Sequence[Input], outputs: Sequence[Input]) -> None:
    """Fold constants, drop what is unused or computed twice, and name everything for the reader.

    onnxscript's full optimiser takes 20 times as long, most of it in patterns that a UNet does not hold; ONNX Runtime
    fuses on its own when it loads.
    """
    weights = set(model.graph.initializers.values())
    # Nothing is folded out of a weight: that would copy it under a new name.
    fold_constants_ir(
        model, onnx_shape_inference=True, should_fold=lambda node: False if weights & {*node.inputs} else None
    )
    common.IdentityEliminationPass()(model)
    store_reshaped(model)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    for spec, value in (
        *zip(inputs, model.graph.inputs, strict=True),
        *zip(outputs, model.graph.outputs, strict=True),
    ):
        value.name = spec.name
        value.shape = ir.Shape([d if isinstance(d, int) else readable(d) for d in spec.shape or ()])
    for spec, value in zip(inputs, list(model.graph.inputs), strict=True):
        if spec.broadcast:
            expand_over_batch(model, value)
    # Tools that quantise or infer shapes read constants in one form only: tensors.
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    strip(model)


def store_reshaped(model: ir.Model) -> None:
    """Store weights as they are used: transposed as `name.T`, unsqueezed as `name.CxHxW`, cast as `name.float32`; made
    only when written."""
    initializers = model.graph.initializers
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type in ("Transpose", "Unsqueeze", "Cast") else None
        if weight is None or not weight.is_initializer() or weight.const_value is None:
            continue
        change: Callable[[Any], Any]
        dtype = weight.const_value.dtype
        shape = weight.const_value.shape.numpy()
        if node.op_type == "Transpose":
            axes = tuple(node.attributes["perm"].as_ints())
            change, ending = functools.partial(np.transpose, axes=axes), "T"
        elif node.op_type == "Cast":
            dtype = ir.DataType(node.attributes["to"].as_int())
            change, ending = operator.methodcaller("astype", dtype.numpy()), dtype.numpy().name
        else:
            places = node.inputs[1]
            if places is None or places.const_value is None:
                continue
            change = functools.partial(np.expand_dims, axis=tuple(places.const_value.numpy().tolist()))
            ending = ""
        shape = change(np.broadcast_to(np.float32(0), shape)).shape
        name = f"{weight.name}.{ending or 'x'.join(map(str, shape))}"
        if name not in initializers:
            tensor = _changed(weight.const_value, change, shape, dtype, name)
            kind = ir.TensorType(tensor.dtype)
            model.graph.register_initializer(ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=kind))
        node.outputs[0].replace_all_uses_with(initializers[name])
        model.graph.remove(node, safe=True)
        if not weight.uses():
            del initializers[str(weight.name)]


def _changed(
    tensor: Any, change: Callable[[Any], Any], shape: tuple[int, ...], dtype: ir.DataType, name: str
) -> ir.LazyTensor:
    def make() -> Any:
        return ir.tensor(np.ascontiguousarray(change(tensor.numpy())))

    return ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape), name=name)


def expand_over_batch(model: ir.Model, value: ir.Value) -> None:
    """Let an input hold one entry for the whole batch, as a scalar timestep does: gather its last entry for the rest.

    `Expand` would do the same, but ONNX Runtime's symbolic shape inference, with which quantisation begins, gives up
    where two free sizes are broadcast.
    """
    nodes: list[ir.Node] = []

    def compute(operator_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(operator_type, inputs, attributes))
        return nodes[-1].outputs[0]

    def constant(number: int | list[int]) -> ir.Value:
        nodes.append(ir.node("Constant", [], {"value": ir.tensor(np.array(number, np.int64))}))
        return nodes[-1].outputs[0]

    assert value.shape is not None
    users = [use.node for use in value.uses()]
    batch = compute("Squeeze", compute("Shape", model.graph.inputs[0], start=0, end=1), constant([0]))
    last = compute("Sub", compute("Shape", value, start=0, end=1), constant([1]))
    rows = compute("Min", compute("Range", constant(0), batch, constant(1)), last)
    expanded = compute("Gather", value, rows, axis=0)
    expanded.name, expanded.type = f"{value.name}_of_batch", value.type
    for user in users:
        for i, given in enumerate(user.inputs):
            if given is value:
                user.replace_input_with(i, expanded)
    value.shape = ir.Shape([f"{value.name}_batch", *value.shape.dims[1:]])
    model.graph.insert_before(model.graph[0], nodes)


def strip(model: ir.Model) -> None:
    """Leave each node its name and namespace; no source lines, no shapes in the names of one trace."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        kept = {key: text for key, text in node.metadata_props.items() if key == "namespace"}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
        value.shape = value.type = None  # a copy of what the tensor says, which a tool may change
    common.NameFixPass()(model)
    for node in model.graph:
        if node.op_type == "SkipLayerNormalization":
            for moment in node.outputs[1:3]:
                moment.name = ""  # optional; a name would ask for it


def readable(dim: str) -> str:
    """Return a size in the words of the ONNX file: `ceil(H/2)` is `ceil(height/2)`."""
    return re.sub(r"[A-Za-z]\w*", lambda word: NAMES.get(word[0], word[0]), dim)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of torch.export that the user cannot act on."""
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registry.level
    registry.setLevel(logging.ERROR)  # "torchvision is not installed", once per operator of torchvision
    try:
        with warnings.catch_warnings():
            # torch copying its own exported programs
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
            yield
    finally:
        registry.setLevel(level)
