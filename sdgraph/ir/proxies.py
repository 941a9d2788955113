"""Proxies, which stand for tensors, sizes, dtypes and devices while code is traced."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import TraceError
from .dims import Probe
from .nodes import values
from .state import GraphState


class ProxyTracer(fx.proxy.TracerBase):
    """What proxies ask of their tracer; `sdgraph.ir.tracer.Tracer` answers."""

    owner: GraphState
    outdated: set[fx.Node]

    def once(self, kind: str, target: Any, node: fx.Node, *args: Any) -> Any:
        """Return the proxy of an operation on a node, recorded at most once."""
        raise NotImplementedError

    def is_fixed(self, node: fx.Node, read: Callable[[Any], Any]) -> bool:
        """Return whether a property of a value that is the same at both sizes of a trace is so at others too."""
        raise NotImplementedError

    def sharing_memory(self, node: fx.Node) -> set[fx.Node]:
        """Return the nodes whose values share memory with that of a node."""
        raise NotImplementedError

    def expression(self, size: Any) -> str:
        """Return a size as an expression in the sizes of the call."""
        raise NotImplementedError

    def decide(self, condition: str, outcomes: Probe | tuple[bool, bool]) -> bool:
        """Return the outcome of a condition, and record a guard if it is not the same at all sizes."""
        raise NotImplementedError

    def error(self, what: str, hint: str) -> TraceError:
        """Return an error that names the module which is being traced."""
        raise NotImplementedError


def edited(tensor: torch.Tensor, key: Any, value: Any) -> torch.Tensor:
    """Return a copy of `tensor` after `tensor[key] = value`."""
    if has_torch_function((tensor, value)):
        return handle_torch_function(edited, (tensor, value), tensor, key, value)
    copied = tensor.clone()
    copied[key] = value
    return copied


class TensorProxy(fx.Proxy):
    """Stands for a tensor."""

    tracer: ProxyTracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Tensor  # code asks isinstance(x, torch.Tensor)

    @property
    def shape(self) -> Any:
        if self.node.meta["val"] is None:
            return _ShapeToCome(self)
        return tuple(self.size(i) for i in range(self.ndim))

    @property
    def ndim(self) -> int:
        nominal, generic = (value.ndim for value in values(self.node))
        if nominal != generic or not self.tracer.is_fixed(self.node, lambda value: value.ndim):
            raise self.tracer.error("the rank of a tensor depends on the sizes", "name the dimension: x.squeeze(dim)")
        return int(nominal)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        if dim is None:
            return self.shape
        dim = range(self.ndim)[dim]
        nominal, generic = (v.shape[dim] for v in values(self.node))
        fixed = nominal == generic and self.tracer.is_fixed(self.node, lambda value: value.shape[dim])
        return nominal if fixed else self.tracer.once("call_method", "size", self.node, dim)

    def numel(self) -> Any:
        count: Any = 1
        for size in self.shape:
            count = count * size
        return count

    @property
    def dtype(self) -> Any:
        return self.tracer.once("call_function", getattr, self.node, "dtype")

    @property
    def device(self) -> Any:
        return self.tracer.once("call_function", getattr, self.node, "device")

    @property
    def is_cuda(self) -> bool:
        return self.tracer.owner.device.type == "cuda"

    def is_floating_point(self) -> bool:
        return bool(self.node.meta["val"].is_floating_point())

    def __iadd__(self, other: Any) -> TensorProxy:
        return self._in_place(operator.add, other)

    def __imul__(self, other: Any) -> TensorProxy:
        return self._in_place(operator.mul, other)

    def __isub__(self, other: Any) -> TensorProxy:
        return self._in_place(operator.sub, other)

    def __itruediv__(self, other: Any) -> TensorProxy:
        return self._in_place(operator.truediv, other)

    def _in_place(self, op: Callable[..., Any], other: Any) -> TensorProxy:
        # Whoever holds this very tensor sees the new value, as in eager code: diffusers adds adapter residuals to a
        # tensor that it has already put on the list of skips.
        self._become(self.tracer.create_proxy("call_function", op, (self, other), {}).node)
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        if any(node.op in ("placeholder", "get_attr") for node in self.tracer.sharing_memory(self.node)):
            raise self.tracer.error(
                "an input or a weight is edited in place", "edit a clone() of it, or use torch.where or torch.cat"
            )
        self._become(self.tracer.create_proxy("call_function", edited, (self, key, value), {}).node)

    def _become(self, node: fx.Node) -> None:
        """Stand for the edited tensor from now on. Views of the old tensor are outdated: eager code would edit them."""
        self.tracer.outdated |= self.tracer.sharing_memory(self.node) - {node}
        self.node = node

    def __bool__(self) -> bool:
        raise self.tracer.error("the code branches on the values of a tensor", "decide it before tracing")

    def __iter__(self) -> Iterator[Any]:
        raise self.tracer.error("a tensor is iterated over", "use unbind(dim)")

    def __len__(self) -> int:
        size: int = self.size(0)
        return size


class _ShapeToCome:
    """The shape of an optional residual before its first use; it becomes the shape that it is compared with."""

    def __init__(self, proxy: TensorProxy) -> None:
        self.proxy = proxy

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple):
            return NotImplemented
        graph = self.proxy.tracer.owner
        for key, sizes in zip(("val", "probe"), _probes(other), strict=True):
            self.proxy.node.meta[key] = torch.empty(sizes, device="meta", dtype=graph.probe_dtype(key))
        return True

    __hash__ = None  # type: ignore[assignment]


def _probes(sizes: tuple[Any, ...]) -> tuple[list[int], list[int]]:
    pairs = [values(s.node) if isinstance(s, fx.Proxy) else (s, s) for s in sizes]
    return [p[0] for p in pairs], [p[1] for p in pairs]


class SizeProxy(fx.Proxy):
    """Stands for a number that depends on the sizes of the call."""

    tracer: ProxyTracer

    def _decide(self, op: Callable[[Any, Any], Any], sign: str, other: Any) -> bool:
        mine = values(self.node)
        theirs = values(other.node) if isinstance(other, fx.Proxy) else (other, other)
        outcomes = bool(op(mine[0], theirs[0])), bool(op(mine[1], theirs[1]))
        return self.tracer.decide(f"{self.tracer.expression(self)} {sign} {self.tracer.expression(other)}", outcomes)

    def __eq__(self, other: object) -> bool:
        return self._decide(operator.eq, "==", other)

    def __ne__(self, other: object) -> bool:
        return self._decide(operator.ne, "!=", other)

    def __lt__(self, other: Any) -> bool:
        return self._decide(operator.lt, "<", other)

    def __le__(self, other: Any) -> bool:
        return self._decide(operator.le, "<=", other)

    def __gt__(self, other: Any) -> bool:
        return self._decide(operator.gt, ">", other)

    def __ge__(self, other: Any) -> bool:
        return self._decide(operator.ge, ">=", other)

    def __bool__(self) -> bool:
        return self._decide(operator.ne, "!=", 0)

    __hash__ = fx.Proxy.__hash__

    def __index__(self) -> int:
        raise self.tracer.error(
            "a size of the call is used as a plain number, which would freeze it", "keep it a tensor operation"
        )

    __int__ = __float__ = __round__ = __trunc__ = __ceil__ = __floor__ = __index__

    # Shifts and masks are arithmetic, which exported models have. torch.export knows them not of sizes.
    def __lshift__(self, places: Any) -> Any:
        return self * self._power_of_two(places)

    def __rlshift__(self, other: Any) -> Any:
        return other * self._power_of_two(self)

    def __rshift__(self, places: Any) -> Any:
        return self // self._power_of_two(places)

    def __rrshift__(self, other: Any) -> Any:
        return other // self._power_of_two(self)

    def _power_of_two(self, places: Any) -> Any:
        if isinstance(places, int) and places < 0:
            raise self.tracer.error("a size is shifted by a negative number of places", "shift to the other side")
        return 2**places

    def __and__(self, mask: Any) -> Any:
        if not isinstance(mask, int) or mask < 0 or mask & (mask + 1):
            raise self._bits()
        return self % (mask + 1)  # type: ignore[operator]

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        raise self._bits()

    __ror__ = __xor__ = __rxor__ = __or__

    def __invert__(self) -> Any:
        return -1 - self  # type: ignore[operator]

    def _bits(self) -> TraceError:
        return self.tracer.error(
            "the bits of a size are combined, which exported models cannot do", "compute with + - * // and %"
        )

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self


class OpaqueProxy(fx.Proxy):
    """Stands for a dtype or a device, which follow the weights when the model is moved."""

    tracer: ProxyTracer

    def __eq__(self, other: object) -> bool:
        mine = values(self.node)
        if isinstance(mine[0], torch.device):
            mine = (self.tracer.owner.device,) * 2
        theirs = values(other.node) if isinstance(other, fx.Proxy) else (other, other)
        outcomes = (mine[0] == theirs[0], mine[1] == theirs[1])
        if mine[0] != mine[1] and isinstance(other, torch.dtype) and other.is_floating_point:
            outcomes = (True, False)  # the weights may be cast to any dtype, so to this one and to others
        return self.tracer.decide("", outcomes)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = fx.Proxy.__hash__

    @property
    def type(self) -> str:
        return str(self.tracer.owner.device.type)

    @property
    def itemsize(self) -> int:
        return int(self.node.meta["val"].itemsize)
