"""Widths: the channels, heads and features that several weights share, which are therefore cut together.

They are derived from the graph. From each dimension of a weight that a layer sums over, a walk goes through the
operations that compute its input, and through all others that read the values it meets, until it has found every
weight that has this dimension too.
"""

from __future__ import annotations

import math
import operator
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..errors import PathError, did_you_mean
from .nodes import called, scope, values
from .regions import above
from .sites import bypass, inherit
from .state import GraphState
from .weights import Scale, Shares

Side = Literal["out", "in", "norm"]
Kind = Literal["channels", "groups", "heads", "pairs"]

ELEMENTWISE = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.mul),
    *(F.silu, F.gelu, F.relu, torch.sigmoid, torch.tanh, F.dropout, inherit, bypass),
    *("to", "contiguous", "float", "half", "clone", "type", "mul", "add"),
}
ELEMENTWISE_MODULES = (nn.SiLU, nn.GELU, nn.ReLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Dropout, nn.Identity, Scale)


@dataclass(frozen=True)
class End:
    """A dimension of a weight that belongs to a width.

    Args:
        path: the path of the layer, or the name of the tensor.
        side: "out" is the layer's output, dimension 0 of its weight; "in" its input, dimension 1; "norm" the channels
            of a norm.
        copies: how often the width lies in the dimension, one after the other: 2 for GEGLU.
    """

    path: str
    side: Side
    copies: int = 1

    def __str__(self) -> str:
        return f"{self.path} {self.side}{f' ({self.copies} times)' if self.copies > 1 else ''}"


