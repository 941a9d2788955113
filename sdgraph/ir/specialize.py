"""Specialization: graphs for one kind of call, over the same weights."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import EditError
from .nodes import eliminate_dead_code


def per_call(value: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return the first row of `value` if all samples of the call have one timestep, and all rows otherwise.

    It is for values that depend on the timestep alone. An exported graph has one timestep per call.

    Args:
        value: (B, ...).
        timestep: the input of the call, (1,) or (B,).
    Returns:
        (1, ...) or (B, ...).
    """
    if has_torch_function((value, timestep)):
        return handle_torch_function(per_call, (value, timestep), value, timestep)
    return value[:1] if torch.compiler.is_exporting() or timestep.shape[0] == 1 else value


def drop_inputs(nodes: fx.Graph, absent: Collection[str]) -> fx.Graph:
    """Return the graph for calls that leave out the optional inputs `absent`.

    A value that is computed from absent values alone is absent too. The sum of an absent and a present value is the
    present value. Attention with an absent mask has no mask.

    Raises:
        EditError: another operation has both absent and present tensors as inputs.
    """
    specialized, gone = copy_nodes(nodes), set()
    for node in list(specialized.nodes):
        if node.op == "placeholder":
            if node.name in absent:
                gone.add(node)
            continue
        if gone.isdisjoint(node.all_input_nodes):
            continue
        present = [a for a in node.args if a not in gone]
        if node.target in (operator.add, torch.add) and len(present) == 1:
            node.replace_all_uses_with(present[0])
        elif node.target is torch.nn.functional.scaled_dot_product_attention and gone.isdisjoint(node.args):
            node.update_kwarg("attn_mask", None)
            continue
        elif node.target is torch.baddbmm and len(present) == 2 and node.args[0] in gone:
            with specialized.inserting_before(node):  # diffusers' spelling of no mask: a tensor that beta=0 ignores
                nothing = specialized.call_method("new_empty", (present[0], ()))
            node.update_arg(0, nothing)
            node.update_kwarg("beta", 0)
            continue
        elif node.op == "output" or any(_is_tensor(n) for n in node.all_input_nodes if n not in gone):
            raise EditError(
                f"{node.name} cannot be computed without {', '.join(n.name for n in gone if n.op == 'placeholder')}",
                where=next(reversed(node.meta.get("nn_module_stack", {"": 0})), ""),
                hint="an optional input may only be added to something, or mask attention",
            )
        gone.add(node)
    eliminate_dead_code(specialized, unneeded=gone)
    return specialized


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def copy_nodes(nodes: fx.Graph) -> fx.Graph:
    """Return a new graph with copies of the nodes, with their names and meta."""
    copied = fx.Graph()
    output = copied.output(copied.graph_copy(nodes, {}))
    output.meta = dict(nodes.output_node().meta)
    return copied
