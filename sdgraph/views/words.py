"""Nodes in words: what they call, their modules with options, their shapes."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable

import torch
from torch import fx

from ..ir.nodes import called, values
from ..ir.state import GraphState

SHORT = {"scaled_dot_product_attention": "sdpa", "truediv": "div", "concat": "cat"}
DEFAULTS = "stride=1|bias=True|affine=True|elementwise_affine=True|eps=[^,]*|inplace=False"
IDLE = ("to", "float", "contiguous")


def substance(graph: GraphState, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Return the operations and modules of nodes with their options, in order, without those that change no value.

    Regions of equal substance differ at most in operations that a clean-up removes: dropout, casts, divisions by one.
    """
    words = []
    for node in nodes:
        idle = (node.target in (operator.mul, operator.truediv) and 1 in node.args) or short_name(node) in IDLE
        if idle or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        word = module_words(graph, node) if node.op == "call_module" else short_name(node)
        if not word.startswith(("Dropout", "Identity")):
            words.append(word)
    return tuple(words)


def short_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls, in short form if there is one."""
    return SHORT.get(called(node), called(node))


def relative(path: str, base: str) -> str:
    """Return a module path as it is written inside the module `base`."""
    if path == base:
        return path.rpartition(".")[2]
    return path.removeprefix(f"{base}.") if base else path


def module_words(graph: GraphState, node: fx.Node) -> str:
    """Return a leaf module with its options without defaults, such as `Conv2d(4, 320, kernel_size=3, padding=1)`."""
    module = graph.module(str(node.target))
    options = re.sub(r"\((\d+), \1\)", r"\1", module.extra_repr())
    options = re.sub(rf", ({DEFAULTS})(?=,|$)", "", options)
    options = options.replace("in_features=", "").replace("out_features=", "")
    return f"{type(module).__name__}({options})" if options else type(module).__name__


def shape_words(graph: GraphState, node: fx.Node) -> str:
    """Return the shape of a node's value; of a tuple, the different shapes of its items."""
    nominal, generic = values(node)
    if isinstance(nominal, tuple | list):
        parts = [graph.dims.shape(n, g) for n, g in zip(nominal, generic, strict=True)]
        return ", ".join(dict.fromkeys(parts))
    return graph.shape(node)
