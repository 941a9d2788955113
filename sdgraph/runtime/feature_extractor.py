"""Values inside a UNet as further outputs of its graph, by module path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from ..errors import SpecError, TuningError
from ..graph import Graph
from ..ir.gates import insert_gates
from ..ir.regions import region_at
from ..ir.variants import Variant, copy_nodes
from ..options import Text, check
from .gradient_checkpointing import checkpoint_blocks
from .unet import GraphUNet


@dataclass(frozen=True)
class Tap:
    """A value inside a UNet.

    Args:
        path: a module path, such as `up_blocks.1`.
        part: "output": what the module returns, of a down block the hidden state and not the skips; "query" or "key":
            what its attention compares, (B, heads, tokens, features).
    Example:
        `Tap("up_blocks.1")`, `Tap("mid_block.attentions.0.transformer_blocks.0.attn2", "query")`
    """

    path: Text
    part: Literal["output", "query", "key"] = "output"

    def __post_init__(self) -> None:
        check(self, SpecError, "Tap")

    def node(self, graph: Graph) -> fx.Node:
        """Return the node of the value.

        Args:
            graph: the graph of the UNet.
        Raises:
            PathError: the graph has no such module; the error names the nearest ones.
            TuningError: the module has no attention that PyTorch's function computes.
        """
        region = region_at(graph, self.path)
        if self.part == "output":
            node = region.outputs[-1]
        else:
            attention = torch.nn.functional.scaled_dot_product_attention
            calls = [n for n in region.nodes if n.target is attention]
            if len(calls) != 1:
                raise TuningError(
                    f"{self.path} has {len(calls)} calls of scaled_dot_product_attention",
                    where=self.path,
                    hint="name one attention, such as ...transformer_blocks.0.attn2, that no pass has replaced",
                )
            node = calls[0].all_input_nodes[("query", "key").index(self.part)]
        return node


class FeatureExtractor(nn.Module):
    """A UNet that computes everything and returns further values, as straight-line code over the UNet's own weights.

    Further outputs instead of hooks, because hooks do not survive wrapping, compiling or checkpointing.

    Args:
        unet: the UNet.
        taps: the values to return.
        inputs: the names of the inputs of its calls.
        gradient_checkpointing: whether to recompute the blocks in the backward pass, which saves memory.
        gated: the module paths of regions that have gates, see `sdgraph.ir.gates`.
    Example:
        `FeatureExtractor(unet, [Tap("mid_block")], frozenset(inputs))(inputs)`
    """

    def __init__(
        self,
        unet: GraphUNet,
        taps: Sequence[Tap],
        inputs: frozenset[str],
        gradient_checkpointing: bool = False,
        gated: Sequence[str] = (),
    ) -> None:
        super().__init__()
        graph = unet.graph
        nodes = copy_nodes(graph.fx)
        copies = {node.name: node for node in nodes.nodes}
        output = nodes.output_node()
        output.args = ((output.args[0], *(copies[tap.node(graph).name] for tap in taps)),)
        if gated:
            insert_gates(nodes, [graph.region(path) for path in gated])
        # Specialized with the further outputs in place, so that they follow where a node is replaced by another.
        call = Variant.split(nodes, missing={i.name for i in graph.inputs} - inputs)
        if call.returns_tuple:
            output = call.nodes.output_node()
            output.args = (output.args[0][0],)  # type: ignore[index]
        self.order = tuple(i.name for i in graph.inputs if i.name in inputs)
        module = fx.GraphModule(unet, call.nodes, class_name="FeatureExtractor")
        self.graph_module = checkpoint_blocks(module) if gradient_checkpointing else module

    def forward(self, inputs: dict[str, Tensor], gates: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the prediction (B, C, H, W), and the values of the taps in order.

        Args:
            inputs: the inputs of the UNet by name, (B, ...) each.
            gates: the gates, (gated,), or (gated, B) by sample; None if no region has one.
        """
        more = () if gates is None else (gates,)
        return self.graph_module(*(inputs[name] for name in self.order), *more)  # type: ignore[no-any-return]
