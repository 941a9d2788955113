"""`MECondConv`: convolutions as mixtures of experts, whose kernel is mixed anew at each call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from sdgraph import Contract, Findings, Graph, Pass, per_call
from sdgraph.errors import EditError, SpecError

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


class Mixture(nn.Module):
    """What experts add to the kernel and the bias of a convolution.

    Args:
        convs: the convolution itself, which is expert 0, and the others; it is used again for those that lack.
        experts: how many, E.
    """

    def __init__(self, convs: Sequence[Any], experts: int) -> None:
        super().__init__()
        first = convs[0]
        others = [*convs[1:], *[first] * (experts - len(convs))]
        self.weight = nn.Parameter(torch.stack([one.weight.detach().to(first.weight).flatten() for one in others]))
        self.bias = (
            None
            if first.bias is None
            else nn.Parameter(torch.stack([one.bias.detach().to(first.bias) for one in others]))
        )

    def forward(self, gates: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, E), (O, I / groups, h, w) and (O) to (B, O, I / groups, h, w) and (B, O)."""
        kernels = summed(gates, weight, self.weight)
        return kernels, None if bias is None or self.bias is None else summed(gates, bias, self.bias)


def summed(gates: Tensor, first: Tensor, others: Tensor) -> Tensor:
    """The sum of experts for each row of gates: (B, E), the shape of an expert, and (E - 1, its size), to (B, ...)."""
    return (gates[:, :1] * first.flatten() + gates[:, 1:] @ others).reshape(-1, *first.shape)


class ConditionalConv2d(nn.Module):
    """A convolution to whose kernel and bias a sum of experts' is added, with gates computed at each call.

    The sum is zero at first, in every precision, so that the kernel is the convolution's own, bit for bit.

    Args:
        convs, experts: see `Mixture`.
        width: features that are routed by.
    """

    def __init__(self, convs: Sequence[Any], experts: int, width: int, gate: str, temperature: float) -> None:
        super().__init__()
        first = convs[0]
        like = {"dtype": first.weight.dtype, "device": first.weight.device}
        self.weight, self.bias = first.weight, first.bias
        self.mix = Mixture(convs, experts)
        self.routing = nn.Linear(width, experts, **like)
        nn.init.zeros_(self.routing.weight)
        nn.init.zeros_(self.routing.bias)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(temperature, **like))
        self.experts, self.gate = experts, gate
        self.options = (first.stride, first.padding, first.dilation, first.groups)

    def forward(self, x: Tensor, embedding: Tensor | None = None, timestep: Tensor | None = None) -> Tensor:
        """(B, I, H, W) to (B, O, H', W')."""
        if embedding is not None and timestep is not None:
            gates = self._gates(F.silu(per_call(embedding, timestep)))
            kernels, biases = self.mix(gates, self.weight, self.bias)
            return convolve(x, self.weight, self.bias, kernels, biases, *self.options)
        gates = self._gates(x.mean((2, 3)))
        return conditional_conv2d(x, gates, self.weight, self.bias, self.mix.weight, self.mix.bias, *self.options)

    def _gates(self, features: Tensor) -> Tensor:
        z = self.routing(features) / self.temperature
        return F.softmax(z, 1) - 1 / self.experts if self.gate == "softmax" else torch.sigmoid(z) - 0.5


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernels: Tensor,
    biases: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    """Convolution with a kernel to which others are added: one for all samples, or one for each sample.

    Those for each sample are convolved with alone, and the results added: a convolution with more groups rounds
    otherwise, and where it convolves with zeros that must not be seen.

    Args:
        x: (B, I, H, W).
        weight, bias: (O, I / groups, h, w) and (O).
        kernels, biases: what is added, (1 or B, O, I / groups, h, w) and (1 or B, O).
    """
    given = tuple(one for one in (x, weight, bias, kernels, biases) if one is not None)
    if has_torch_function(given):
        return handle_torch_function(
            convolve, given, x, weight, bias, kernels, biases, stride, padding, dilation, groups
        )
    if kernels.shape[0] > 1:
        plain = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return plain + by_sample(x, kernels, biases, stride, padding, dilation, groups)
    mixed = None if bias is None or biases is None else bias + biases[0]
    return F.conv2d(x, weight + kernels[0], mixed, stride, padding, dilation, groups)  # laid out as `weight` is


def by_sample(
    x: Tensor, kernels: Tensor, biases: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """Convolution with a kernel for each sample, as a convolution with more groups.

    Args:
        x: (B, I, H, W).
        kernels, biases: (B, O, I / groups, h, w) and (B, O).
    """
    B = x.shape[0]
    flat = None if biases is None else biases.flatten()
    out = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), flat, stride, padding, dilation, B * groups)
    return out.reshape(B, -1, *out.shape[2:])


def conditional_conv2d(
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    others: Tensor,
    biases: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    """Convolution with a kernel for each sample: `weight`, and the sum of experts, of which it is the first.

    Args:
        x: (B, I, H, W).
        gates: of the experts, (B, E).
        weight, bias: (O, I / groups, h, w) and (O).
        others, biases: (E - 1, O * I / groups * h * w) and (E - 1, O).
    """
    given = tuple(one for one in (x, gates, weight, bias, others, biases) if one is not None)
    if has_torch_function(given):
        return handle_torch_function(
            conditional_conv2d, given, x, gates, weight, bias, others, biases, stride, padding, dilation, groups
        )
    if not torch.compiler.is_exporting():
        kernels = weight + summed(gates, weight, others)
        mixed = None if bias is None or biases is None else bias + summed(gates, bias, biases)
        return by_sample(x, kernels, mixed, stride, padding, dilation, groups)
    # ONNX fixes the number of groups in the graph, so there every expert is convolved with
    count, channels = len(others), len(weight)

    def within_groups(each: Tensor) -> Tensor:
        return each.reshape(count, groups, -1, *each.shape[2:]).transpose(0, 1).flatten(0, 2)

    flat = None if biases is None else within_groups(biases)
    kernels = within_groups(others.reshape(count, *weight.shape))
    every = F.conv2d(x, kernels, flat, stride, padding, dilation, groups)
    every = every.reshape(-1, groups, count, channels // groups, *every.shape[2:])
    added = (every * gates[:, None, 1:, None, None, None]).sum(2).flatten(1, 2)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups) * (1 + gates[:, :1, None, None]) + added
