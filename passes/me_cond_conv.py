"""`MECondConv`: convolutions as mixtures of experts, whose kernel is mixed anew at each call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from sdgraph import Contract, Findings, Graph, Pass
from sdgraph.errors import EditError, SpecError

from .conditional_conv import ConditionalConv2d

ROUTINGS = ("timestep", "input")
DONORS = ("pruned", "copies")
GATES = ("softmax", "sigmoid")
CLOSE = Contract.CLOSE(rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class MECondConv(Pass):
    """Rewrite convolutions into multi-expert conditional convolutions (ME-CondConv).

    The kernel is a sum of experts' kernels, whose weights are computed from the time embedding or from the input.
    Expert 0 is the convolution itself; the others are convolutions that pruning has removed, of the same shape, from
    whichever layer (A-SDM's cross-layer ME-CondConv, which inherits the original parameters), and copies where there
    are none. Conditional convolutions are Yang et al., 2019 (CondConv); what is routed by, and how it starts, is ours,
    for the bodies of A-SDM's papers were not at hand.

    At first expert 0 counts 1 and the others 0, so nothing changes; training moves it. For that the gate is centred:
    experts are added to the convolution's own kernel with gates softmax(z/T) - 1/E, or sigmoid(z/T) - 1/2, and z = 0 at
    first, where gradients are alive. So the sum that is added is zero, and the result the same bit for bit, whatever
    the channels, the precision and the layout in memory.

    Mixing reads all experts once per call, which shows where maps are small and batches too. With timestep routing
    `<path>.mix` is a region like any other: `InheritFeatures("**.mix", Uniform(10))` mixes at every tenth call.

    Args:
        where: paths or patterns of convolutions; by default those of the resnets next to what was pruned.
        experts: of each convolution, E.
        routing: "timestep": one kernel for a call whose samples have one timestep, mixed once, so that experts cost
            parameters and no convolutions; a timestep for each sample, as in training, costs a second convolution.
            "input": a kernel for each sample, from the mean of its input.
        donors: "pruned" convolutions, then copies; or "copies" only.
        gate: "softmax" or "sigmoid".
        temperature: T; a buffer, `<path>.temperature`, that training may change.
    Raises:
        SpecError: an option that names nothing.
        PathError, EditError: no such convolution; nothing was pruned; no time embedding.
    """

    where: str | tuple[str, ...] = ()
    experts: int = 4
    routing: str = "timestep"
    donors: str = "pruned"
    gate: str = "softmax"
    temperature: float = 1.0

    @property
    def contract(self) -> Contract:  # type: ignore[override]
        """A kernel for each sample means another algorithm, and other last bits."""
        return Contract.EXACT if self.routing == "timestep" else CLOSE

    def __post_init__(self) -> None:
        for name, known in (("routing", ROUTINGS), ("donors", DONORS), ("gate", GATES)):
            if getattr(self, name) not in known:
                hint = f"one of {', '.join(known)}"
                raise SpecError(f"no {name} {getattr(self, name)!r}", where="MECondConv", hint=hint)
        if isinstance(self.experts, bool) or not isinstance(self.experts, int) or self.experts < 2:
            raise SpecError(f"experts is {self.experts!r}", where="MECondConv", hint="a whole number, at least 2")
        if not self.temperature > 0:
            raise SpecError(f"temperature is {self.temperature!r}", where="MECondConv", hint="a number above 0")
        if not isinstance(self.where, str):
            object.__setattr__(self, "where", tuple(self.where))

    def run(self, graph: Graph) -> Findings:
        embedding = time_embedding(graph)
        if self.routing == "timestep" and embedding is None:
            raise EditError("no layer takes a time embedding", where="MECondConv", hint="routing='input'")
        removed_convs = [(r.path, r.module) for r in graph.removals if isinstance(r.module, nn.Conv2d)]
        pool = removed_convs if self.donors == "pruned" else []
        if self.donors == "pruned" and not pool:
            raise EditError(
                "no convolutions were pruned from this graph", where="MECondConv",
                hint="apply it together with PruneBlocks, after it; or donors='copies'",
            )  # fmt: skip
        edits = []
        for node in self._targets(graph):
            path = str(node.target)
            conv = _conv(graph, path)
            donors = [(name, one) for name, one in pool if _same_shape(one, conv)]
            donors = sorted(donors, key=lambda each: _block(each[0]) != _block(path))[: self.experts - 1]
            pool = [each for each in pool if each not in donors]
            convs = [conv, *(one for _, one in donors)]
            width: int = conv.in_channels
            if self.routing == "timestep" and embedding is not None:
                width = int(embedding.meta["val"].shape[1])
            module = ConditionalConv2d(convs, self.experts, width, self.gate, self.temperature)
            extra = (embedding, graph.input("timestep")) if self.routing == "timestep" else ()
            made = graph.insert(module, node.args[0], *extra, before=node.next, path=path, leaving=[node])
            graph.rewire(node, made)
            graph.eliminate_dead_code()
            copies = self.experts - len(convs)
            names = ", ".join(name for name, _ in donors)
            told = [f"experts from {names}"] * bool(donors) + [f"{copies} copies of its own"] * bool(copies)
            edits.append(f"{path}: {' and '.join(told)}")
        return Findings(edits=tuple(edits))

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


def _conv(graph: Graph, path: str) -> nn.Conv2d:
    found = graph.module(path)
    if not isinstance(found, nn.Conv2d):
        raise EditError(
            f"{path} is a {type(found).__name__}", where=path, hint="name nn.Conv2d modules, as in '**.conv2'"
        )
    return found


def time_embedding(graph: Graph) -> fx.Node | None:
    """What all resnets make their time projections of, before the activation; (B, D)."""
    for node in graph.nodes:
        if node.op == "call_module" and str(node.target).endswith(".time_emb_proj"):
            activated = node.args[0]
            return activated.args[0] if isinstance(activated, fx.Node) else None  # type: ignore[return-value]
    return None


def _next_to_removed(graph: Graph) -> list[str]:
    """The 3x3 convolutions of resnets in blocks that lost a module, and in the neighbours of blocks that are gone."""
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
    found = [p for p in paths if _block(p) in touched and ".resnets." in p and p.endswith((".conv1", ".conv2"))]
    if not found:
        raise EditError(
            "nothing was pruned from this graph", where="MECondConv", hint="where='up_blocks.*.resnets.*.conv2', say"
        )
    return found


def _block(path: str) -> str:
    names = path.split(".")
    return "mid_block" if names[0] == "mid_block" else ".".join(names[:2]) if names[0].endswith("_blocks") else ""


def _order(block: str) -> tuple[int, int]:
    """Blocks as the main flow passes them."""
    side, _, number = block.partition(".")
    return ("down_blocks", "mid_block", "up_blocks").index(side), int(number or 0)


def _same_shape(one: nn.Module, other: nn.Conv2d) -> bool:
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return (
        isinstance(one, nn.Conv2d)
        and one.weight.shape == other.weight.shape
        and (one.bias is None) == (other.bias is None)
        and all(getattr(one, name) == getattr(other, name) for name in names)
    )
