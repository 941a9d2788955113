"""PyTorch's backend: the straight-line modules that run a graph, one for each set of reused sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..errors import ModeError
from ..graph import Graph
from ..ir.variants import Variant
from ..ir.weights import TREE


class TorchBackend:
    """The variants of a graph as modules, each built when it is first needed, over the weights of the graph.

    Args:
        graph: the graph.
        options: the options of `torch.compile`, with which each variant is compiled; None runs them as they are.
    """

    def __init__(self, graph: Graph, options: Mapping[str, Any] | None = None) -> None:
        self.sites, self.options = graph.sites, options
        self._graph = graph
        self._modules: dict[tuple[frozenset[str], frozenset[str]], fx.GraphModule] = {}

    def __len__(self) -> int:
        return len(self._modules)

    def compute(
        self, inputs: Mapping[str, torch.Tensor], reused: frozenset[str], read: Callable[[str], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the output of a call that reuses some sites, and the values of the sites that it computed.

        Args:
            inputs: the inputs of the call, by name, in graph order.
            reused: the sites that are not computed.
            read: the function that returns the value of a reused site.
        """
        module = self.module(frozenset(inputs), reused)
        result = module(*inputs.values(), *map(read, module.meta["reads"]))
        if not self.sites:
            return result, {}
        output, *computed = result
        return output, dict(zip(module.meta["writes"], computed, strict=True))

    def module(self, given: frozenset[str], reused: frozenset[str]) -> fx.GraphModule:
        """Return the module of one variant, see `GraphUNet.variant`.

        Args:
            given: the names of the inputs of the call.
            reused: the sites that are not computed.
        Raises:
            ModeError: the weights are offloaded in a way that a graph does not serve.
        """
        key = given, reused
        if key not in self._modules:
            self._check_offload()
            variant = Variant.split(self._graph.fx, reused, {i.name for i in self._graph.inputs} - given)
            module = fx.GraphModule(self._graph.weights, variant.nodes, class_name="UNet")
            for kind in TREE:  # not what is there now, but whatever will be there when it is called
                vars(module)[kind] = vars(self._graph.weights)[kind]
            module.meta |= {"reads": variant.reads, "writes": variant.writes}
            if self.options is not None:
                module.compile(**self.options)
            self._modules[key] = module
        return self._modules[key]

    def clear(self) -> None:
        """Forget the modules, because what they were built from has changed."""
        self._modules.clear()

    def rescheduled(self, graph: Graph) -> TorchBackend:
        """Return a backend with the same modules for a graph whose sites have other schedules.

        Args:
            graph: the graph, over the same nodes and weights.
        """
        other = TorchBackend(graph, self.options)
        other._modules = self._modules
        return other

    def _check_offload(self) -> None:
        # accelerate's sequential hooks bring weights in when a module is called; a parameter that the graph reads by
        # itself belongs to no call.
        for node in self._graph.fx.nodes:
            if node.op == "get_attr" and any(user.target is not getattr for user in node.users):
                path, _, name = str(node.target).rpartition(".")
                holder = self._graph.weights.get_submodule(path)
                if hasattr(holder, "_hf_hook") and getattr(holder, name).is_meta:
                    raise ModeError(
                        "this weight is read outside of any module, which sequential CPU offloading does not serve",
                        where=str(node.target),
                        hint="use pipe.enable_model_cpu_offload() instead of enable_sequential_cpu_offload()",
                    )
