"""Variants: the straight-line graphs of the calls, one for each set of reused sites, over the same weights."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import EditError
from .nodes import eliminate_dead_code
from .sites import bypass, sites


@dataclass(frozen=True)
class Variant:
    """The straight-line graph of the calls that reuse one set of sites.

    Args:
        nodes: the graph. Its arguments are the call's inputs, then the values that are read from the cache; it returns
            the output, then the values to write to the cache, as one tuple.
        reads: the sites whose values are arguments, in order.
        writes: the sites whose values are returned, in order.
        returns_tuple: False if the graph has no sites; it then returns the output alone.
    """

    nodes: fx.Graph
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    returns_tuple: bool = True

    @classmethod
    def split(cls, nodes: fx.Graph, reused: Collection[str] = (), missing: Collection[str] = ()) -> Variant:
        """Return the variant of a graph for the calls that reuse some sites.

        Every other site that the output depends on is computed, and its value is returned. Nodes that only feed values
        that are not used are removed. A graph without sites returns its output as it is.

        Args:
            nodes: the graph, which stays as it is.
            reused: the sites whose values are read, or which are bypassed.
            missing: the optional inputs that the call leaves out.
        Returns:
            the variant, over copies of the nodes.
        Raises:
            EditError: the output cannot be computed without the missing inputs.
        """
        variant = drop_inputs(nodes, missing)
        if not sites(variant):
            return cls(variant, (), (), returns_tuple=False)
        given = [node for node in variant.nodes if node.op == "placeholder"]
        arguments: dict[str, fx.Node] = {}
        for site, node in sites(variant).items():
            if node.target is bypass:
                node.replace_all_uses_with(node.args[site in reused])  # type: ignore[arg-type]
                variant.erase_node(node)
            elif site in reused:
                with variant.inserting_after([*given, *arguments.values()][-1]):
                    arguments[site] = value = variant.placeholder(f"reused_{len(arguments)}")
                value.meta = {key: node.meta[key] for key in ("val", "probe", "nn_module_stack") if key in node.meta}
                node.replace_all_uses_with(value)
                variant.erase_node(node)
        eliminate_dead_code(variant, unneeded=arguments.values())
        results: dict[str, fx.Node] = {}
        for site, node in sites(variant).items():
            results[site] = value = node.all_input_nodes[0]
            node.replace_all_uses_with(value)
            variant.erase_node(node)
        output = variant.output_node()
        output.args = ((output.args[0], *results.values()),)
        reads = tuple(site for site, node in arguments.items() if not node._erased)
        return cls(variant, reads, tuple(results))


def per_call(value: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return the first row of `value` if all samples of the call have one timestep, and all rows otherwise.

    It is for values that depend on the timestep alone. An exported graph has one timestep per call.

    Args:
        value: (B, ...).
        timestep: the input of the call, (1,) or (B,).
    Returns:
        (1, ...) or (B, ...).
    Example:
        `kernel = per_call(kernels, timestep)`
    """
    if has_torch_function((value, timestep)):
        return handle_torch_function(per_call, (value, timestep), value, timestep)
    return value[:1] if torch.compiler.is_exporting() or timestep.shape[0] == 1 else value


def drop_inputs(nodes: fx.Graph, missing: Collection[str]) -> fx.Graph:
    """Return the graph for calls that leave out the optional inputs `missing`.

    A value that is computed from missing values alone is missing too. The sum of a missing and a present value is the
    present value. Attention with a missing mask has no mask.

    Raises:
        EditError: another operation has both missing and present tensors as inputs.
    """
    specialized, gone = copy_nodes(nodes), set()
    for node in list(specialized.nodes):
        if node.op == "placeholder":
            if node.name in missing:
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
