"""Variants: the straight-line modules that run a graph, one for each set of reused sites, over one module's weights."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..errors import ModeError
from ..graph import Graph
from ..ir.variants import Variant
from ..ir.weights import TREE


class Variants:
    """The variants of a graph. Each is built when it is first asked for, and reads the module's tree as it is then."""

    def __init__(self) -> None:
        self._modules: dict[tuple[frozenset[str], frozenset[str]], fx.GraphModule] = {}
        self._compile: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self._modules)

    def of(self, module: nn.Module, graph: Graph, given: frozenset[str], reused: frozenset[str]) -> fx.GraphModule:
        """Return the module of one variant, see `GraphUNet.variant`.

        Args:
            module: holds the weights, under the names that the graph has for them.
            graph: the graph.
            given: the inputs of the call.
            reused: the sites that are not computed.
        Raises:
            ModeError: the module is offloaded in a way that a graph does not serve.
        """
        key = given, reused
        if key not in self._modules:
            _check_offload(module, graph)
            missing = {i.name for i in graph.inputs} - given
            call = Variant.split(graph.fx, reused, missing)
            variant = fx.GraphModule(module, call.nodes, class_name="UNet")
            for kind in TREE:  # not what is there now, but whatever will be there when it is called
                vars(variant)[kind] = vars(module)[kind]
            variant.meta |= {"reads": call.reads, "writes": call.writes}
            if self._compile is not None:
                variant.compile(**self._compile)
            self._modules[key] = variant
        return self._modules[key]

    def compile(self, options: dict[str, Any]) -> None:
        """Compile each variant when it is first run, with options of `torch.compile`."""
        self._compile = options
        self._modules.clear()

    @property
    def compiled(self) -> bool:
        """Whether variants are compiled, and so depend on what they were compiled from."""
        return self._compile is not None

    def clear(self) -> None:
        """Forget the variants."""
        self._modules.clear()


def _check_offload(module: nn.Module, graph: Graph) -> None:
    # accelerate's sequential hooks bring weights in when a module is called; a parameter that the graph reads by itself
    # belongs to no call.
    for node in graph.fx.nodes:
        if node.op == "get_attr" and any(user.target is not getattr for user in node.users):
            path, _, name = str(node.target).rpartition(".")
            holder = module.get_submodule(path)
            if hasattr(holder, "_hf_hook") and getattr(holder, name).is_meta:
                raise ModeError(
                    "this weight is read outside of any module, which sequential CPU offloading does not serve",
                    where=str(node.target),
                    hint="use pipe.enable_model_cpu_offload() instead of enable_sequential_cpu_offload()",
                )
