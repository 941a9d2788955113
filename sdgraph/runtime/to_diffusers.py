"""Back to diffusers: the plain `UNet2DConditionModel` that computes what a graph computes, where one exists.

A configuration is proposed from the regions that are left; the plain model is traced; the two graphs are matched node
by node from the output. A complete match is the proof, and tells which weight goes where.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import fx

from ..compiler.passes import Pass
from ..compiler.runner import replay
from ..errors import ModeError, SdgraphError
from ..frontend.capture import capture
from ..graph import Graph
from ..ir.nodes import scope
from ..ir.variants import drop_inputs
from ..ir.weights import kind

PER_LEVEL = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
    "transformer_layers_per_block",
    "layers_per_block",
)


def to_diffusers(graph: Graph, held: Mapping[str, torch.Tensor]) -> UNet2DConditionModel:
    """Return a plain model with a copy of the weights, in evaluation mode.

    Args:
        graph: the graph.
        held: the parameters and buffers of the graph by name.
    Raises:
        ModeError: no plain model computes this; with the first difference.
    """
    config, names = counterpart(graph)
    plain = _empty(config, graph.dtype)
    state = {name: held[ours].clone() for name, ours in names.items()}
    kept = plain.state_dict().keys()
    plain.load_state_dict({name: state[name] for name in kept}, assign=True)
    for name in state.keys() - kept:
        path, _, leaf = name.rpartition(".")
        plain.get_submodule(path)._buffers[leaf] = state[name]
    return plain.eval()


def counterpart(graph: Graph) -> tuple[dict[str, Any], dict[str, str]]:
    """Find the plain model that computes what a graph computes.

    Args:
        graph: the graph.
    Returns:
        Its configuration, and for each of its parameters and buffers the name of the graph's tensor.
    Raises:
        ModeError: no plain model computes this; with the first difference.
    """
    config = propose(graph)
    try:
        plain = _empty(config, graph.dtype)
        traced = capture(plain, [i.name for i in graph.inputs if i.name == "encoder_attention_mask"])
        exact = [a for a in graph.passes if isinstance(a.one, Pass) and a.one.contract.kind == "exact"]
        other = replay(exact, traced)
    except (SdgraphError, ValueError, KeyError, RuntimeError) as error:
        raise _none(f"the remaining blocks fit no configuration: {error}") from error
    matched, names = _match(graph, other), {}
    held = {**dict(graph.weights.named_buffers()), **graph.weights.state_dict()}
    for name in dict.fromkeys((*plain.state_dict(), *(name for name, _ in plain.named_buffers()))):
        owner, _, leaf = name.rpartition(".")
        ours = names[name] = matched.get(name) or f"{matched.get(owner)}.{leaf}"
        if ours not in held:
            raise _none(f"the plain model needs {name!r}, which the graph does not use")
        before, after = traced.weights.get(name), other.weights.get(name)
        if after is not None and before.untyped_storage()._cdata != after.untyped_storage()._cdata:
            raise _none(f"a pass computed {ours!r} anew")
    left = next((name for name in graph.parameters() if name not in names.values()), None)
    if left is not None:
        raise _none(f"it has no place for {left!r}")
    return config, names


def _empty(config: Mapping[str, Any], dtype: torch.dtype) -> UNet2DConditionModel:
    """Return the plain model of a configuration, without numbers."""
    with torch.device("meta"):
        return torch.nn.Module.to(UNet2DConditionModel.from_config(config), dtype)


def propose(graph: Graph) -> dict[str, Any]:
    """Return the configuration with the blocks, layers and attentions that are left."""
    config = {k: v for k, v in graph.config.items() if not k.startswith("_") or k == "_class_name"}
    config["_class_name"] = "UNet2DConditionModel"
    paths = graph.paths()

    def count(block: str, kind: str) -> int:
        return len({m.group(1) for p in paths if (m := re.fullmatch(rf"{block}\.{kind}\.(\d+)", p))})

    levels = [i for i in range(len(config["down_block_types"])) if count(f"down_blocks.{i}", "resnets")]
    depth = len(config["up_block_types"])
    ups = [i for i in range(depth) if count(f"up_blocks.{i}", "resnets")]
    for key in PER_LEVEL:
        if isinstance(config.get(key), list | tuple):
            config[key] = [config[key][i] for i in levels]
    config["up_block_types"] = [config["up_block_types"][i] for i in ups]
    for side, which, without_attention in (("down", levels, "DownBlock2D"), ("up", ups, "UpBlock2D")):
        types = list(config[f"{side}_block_types"])
        for at, i in enumerate(which):
            if not count(f"{side}_blocks.{i}", "attentions") and "CrossAttn" in types[at]:
                types[at] = without_attention
        config[f"{side}_block_types"] = types
    layers = [count(f"down_blocks.{i}", "resnets") for i in levels]
    config["layers_per_block"] = layers[0] if len(set(layers)) == 1 else layers
    if not any(p == "mid_block" for p in paths):
        config["mid_block_type"] = None
    return config


def _match(graph: Graph, other: Graph) -> dict[str, str]:
    """Return the names of modules and tensors of `other`, each with its counterpart in `graph`.

    Raises:
        ModeError: at the first pair of nodes that differ.
    """
    ours, theirs = (drop_inputs(g.fx, {i.name for i in g.inputs if i.shape is None}) for g in (graph, other))
    names: dict[str, str] = {}
    pairs: dict[fx.Node, fx.Node] = {}
    outputs = [next(n for n in reversed(nodes.nodes) if n.op == "output") for nodes in (ours, theirs)]
    stack = [(outputs[0], outputs[1])]
    while stack:
        a, b = stack.pop()
        if a in pairs:
            if pairs[a] is not b:
                raise _none(f"{a.name} would be both {pairs[a].name} and {b.name}", a)
            continue
        pairs[a] = b
        same = a.op == b.op and len(a.all_input_nodes) == len(b.all_input_nodes)
        if a.op in ("call_module", "get_attr"):
            if same and _differs(graph, other, a, b):
                raise _none(f"{a.target} is not what the plain model has at {b.target}", a)
            names[str(b.target)] = str(a.target)
        elif a.op != "output":
            same = same and a.target == b.target
        arguments = [[], []]  # type: list[list[Any]]
        for node, found in zip((a, b), arguments, strict=True):
            fx.map_arg((node.args, node.kwargs), found.append)
        blank = [repr(fx.map_arg((n.args, n.kwargs), lambda _: None)) for n in (a, b)]
        if not same or blank[0] != blank[1] or len(arguments[0]) != len(arguments[1]):
            raise _none(f"the graph has {a.format_node()}, the plain model {b.format_node()}", a)
        stack += zip(*arguments, strict=True)
    return names


def _differs(graph: Graph, other: Graph, a: fx.Node, b: fx.Node) -> bool:
    one, two = graph.weights.get(str(a.target)), other.weights.get(str(b.target))
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one.shape != two.shape
    return one is None or two is None or kind(one) != kind(two)


def _none(reason: str, at: fx.Node | None = None) -> ModeError:
    return ModeError(
        f"no plain diffusers UNet computes this graph: {reason}",
        where=scope(at) if at is not None else "",
        hint="keep the GraphUNet (save_pretrained works on it), or remove the passes that diffusers has no block for",
    )
