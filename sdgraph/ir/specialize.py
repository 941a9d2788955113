"""Specialising: a straight-line graph for one kind of call, over the same weights."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import EditError
from .liveness import eliminate_dead_code


def per_call(value: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """`value`, (B, ...), for the call: its first row if all samples have one timestep, else all rows.

    For what depends on the timestep alone. Exported graphs take one timestep per call.

    Args:
        timestep: as the call gave it: (1,) or (B,).
    """
    if has_torch_function((value, timestep)):
        return handle_torch_function(per_call, (value, timestep), value, timestep)
    return value[:1] if torch.compiler.is_exporting() or timestep.shape[0] == 1 else value


def drop_inputs(nodes: fx.Graph, absent: Collection[str]) -> fx.Graph:
    """The graph for calls that leave out the optional inputs `absent`.

    What would be computed from an absent input alone is absent; adding it leaves the other side; an absent attention
    mask is none.

    Raises:
        EditError: something else is computed from an absent input and from one that is there.
    """
    made, gone = copy_nodes(nodes), set()
    for node in list(made.nodes):
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
            with made.inserting_before(node):  # diffusers' own spelling of no mask: a tensor that beta=0 ignores
                nothing = made.call_method("new_empty", (present[0], ()))
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
    eliminate_dead_code(made, unneeded=gone)
    return made


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def copy_nodes(nodes: fx.Graph) -> fx.Graph:
    """The same nodes, with their names and meta, in a graph of their own."""
    copied = fx.Graph()
    output = copied.output(copied.graph_copy(nodes, {}))
    output.meta = dict(nodes.output_node().meta)
    return copied
