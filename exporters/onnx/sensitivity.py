"""The error that each layer makes in 8 bits, the time that it saves, and the layers to leave in float for a goal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdgraph.extra import imported

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, np.dtype[Any]]
Range = tuple[float, float]
GATES = "sdgraph.gates"  # an input of the gated model: 1 for each layer in 8 bits, else 0
REPEATS = 3


@dataclass(frozen=True)
class Layer:
    """A layer that can be computed in 8 bits.

    Args:
        path: the path of its module.
        error: the squared error of the prediction if it alone has 8 bits, relative to the squared prediction.
        saved: the time that 8 bits save, in seconds per call.
    """

    path: str
    error: float
    saved: float


def cheapest(layers: Sequence[Layer], bound: float) -> tuple[str, ...]:
    """Return the paths of the layers to leave in float, so that 8 bits save the most time within an error.

    Errors of layers add up, for they are nearly independent.

    Args:
        layers: the layers.
        bound: the largest sum of the errors of the layers in 8 bits.
    """
    optimize = imported("scipy.optimize", "pruning")
    errors = np.array([layer.error for layer in layers])
    saved = np.array([max(layer.saved, 0.0) for layer in layers])
    found = optimize.milp(
        -(saved / (saved.max() or 1.0) + 1e-3),  # what saves no time saves bytes
        integrality=np.ones(len(layers)),
        bounds=optimize.Bounds(0, 1),
        constraints=optimize.LinearConstraint(errors[None] / bound, -np.inf, 1.0),
    )
    return tuple(layer.path for layer, chosen in zip(layers, found.x, strict=True) if chosen < 0.5)


def measured(
    model: Path,
    paths: Mapping[str, str],
    ranges: Mapping[str, Range],
    calls: Sequence[Mapping[str, Array]],
    eight_bits: Path,
    options: Any,
) -> list[Layer]:
    """Measure the layers of a model on calls of real generations.

    Args:
        model: the file of the model in float.
        paths: the path of the module of each layer, by the name of its node.
        ranges: the ranges of activations, by name.
        calls: the inputs of the calls, by name.
        eight_bits: the file of the model with all these layers in 8 bits.
        options: a function that makes the options of a session.
    """
    import onnx
    import onnxruntime

    gated = onnx.load(model, load_external_data=False)
    layers = [node for node in gated.graph.node if node.name in paths]
    outputs = [node.output[0] for node in layers]
    kinds = [node.op_type for node in layers]
    _gate(gated, layers, ranges)
    file = model.with_name(f"gated-{model.name}")  # beside the weights
    onnx.save(gated, file)
    session = onnxruntime.InferenceSession(file, options(), providers=["CPUExecutionProvider"])
    file.unlink()
    errors = np.zeros(len(layers))
    for call in calls:
        gates = np.zeros(len(layers), np.float32)
        reference = session.run(["out_sample"], {**call, GATES: gates})[0]
        for number in range(len(layers)):
            gates[:] = 0
            gates[number] = 1
            off = session.run(["out_sample"], {**call, GATES: gates})[0] - reference
            errors[number] += np.square(off, dtype=np.float64).sum() / np.square(reference, dtype=np.float64).sum()
    before, after = (_profile(path, calls[0], options()) for path in (model, eight_bits))
    faster = {
        "Conv": 1 - _of(after, ("QLinearConv", "QuantizeLinear", "DequantizeLinear")) / max(_of(before, ("Conv",)), 1),
        "MatMul": _products(before, after),
    }
    found = []
    for node, output, kind, error in zip(layers, outputs, kinds, errors / len(calls), strict=True):
        names = (node.name, output, f"{output}_nchwc")  # as ONNX Runtime names what it optimises
        spent = next((before[name][1] for name in names if name in before), 0.0)
        share = faster["Conv" if kind == "Conv" else "MatMul"]
        found.append(Layer(paths[node.name], float(error), 1e-6 * spent * share))
    return found


def _of(profile: Mapping[str, tuple[str, float]], kinds: Sequence[str]) -> float:
    return sum(spent for kind, spent in profile.values() if kind in kinds)


def _products(before: Mapping[str, tuple[str, float]], after: Mapping[str, tuple[str, float]]) -> float:
    """Return the share of the time of matrix products that 8 bits save, on those that have them."""
    chosen = [name for name, (kind, _) in after.items() if kind == "MatMulIntegerToFloat" and name in before]
    total = sum(before[name][1] for name in chosen)
    return 1 - sum(after[name][1] for name in chosen) / total if total else 0.0


def _profile(path: Path, call: Mapping[str, Array], options: Any) -> dict[str, tuple[str, float]]:
    """Return the operator and the least time of each node of a model, in microseconds, by name."""
    import onnxruntime

    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_name("profile"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(REPEATS):
        session.run(None, dict(call))
    log = Path(session.end_profiling())
    events = json.loads(log.read_text())
    log.unlink()
    found: dict[str, tuple[str, float]] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"]:
            spent = min(found.get(name, ("", np.inf))[1], float(event["dur"]))
            found[name] = event["args"]["op_name"], spent
    return found


def _gate(model: onnx.ModelProto, layers: Sequence[onnx.NodeProto], ranges: Mapping[str, Range]) -> None:
    """Let an input say which layers round their activations and weights to 8 bits."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    graph.input.append(helper.make_tensor_value_info(GATES, TensorProto.FLOAT, (len(layers),)))
    number_of = {node.name: number for number, node in enumerate(layers)}
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: Array) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def rounded(value: str, scale: list[str], name: str, gate: str, output: str, axis: int | None = None) -> str:
        """Append nodes that round a value if the gate is 1."""
        along: dict[str, Any] = {} if axis is None else {"axis": axis}
        nodes.append(helper.make_node("QuantizeLinear", [value, *scale], [f"{name}.q"], **along))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", *scale], [f"{name}.dq"], **along))
        nodes.append(helper.make_node("Sub", [f"{name}.dq", value], [f"{name}.off"]))
        nodes.append(helper.make_node("Mul", [f"{name}.off", gate], [f"{name}.gated"]))
        nodes.append(helper.make_node("Add", [value, f"{name}.gated"], [output]))
        return output

    def scale_of(value: str, name: str) -> list[str]:
        low, high = ranges[value]
        step = max((high - low) / 255, 1e-12)
        zero = np.array(np.clip(round(-low / step), 0, 255), np.uint8)
        return [constant(f"{name}.scale", np.array(step, np.float32)), constant(f"{name}.zero", zero)]

    for node in list(graph.node):
        if node.name not in number_of:
            nodes.append(node)
            continue
        number = number_of[node.name]
        key = f"sdgraph.gate.{number}"
        index = constant(f"{key}.index", np.array(number, np.int64))
        nodes.append(helper.make_node("Gather", [GATES, index], [key]))
        value, weight, output = node.input[0], node.input[1], node.output[0]
        node.input[0] = rounded(value, scale_of(value, f"{key}.x"), f"{key}.x", key, f"{key}.x.in")
        axis, rank = _channels(node)
        largest, scale = f"{key}.w.largest", f"{key}.w.scale"
        axes = constant(f"{key}.w.axes", np.array([a for a in range(rank) if a != axis], np.int64))
        nodes.append(helper.make_node("Abs", [weight], [f"{key}.w.abs"]))
        nodes.append(helper.make_node("ReduceMax", [f"{key}.w.abs", axes], [largest], keepdims=0))
        nodes.append(helper.make_node("Div", [largest, constant(f"{key}.127", np.array(127, np.float32))], [scale]))
        shape = helper.make_node("Shape", [scale], [f"{key}.w.shape"])
        zeros = helper.make_node(
            "ConstantOfShape", [f"{key}.w.shape"], [f"{key}.w.zero"],
            value=helper.make_tensor("zero", TensorProto.INT8, [1], [0]),
        )  # fmt: skip
        nodes.extend((shape, zeros))
        node.input[1] = rounded(weight, [scale, f"{key}.w.zero"], f"{key}.w", key, f"{key}.w.in", axis)
        nodes.append(node)
        if node.op_type == "Conv":
            node.output[0] = f"{key}.y.out"
            rounded(node.output[0], scale_of(output, f"{key}.y"), f"{key}.y", key, output)
    del graph.node[:]
    graph.node.extend(nodes)


def _channels(node: onnx.NodeProto) -> tuple[int, int]:
    """Return the axis of the output channels of a layer's weight, and the rank of the weight."""
    if node.op_type == "Conv":
        return 0, 4
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return (0 if transposed else 1), 2
