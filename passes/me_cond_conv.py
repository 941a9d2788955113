"""`MECondConv`: convolutions as mixtures of experts, whose kernel is mixed anew at each call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import fx, nn

from sdgraph import Contract, Findings, Graph, Pass
from sdgraph.errors import EditError
from sdgraph.options import Bounds, Index, Positive, Text

from .conditional_conv import ConditionalConv2d
from .low_rank_conv import LowRankConv2d

CLOSE = Contract.CLOSE(rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class MECondConv(Pass):
    """Rewrite convolutions into multi-expert conditional convolutions (ME-CondConv).

    The kernel is a weighted sum of the kernels of experts. The weights are computed from the time embedding or from the
    input. Expert 0 is the convolution itself. The others are convolutions of the same shape that pruning has removed
    from any layer, as in A-SDM's cross-layer ME-CondConv. Where there are not enough, the rest are parts of the
    convolution, with its kernel for a share of the outputs: copies would never learn to differ.

    The rewritten UNet computes what it did before, until training changes it. Gates are centred: experts are added to
    the convolution's own kernel with the gates softmax(z/T) - 1/E or sigmoid(z/T) - 1/2. Initially z = 0, where
    gradients do not vanish. So the sum that is added is zero, and the result is the same bit for bit, whatever the
    channels, the precision and the layout in memory.

    Mixing reads all experts once per call, which is noticeable for small maps and batches. With timestep routing
    `<path>.mix` is a region like any other: `InheritFeatures("**.mix", Uniform(10))` mixes at every tenth call.

    With a `rank` the other experts are the convolution plus kernels of low rank. Two small convolutions add these to
    its result instead of mixing kernels. Their cost relative to the convolution's is rank·(E - 1) / output channels.

    Args:
        where: paths or patterns of convolutions; by default those of the resnets next to what was pruned.
        experts: the number of experts of a convolution, E.
        routing: "timestep" mixes one kernel for a call whose samples have the same timestep, so that experts cost
            parameters and no convolutions. If timesteps differ, as in training, a second convolution is needed.
            "input" mixes a kernel for every sample from the mean of its input.
        donors: "pruned" uses pruned convolutions first and then parts of the convolution; "copies" uses parts only.
        gate: "softmax" or "sigmoid".
        temperature: T; a buffer, `<path>.temperature`, that training may change.
        rank: 0 for experts with full kernels. Otherwise the rank of the difference between an expert and the
            convolution: initially the best approximation of it for a pruned convolution, and a part of the
            convolution's own kernel for every other expert. Biases are not part of such experts.
    Raises:
        SpecError: an option has an unknown value.
        PreconditionError: no convolution was pruned, or there is no time embedding.
        PathError, EditError: there is no such convolution, nothing was pruned, or the kernel is too small for the rank.
    Source:
        Conditional convolutions are those of Yang et al., 2019 (CondConv). What they are routed by, and their initial
        values, are ours, because the bodies of A-SDM's papers were not available.
    """

    where: str | tuple[Text, ...] = ()
    experts: Annotated[int, Bounds(ge=2)] = 4
    routing: Literal["timestep", "input"] = "timestep"
    donors: Literal["pruned", "copies"] = "pruned"
    gate: Literal["softmax", "sigmoid"] = "softmax"
    temperature: Positive = 1.0
    rank: Index = 0

    @property
    def contract(self) -> Contract:  # type: ignore[override]
        """EXACT, but for full kernels for every sample, which need another algorithm, with other last bits."""
        return Contract.EXACT if self.routing == "timestep" or self.rank else CLOSE

    def _time_is_embedded(self, graph: Graph) -> list[str]:
        """A layer takes a time embedding, where the timestep routes.

        Set routing='input'.
        """
        return ["the model"] if self.routing == "timestep" and time_embedding(graph) is None else []

    def _convolutions_were_pruned(self, graph: Graph) -> list[str]:
        """Convolutions were pruned from the graph, where they are to be experts.

        Apply it together with PruneBlocks, after it; or set donors='copies'.
        """
        return ["the model"] if self.donors == "pruned" and not _pruned(graph) else []

    preconditions = (_time_is_embedded, _convolutions_were_pruned)

    def run(self, graph: Graph) -> Findings:
        embedding, notes = time_embedding(graph), list[str]()
        pool = _pruned(graph) if self.donors == "pruned" else []
        for node in self._targets(graph):
            path = str(node.target)
            conv = _conv(graph, path)
            donors = [removed for removed in pool if _same_shape(removed.module, conv)]
            donors = sorted(donors, key=lambda donor: _block(donor.path) != _block(path))[: self.experts - 1]
            pool = [removed for removed in pool if removed not in donors]
            convs = [conv, *(donor.module for donor in donors)]
            routed_by: tuple[fx.Node, ...] = ()
            width: int = conv.in_channels
            if self.routing == "timestep" and embedding is not None:
                width, routed_by = embedding.meta["val"].shape[1], (embedding, graph.input("timestep"))
            module: nn.Module
            if self.rank:
                _check_rank(path, conv, (self.experts - 1) * self.rank)
                routed_by = routed_by[:1]  # for every sample, which costs no more
                module = LowRankConv2d(convs, self.experts, width, self.gate, self.temperature, self.rank)
            else:
                module = ConditionalConv2d(convs, self.experts, width, self.gate, self.temperature)
            graph.replace(node, module, node.args[0], *routed_by, path=path)
            parts = self.experts - len(convs)
            names = ", ".join(donor.path for donor in donors)
            origins = [f"experts from {names}"] * bool(donors) + [f"{parts} slices of its kernel"] * bool(parts)
            notes.append(f"{path}: {' and '.join(origins)}")
        return Findings(notes=tuple(notes))

    def _targets(self, graph: Graph) -> list[fx.Node]:
        paths = graph.matching(self.where) if self.where else _next_to_removed(graph)
        nodes = {str(n.target): n for n in graph.nodes if n.op == "call_module"}
        for path in paths:
            if path not in nodes:
                kind = graph.region(path).source_class or "no single module"
                raise EditError(f"{path} is a {kind}", where=path, hint="name nn.Conv2d modules, as in '**.conv2'")
            if _conv(graph, path).padding_mode != "zeros":
                raise EditError(f"{path} pads with other than zeros", where=path, hint="leave it out")
        return [nodes[path] for path in paths]


def _pruned(graph: Graph) -> list[Any]:
    """Return the convolutions that passes have removed."""
    return [removed for removed in graph.removals if isinstance(removed.module, nn.Conv2d)]


def _conv(graph: Graph, path: str) -> nn.Conv2d:
    module = graph.module(path)
    if not isinstance(module, nn.Conv2d):
        raise EditError(
            f"{path} is a {type(module).__name__}", where=path, hint="name nn.Conv2d modules, as in '**.conv2'"
        )
    return module


def _check_rank(path: str, conv: nn.Conv2d, rank: int) -> None:
    """Refuse a convolution whose kernel is too small for experts of a rank, all together."""
    outputs, inputs = len(conv.weight), conv.weight[0].numel()
    if conv.groups != 1 or rank > min(outputs, inputs):
        raise EditError(
            f"{path} has a kernel of {outputs}x{inputs} in {conv.groups} group(s), and experts of rank {rank} together",
            where=path,
            hint="a kernel in one group, and a rank times (experts - 1) of at most the smaller number; or leave it out",
        )


def time_embedding(graph: Graph) -> fx.Node | None:
    """Return the time embedding that all resnets project, before its activation; (B, D)."""
    for node in graph.nodes:
        if node.op == "call_module" and str(node.target).endswith(".time_emb_proj"):
            activated = node.args[0]
            return activated.args[0] if isinstance(activated, fx.Node) else None  # type: ignore[return-value]
    return None


def _next_to_removed(graph: Graph) -> list[str]:
    """Return the 3x3 convolutions of resnets in blocks that lost a module, and in neighbours of removed blocks."""
    paths = graph.paths()
    blocks = list(dict.fromkeys(_block(p) for p in (*paths, *graph.removed) if _block(p)))
    blocks.sort(key=_order)
    there = {_block(p) for p in paths}
    touched: set[str] = set()
    for removed in graph.removed:
        block = _block(removed)
        if block in there:
            touched.add(block)
        elif block:
            at = blocks.index(block)
            touched |= {
                *[b for b in reversed(blocks[:at]) if b in there][:1],
                *[b for b in blocks[at:] if b in there][:1],
            }
    convs = [p for p in paths if _block(p) in touched and ".resnets." in p and p.endswith((".conv1", ".conv2"))]
    if not convs:
        raise EditError(
            "nothing was pruned from this graph", where="MECondConv", hint="where='up_blocks.*.resnets.*.conv2', say"
        )
    return convs


def _block(path: str) -> str:
    names = path.split(".")
    return "mid_block" if names[0] == "mid_block" else ".".join(names[:2]) if names[0].endswith("_blocks") else ""


def _order(block: str) -> tuple[int, int]:
    """A key that sorts blocks in the order of the main flow."""
    side, _, number = block.partition(".")
    return ("down_blocks", "mid_block", "up_blocks").index(side), int(number or 0)


def _same_shape(module: nn.Module | None, conv: nn.Conv2d) -> bool:
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return (
        isinstance(module, nn.Conv2d)
        and module.weight.shape == conv.weight.shape
        and (module.bias is None) == (conv.bias is None)
        and all(getattr(module, name) == getattr(conv, name) for name in names)
    )