@dataclass(frozen=True)
class Width:
    """A number of channels, heads or features that several weights share, so that they are cut together.

    A width consists of slices, the parts that it can be cut by: the groups of a norm, the heads of an attention, the
    pairs of channels that GEGLU multiplies, or single channels. Slices do not depend on each other.

    Args:
        path: the module path of the smallest region with all of the weights.
        kind: the kind of the slices.
        slices: the number of slices.
        channels: the number of channels of a slice in the narrowest dimension.
        ends: the dimensions of weights that belong to the width, in graph order.
        nodes: the operations whose multiply-accumulates are proportional to it, besides those of layers.
        literals: the arguments of operations that state the width, as a node and a position.
    """

    path: str
    kind: Kind
    slices: int
    channels: int
    ends: tuple[End, ...]
    nodes: tuple[fx.Node, ...] = field(default=(), repr=False)
    literals: tuple[tuple[fx.Node, int | str], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return f"{self.path}: {self.slices} {self.kind} of {self.channels}"


@dataclass(frozen=True)
class Fixed:
    """A width that cannot be cut.

    Args:
        path: the path of the smallest region with all of the weights, or of the first of them.
        reason: the reason.
        where: the module path of the operation that is the reason.
        ends: the dimensions of weights that belong to it.
    """

    path: str
    reason: str
    where: str
    ends: tuple[End, ...]


def find_widths(graph: GraphState) -> tuple[dict[str, Width], list[Fixed]]:
    """Return the widths of a graph by path, in graph order, and those that cannot be cut.

    Args:
        graph: the graph.
    """
    callers: dict[str, list[fx.Node]] = {}
    for node in graph.fx.nodes:
        if node.op in ("call_module", "get_attr"):
            callers.setdefault(str(node.target), []).append(node)
    tied = _tied(graph)
    seen: set[tuple[fx.Node, int]] = set()
    walks = []
    for layer, value in _read_and_computed(graph):
        dim = _dim(value, 1 if isinstance(graph.module(str(layer.target)), nn.Conv2d) else -1)
        if (value, dim) not in seen:
            walk = _Walk(graph, callers, tied)
            walk.run(value, dim)
            walks.append(walk)
            seen.update(walk.axes)
    regions, order = set(graph.paths()), {name: number for number, name in enumerate(callers)}
    named: dict[str, Width | Fixed] = {}
    for walk in sorted(walks, key=lambda walk: walk.refusal is not None):  # regions are first named by what can be cut
        ends = tuple(sorted(walk.ends, key=lambda end: order[end.path]))
        outs = [end.path for end in ends if end.side == "out"]
        names = _common([end.path for end in ends], regions), *outs[:1], *(f"{end.path}.{end.side}" for end in ends)
        name = next(
            name for name in names if name not in ("", *named)
        )  # "" of the time embedding, which all blocks read
        width = walk.width(name, ends)
        if walk.refusal is None and width.slices == 1:
            walk.refusal = f"there is only one of its {width.kind}", name
        named[name] = width if walk.refusal is None else Fixed(name, *walk.refusal, ends)
    widths = [one for one in named.values() if isinstance(one, Width)]
    widths.sort(key=lambda width: min(order[end.path] for end in width.ends))
    return {one.path: one for one in widths}, [one for one in named.values() if isinstance(one, Fixed)]


def _read_and_computed(graph: GraphState) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the layers, each with the value that it reads, and then each with the value that it computes."""
    layers = [node for node in graph.fx.nodes if node.op == "call_module"]
    layers = [node for node in layers if isinstance(graph.module(str(node.target)), nn.Conv2d | nn.Linear)]
    yield from ((layer, layer.all_input_nodes[0]) for layer in layers)
    yield from ((layer, layer) for layer in layers)


def no_width(path: str, widths: Mapping[str, Width], fixed: Iterable[Fixed]) -> PathError:
    """Return the error that there is no width of a path, with the reason if it cannot be cut."""
    hint = "print(graph.widths()) lists the widths that can be cut"
    inside = [
        one for one in fixed if path == one.path or any(f"{end.path}.".startswith(f"{path}.") for end in one.ends)
    ]
    inside.sort(key=lambda one: ("not followed" not in one.reason, path != one.path))
    wholes = [width for width in widths.values() if any(f"{e.path}.".startswith(f"{path}.") for e in width.ends)]
    if wholes and not any("not followed" in one.reason or path == one.path for one in inside):
        whole = max(wholes, key=lambda width: sum(f"{e.path}.".startswith(f"{path}.") for e in width.ends))
        return PathError(f"{path} has no width for itself", where=path, hint=f"it is part of the width {whole.path!r}")
    if inside:
        again = "; apply the pass before those that rewrite these layers" if "not followed" in inside[0].reason else ""
        return PathError(f"{path} cannot be cut: {inside[0].reason}", where=inside[0].where, hint=hint + again)
    return PathError(f"no width {path!r}", where=path, hint=did_you_mean(path, widths) or hint)


def size_of(graph: GraphState, end: End) -> int:
    """Return the size of the dimension of a weight."""
    held = graph.weights.get(end.path)
    if isinstance(held, torch.Tensor):
        return int(held.shape[0])
    return int(held.weight.shape[1 if end.side == "in" else 0]) if held.weight is not None else int(held.num_channels)


def channels_of(width: Width, end: End, size: int, slices: Sequence[int]) -> list[int]:
    """Return the channels of slices in a dimension of a weight.

    Args:
        width: the width.
        end: the dimension.
        size: its size.
        slices: the numbers of the slices.
    """
    whole = size // end.copies
    each = whole // width.slices
    starts = (copy * whole + number * each for copy in range(end.copies) for number in slices)
    return [channel for start in starts for channel in range(start, start + each)]


def narrowed(held: Any, end: End, channels: Sequence[int], groups: int) -> Any:
    """Return a leaf module or a tensor with some channels of one of its dimensions.

    Args:
        held: the module or tensor, which stays as it is.
        end: the dimension.
        channels: the channels.
        groups: the number of groups of a norm that are left.
    """
    if isinstance(held, torch.Tensor):
        return _selected(held, 0, channels)
    own: Any = Shares().module(held)
    dim = 1 if end.side == "in" else 0
    for name, tensor in own.named_parameters(recurse=False):
        if dim < tensor.ndim:
            setattr(own, name, _selected(tensor, dim, channels))
    if isinstance(own, nn.GroupNorm):
        own.num_groups, own.num_channels = groups, len(channels)
    else:
        kind = "features" if isinstance(own, nn.Linear) else "channels"
        setattr(own, f"{end.side}_{kind}", len(channels))
    return own


def _selected(tensor: torch.Tensor, dim: int, channels: Sequence[int]) -> torch.Tensor:
    """Return a copy of some channels of a tensor, in its memory format."""
    with torch.no_grad():
        part = tensor.detach().index_select(dim, torch.tensor(channels, device=tensor.device))
        if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
            part = part.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def _tied(graph: GraphState) -> dict[int, list[str]]:
    """Return the names of the parameters that are one tensor, by its id."""
    names: dict[int, list[str]] = {}
    for name, tensor in graph.weights.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return {number: each for number, each in names.items() if len(each) > 1}


def _common(paths: Sequence[str], regions: Iterable[str]) -> str:
    """Return the path of the smallest region that holds all modules."""
    path = posixpath.commonpath([path.replace(".", "/") for path in paths]).replace("/", ".")
    return next((outer for outer in (path, *above(path)) if outer in regions), "")


def _dim(node: fx.Node, dim: int) -> int:
    return int(dim % node.meta["val"].ndim)


def _sizes(node: fx.Node) -> list[tuple[int, int]]:
    """Return the sizes of a tensor at both calls."""
    nominal, generic = values(node)
    return list(zip(nominal.shape, generic.shape, strict=True))


class _Walk:
    """The walk over one width.

    Args:
        graph: the graph.
        callers: the nodes of each leaf module and tensor.
        tied: the names of parameters that are one tensor.
    """

    def __init__(self, graph: GraphState, callers: Mapping[str, list[fx.Node]], tied: Mapping[int, list[str]]) -> None:
        self.graph, self.callers, self.tied = graph, callers, tied
        self.axes: dict[tuple[fx.Node, int], int] = {}  # dimensions of values, with the copies of the width in them
        self.ends: list[End] = []
        self.refusal: tuple[str, str] | None = None
        self._counts: set[int] = set()  # the slices divide each of them
        self._groups = self._heads = False
        self._nodes: dict[fx.Node, None] = {}
        self._literals: dict[tuple[fx.Node, int | str], None] = {}
        self._stack: list[tuple[fx.Node, int]] = []

    def run(self, node: fx.Node, dim: int) -> None:
        """Walk from a dimension of a value to all that has the same width."""
        self._reach(node, dim, 1)
        while self._stack:
            node, dim = self._stack.pop()
            self._through(node, node, dim)
            for user in node.users:
                self._through(user, node, dim)

    def width(self, path: str, ends: tuple[End, ...]) -> Width:
        """Return what was found."""
        for (node, dim), copies in self.axes.items():
            self._counts.update(size // copies for size in _sizes(node)[dim])
        slices = math.gcd(*self._counts)
        sizes = [size_of(self.graph, end) // (end.copies * slices) for end in ends]
        pairs = any(end.copies > 1 for end in ends)
        kind: Kind = "heads" if self._heads else "groups" if self._groups else "pairs" if pairs else "channels"
        return Width(path, kind, slices, min(sizes), ends, tuple(self._nodes), tuple(self._literals))

    def _reach(self, node: Any, dim: int, copies: int) -> None:
        """Add a dimension of a value, unless it was found before."""
        known = self.axes.get((node, dim))
        if known is None:
            self.axes[node, dim] = copies
            self._stack.append((node, dim))
        elif known != copies:
            self._refuse(node, "a value is read both as a whole and in parts")

    def _refuse(self, node: fx.Node, reason: str) -> None:
        if self.refusal is None:
            self.refusal = reason, scope(node) or node.name

    def _through(self, op: fx.Node, at: fx.Node, dim: int) -> None:
        """Follow a dimension of a value through the operation that computes it (`op is at`) or reads it."""
        target: Any = op.target
        arguments: Any = op.args
        if op.op == "call_module":
            self._through_module(op, at, dim)
        elif op.op == "get_attr":
            self._end(op, "out" if dim == 0 else "in", at, dim)
            if dim:
                self._refuse(op, f"dimension {dim} of the tensor {target} is no output")
        elif op.op == "placeholder":
            self._refuse(op, f"the width is that of the input {op.name}")
        elif op.op == "output":
            self._refuse(op, "the width is that of the UNet's output")
        elif target is getattr or (target == "size" and len(arguments) > 1 and _dim(at, arguments[1]) != dim):
            pass  # reads a dtype, a device, or another dimension
        elif target in ELEMENTWISE:
            self._elementwise(op, at, dim)
        elif target == "transpose":
            order = list(range(at.meta["val"].ndim))
            one, other = (_dim(at, number) for number in arguments[1:3])
            order[one], order[other] = other, one
            self._permuted(op, at, dim, order)
        elif target == "permute":
            numbers = arguments[1] if isinstance(arguments[1], tuple | list) else arguments[1:]
            self._permuted(op, at, dim, [_dim(at, number) for number in numbers])
        elif target in ("view", "reshape", "flatten"):
            self._reshaped(op, at, dim)
        elif target == "chunk" or target is torch.chunk:
            self._chunked(op, at, dim)
        elif target is operator.getitem:
            self._item(op, at, dim)
        elif target in (torch.cat, torch.concat):
            self._joined(op, at, dim)
        elif target is F.scaled_dot_product_attention:
            self._attention(op, at, dim)
        elif target is F.group_norm:
            self._group_norm(op, at, dim)
        elif target is F.interpolate and dim < 2:
            self._follow(op, at, dim, op, op.all_input_nodes[0])
        else:
            self._refuse(op, f"{called(op)} is not followed")

    def _follow(self, op: fx.Node, at: fx.Node, dim: int, *nodes: Any) -> None:
        """Reach the same dimension of other values."""
        for node in nodes:
            self._reach(node, dim, self.axes[at, dim])

    def _through_module(self, op: fx.Node, at: fx.Node, dim: int) -> None:
        module, own = self.graph.module(str(op.target)), op is at
        if type(module) in (nn.Conv2d, nn.Linear):
            if dim != _dim(at, 1 if isinstance(module, nn.Conv2d) else -1):
                self._refuse(op, f"dimension {dim} of the values of a {type(module).__name__}")
            elif isinstance(module, nn.Conv2d) and module.groups != 1:
                self._refuse(op, f"a convolution in {module.groups} groups")
            else:
                self._end(op, "out" if own else "in", at, dim)
        elif type(module) is nn.GroupNorm:
            if dim != 1 or self.axes[at, dim] != 1:
                self._refuse(op, "a norm of something else than the channels")
                return
            self._counts.add(module.num_groups)
            self._groups = True
            self._end(op, "norm", at, dim)
            self._follow(op, at, dim, op, op.args[0])
        elif type(module) is nn.LayerNorm and dim >= at.meta["val"].ndim - len(module.normalized_shape):
            self._refuse(op, "a norm over all of these channels, whose statistics a cut would change")
        elif isinstance(module, ELEMENTWISE_MODULES) or type(module) is nn.LayerNorm:
            self._follow(op, at, dim, op, op.args[0])
        else:
            self._refuse(op, f"a {type(module).__name__} is not followed")

    def _end(self, op: fx.Node, side: Side, at: fx.Node, dim: int) -> None:
        """Add a dimension of a weight, and reach the values of all other calls with this weight."""
        path = str(op.target)
        end = End(path, side, self.axes[at, dim])
        if end in self.ends:
            return
        self.ends.append(end)
        held = self.graph.weights.get(path)
        for tensor in [held] if isinstance(held, torch.Tensor) else held.parameters(recurse=False):
            if type(tensor.data) is not torch.Tensor or not tensor.is_floating_point():
                self._refuse(op, f"the weights of {path} are a {type(tensor.data).__name__} of {tensor.dtype}")
            if id(tensor) in self.tied:
                self._refuse(op, f"one tensor is the weight of {' and '.join(self.tied[id(tensor)])}")
        for other in self.callers[path]:
            value = other if side == "out" else other.args[0]
            if other.op != op.op or not isinstance(value, fx.Node):
                self._refuse(other, f"{path} is called, and its weight is read as well")
            elif other is not op:
                self._reach(value, dim, self.axes[at, dim])
        if any(other.startswith(f"{path}.") for other in self.callers):
            self._refuse(op, f"{path} is called, and its weight is read as well")

    def _elementwise(self, op: fx.Node, at: fx.Node, dim: int) -> None:
        """Follow a dimension, counted from the last one, to the result and to all operands that are not broadcast."""
        back, size = dim - at.meta["val"].ndim, _sizes(at)[dim]
        for node in (op, *op.all_input_nodes):
            value = node.meta["val"]
            if not isinstance(value, torch.Tensor):
                if value is None:
                    self._refuse(op, f"the shape of {node.name} is not known")
                continue
            if value.ndim >= -back and _sizes(node)[back] == size:
                self._reach(node, _dim(node, back), self.axes[at, dim])
            elif value.ndim >= -back and set(_sizes(node)[back]) != {1}:
                self._refuse(op, f"{called(op)} repeats these channels")

    def _permuted(self, op: fx.Node, at: fx.Node, dim: int, order: Sequence[int]) -> None:
        if op is at:
            self._reach(op.args[0], order[dim], self.axes[at, dim])
        else:
            self._reach(op, order.index(dim), self.axes[at, dim])

    def _reshaped(self, op: fx.Node, at: fx.Node, dim: int) -> None:
        """Follow a dimension into the first of those that it is split into, or out of it where they are merged."""
        source: Any = op.args[0]
        here, there = (op, source) if op is at else (source, op)
        for mine, its in _regrouped(_sizes(here), _sizes(there)):
            if dim not in mine:
                continue
            if dim != mine[0] or not its:
                self._refuse(op, f"{called(op)} interleaves these channels with others")
                return
            self._reach(there, its[0], self.axes[at, dim])
            self._literal(op, dim if op is at else its[0])

    def _literal(self, op: fx.Node, dim: int) -> None:
        """Add the argument of a reshape that states a size."""
        given = len(op.args) == 2 and isinstance(op.args[1], tuple | list)
        if op.target == "flatten":
            return
        sizes: Any = op.args[1] if given else op.args[1:]
        if isinstance(sizes[dim], fx.Node) or given:
            self._refuse(op, f"{called(op)} computes the size of these channels")
        elif sizes[dim] != -1:
            self._literals[op, dim + 1] = None

    def _chunked(self, op: fx.Node, at: fx.Node, dim: int) -> None:
        """Follow the whole of a chunked value to its pieces."""
        for user in op.users:
            self._item(user, at, dim)

    def _item(self, op: fx.Node, at: fx.Node, dim: int) -> None:
        source: Any = op.args[0]
        if isinstance(source.meta["val"], tuple | list):
            if source.target not in ("chunk", torch.chunk):
                self._refuse(op, f"{called(source)} is not followed")
                return
            whole, rest = source.args[0], (*source.args[2:], *source.kwargs.values())
            pieces, along = len(source.meta["val"]), _dim(whole, rest[0] if rest else 0)
            times = pieces if along == dim else 1
            if op is at:
                self._reach(whole, dim, self.axes[at, dim] * times)
            elif self.axes[at, dim] % times:
                self._refuse(op, "a value is read both as a whole and in parts")
            else:
                self._reach(op, dim, self.axes[at, dim] // times)
            return
        mapping = _sliced(op.args[1])
        found = [(inner, outer) for inner, outer in mapping or () if dim == (outer if op is at else inner)]
        if not found:
            self._refuse(op, "a part of these channels is read")
            return
        inner, outer = found[0]
        node, number = (source, inner) if op is at else (op, outer)
        self._reach(node, number, self.axes[at, dim])

    def _joined(self, op: fx.Node, at: fx.Node, dim: int) -> None:
        rest = (*op.args[1:], *op.kwargs.values())
        if dim == _dim(op, rest[0] if rest else 0):  # type: ignore[arg-type]
            self._refuse(
                op, "concatenated, so that a cut would shift the channels behind it into other groups of the next norm"
            )
        else:
            self._follow(op, at, dim, op, *op.args[0])  # type: ignore[misc]

    def _attention(self, op: fx.Node, at: fx.Node, dim: int) -> None:
        arguments: Any = op.args
        (query, key, value), mask = arguments[:3], (*arguments[3:4], op.kwargs.get("attn_mask"))
        if at in mask:
            self._refuse(op, "the mask of an attention has these channels")
            return
        if at.meta["val"].ndim != 4 or dim != 1:
            self._refuse(op, "the channels of a head, which scale its products")
            return
        if any(isinstance(m, fx.Node) and m.meta["val"].ndim == 4 and set(_sizes(m)[1]) != {1} for m in mask):
            self._refuse(op, "an attention mask for each head")
            return
        self._heads = True
        self._nodes[op] = None
        self._follow(op, at, dim, op, query, key, value)

    def _group_norm(self, op: fx.Node, at: fx.Node, dim: int) -> None:
        groups = op.args[1] if len(op.args) > 1 else op.kwargs.get("num_groups")
        weights = [a for a in (*op.args[2:4], op.kwargs.get("weight"), op.kwargs.get("bias")) if isinstance(a, fx.Node)]
        if at in weights:
            self._reach(op, 1, self.axes[at, 0])
            return
        if not isinstance(groups, int) or dim != 1 or self.axes[at, dim] != 1:
            self._refuse(op, "a norm of something else than the channels")
            return
        self._counts.add(groups)
        self._groups = True
        self._literals[op, 1 if len(op.args) > 1 else "num_groups"] = None
        self._follow(op, at, dim, op, op.args[0])
        for weight in weights:
            self._reach(weight, 0, 1)


def _regrouped(
    before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the runs of dimensions of two shapes that have the same number of elements, side by side."""
    i = j = 0
    while i < len(before) and j < len(after):
        mine, its = [i], [j]
        while (here := _product(before, mine)) != (there := _product(after, its)):
            if math.prod(here) < math.prod(there) and mine[-1] + 1 < len(before):
                mine.append(mine[-1] + 1)
            elif its[-1] + 1 < len(after):
                its.append(its[-1] + 1)
            else:
                return
        yield mine, its
        i, j = mine[-1] + 1, its[-1] + 1


def _product(sizes: Sequence[tuple[int, int]], dims: Iterable[int]) -> tuple[int, int]:
    pairs = [sizes[dim] for dim in dims]
    return math.prod(pair[0] for pair in pairs), math.prod(pair[1] for pair in pairs)


def _sliced(index: Any) -> list[tuple[int, int]] | None:
    """Return the dimensions of a tensor and of a part of it that are the same; None if the index is another."""
    items = index if isinstance(index, tuple) else (index,)
    inner, outer, pairs = 0, 0, []
    for item in items:
        if item is None:
            outer += 1
        elif isinstance(item, slice):
            if item == slice(None):
                pairs.append((inner, outer))
            inner, outer = inner + 1, outer + 1
        elif isinstance(item, int):
            inner += 1
        else:
            return None
    return pairs + [(inner + rest, outer + rest) for rest in range(8)]  # beyond the last index nothing is cut
