"""All variants in one ONNX file: each is a branch of an `If`, chosen by the input `variant`."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import helper

from ..bundle.manifest import CHOICE, Manifest

INT64 = onnx.TensorProto.INT64


def merge(models: Sequence[onnx.ModelProto], manifest: Manifest) -> onnx.ModelProto:
    """Return one model made of those of a manifest, in its order.

    Its inputs are those of a call, `variant`, the number of the variant to run, and `reused.SITE` of all sites; its
    outputs are the noise prediction and `computed.SITE` of all sites. Where a variant does not compute a site, its
    output is the value that was read.
    """
    kind = models[0].graph.output[0].type.tensor_type.elem_type
    weights: dict[str, onnx.TensorProto] = {}
    branches = [_branch(model.graph, i, manifest, weights) for i, model in enumerate(models)]
    names = [value.name for value in branches[0].output]
    nodes: list[onnx.NodeProto] = []
    chosen = branches[-1]
    for i in reversed(range(len(branches) - 1)):
        outputs = [name.partition("/")[2] if i == 0 else f"else{i}/{name.partition('/')[2]}" for name in names]
        steps = [
            helper.make_node("Constant", [], [f"number{i}"], value=helper.make_tensor("", INT64, [], [i])),
            helper.make_node("Equal", [CHOICE, f"number{i}"], [f"is{i}"]),
            helper.make_node("If", [f"is{i}"], outputs, then_branch=branches[i], else_branch=chosen),
        ]
        if i == 0:
            nodes = steps
        else:
            results = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
            chosen = helper.make_graph(steps, f"else{i}", [], results)
    first = models[0].graph
    values = [
        helper.make_tensor_value_info(f"reused.{value.site}", kind, [_dim(d) for d in value.shape])
        for value in manifest.kept
    ]
    results = [first.output[0], *(_renamed(value, "computed") for value in values)]
    choice = helper.make_tensor_value_info(CHOICE, INT64, [])
    graph = helper.make_graph(nodes, "unet", [*first.input, choice, *values], results, list(weights.values()))
    merged = helper.make_model(graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)
    merged.metadata_props.extend(models[0].metadata_props)
    merged.producer_name, merged.producer_version = models[0].producer_name, models[0].producer_version
    return merged


def _branch(
    graph: onnx.GraphProto, number: int, manifest: Manifest, weights: dict[str, onnx.TensorProto]
) -> onnx.GraphProto:
    """Return a graph without inputs, whose values have unique names; its weights go to `weights`."""
    names: dict[str, str] = {"": ""}
    for tensor in graph.initializer:
        name = tensor.name
        if name in weights and weights[name].SerializeToString() != tensor.SerializeToString():
            name = f"{number}/{name}"
        names[tensor.name] = name
        kept = onnx.TensorProto()
        kept.CopyFrom(tensor)
        kept.name = name
        weights[name] = kept
    given = {value.name for value in graph.input}
    nodes = []
    for node in graph.node:
        names |= {name: f"{number}/{name}" for name in node.output if name}
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.name = f"{number}/{node.name}"
        copied.input[:] = [name if name in given else names[name] for name in node.input]
        copied.output[:] = [names[name] for name in node.output]
        nodes.append(copied)
    variant = manifest.variants[number]
    for value in manifest.kept:
        if value.site not in variant.writes:
            passed = f"{number}/computed.{value.site}"
            nodes.append(helper.make_node("Identity", [f"reused.{value.site}"], [passed]))
    outputs = [graph.output[0].name, *(f"computed.{value.site}" for value in manifest.kept)]
    kind = graph.output[0].type.tensor_type.elem_type
    results = [helper.make_tensor_value_info(f"{number}/{name}", kind, None) for name in outputs]
    return helper.make_graph(nodes, f"model{number}", [], results)


def _dim(dim: int | str) -> int | str:
    from .translate import readable

    return dim if isinstance(dim, int) else readable(dim)


def _renamed(value: onnx.ValueInfoProto, kind: str) -> onnx.ValueInfoProto:
    port = onnx.ValueInfoProto()
    port.CopyFrom(value)
    port.name = f"{kind}.{value.name.partition('.')[2]}"
    return port
