"""`trace` and `trace_code`: a UNet, or any PyTorch code, becomes a `Graph`."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any

import torch
from diffusers import UNet2DConditionModel
from torch import fx, nn

from ..errors import SdgraphError, ShapeError, SourceError, SpecError, TraceError
from ..graph import Graph
from ..ir.dims import Dims, Symbol
from ..ir.inputs import Dim, Input, example_of
from ..ir.tracer import Tracer, tracing
from ..ir.weights import Scale, Weights, skeleton
from ..options import checked
from .call import unflatten
from .signature import call_guards, config_of, free_sizes, unet_inputs
from .source import SCALED, check_source, numbers_of

CONTAINERS = (dict, list, set, OrderedDict)
SYMBOLS = (Symbol("B", 1, 5), Symbol("H", 64, 101), Symbol("W", 64, 149), Symbol("L", 77, 31))


@checked(SourceError)
def trace(
    unet: Annotated[UNet2DConditionModel, Any], *, inputs: Collection[str] = (), processors: Collection[type] = ()
) -> Graph:
    """Return one flat graph of a UNet for all batches, sizes, sequence lengths and dtypes.

    Residuals of ControlNets and T2I-Adapters and `timestep_cond` are optional inputs of the graph. Sizes that
    down-sampling does not divide are covered: the graph up-samples to the size of the skip. Weights are not copied, and
    the UNet is not changed.

    Args:
        unet: a `UNet2DConditionModel` with weights, in any dtype, on any device.
        inputs: the names of further inputs; only "encoder_attention_mask" is known.
        processors: classes of attention processors that sdgraph does not know, and that are pure functions of their
            tensors.
    Raises:
        SourceError: the model cannot be traced faithfully.
        TraceError: the code of the model does something that no graph for all sizes can do.
    Example:
        `graph = sdgraph.trace(pipe.unet)`
    """
    with undisturbed("trace"):
        check_source(unet, processors)
        return capture(unet, inputs)


@contextlib.contextmanager
def undisturbed(verb: str) -> Iterator[None]:
    """A context in which modes around a call of `verb` change no numbers: no autocast, and no meta device by default.

    Raises:
        TraceError: a mode is active in which tensors have no numbers.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        mode = "a transform of torch.func"
    elif torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        mode = "a FakeTensorMode"
    else:
        with contextlib.ExitStack() as stack:
            for kind in ("cpu", "cuda", "mps", "xpu"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type == "meta":
                stack.enter_context(torch.device("cpu"))
            yield
        return
    raise TraceError(
        f"{verb} is called inside of {mode}", where=verb, hint=f"call {verb} before, and the result inside"
    )


def capture(unet: UNet2DConditionModel, inputs: Collection[str] = ()) -> Graph:
    """Trace a UNet without the checks of the source; it may be on the meta device."""
    try:
        return _capture_unet(unet, inputs, divisible=False)
    except ShapeError:  # some blocks cannot up-sample to an odd size; then the graph is for divisible sizes
        return _capture_unet(unet, inputs, divisible=True)


def _capture_unet(unet: UNet2DConditionModel, inputs: Collection[str], divisible: bool) -> Graph:
    parameter = next(unet.parameters())
    graph = Graph(
        fx.Graph(),
        Weights(),
        unet_inputs(unet, inputs),
        Dims(free_sizes(unet, divisible)),
        dtype=parameter.dtype,
        device=parameter.device,
        config=config_of(unet),
        guards=call_guards(unet, divisible),
    )

    def call(**flat: Any) -> Any:
        return type(unet).forward(unet, **unflatten(flat, graph.inputs), return_dict=False)[0]

    with _scales_as_leaves(unet), _unchanged(unet):
        _capture(graph, call, unet)
    graph.source = skeleton(unet, graph.weights)
    return graph


@contextlib.contextmanager
def _scales_as_leaves(unet: UNet2DConditionModel) -> Iterator[None]:
    """Trace the scales of IP-Adapters as leaves whose numbers may be set later, also where they are 0."""
    leaves = {
        path: nn.ModuleList(map(Scale, numbers_of(processor, processor.scale, path)))
        for path, processor in unet.attn_processors.items()
        if type(processor) in SCALED
    }
    processors = unet.attn_processors
    held = [vars(processors[path]) for path in leaves]
    scales = [own.pop("scale") for own in held]
    try:
        for own, leaf in zip(held, leaves.values(), strict=True):
            own["_modules"]["scale"] = leaf
        yield
    finally:
        for own, scale in zip(held, scales, strict=True):
            own["_modules"].pop("scale", None)
            own["scale"] = scale


@contextlib.contextmanager
def _unchanged(unet: UNet2DConditionModel) -> Iterator[None]:
    """Leave the UNet as it was. Training flags are off inside, for in training mode diffusers' code copies weights.

    Raises:
        SourceError: the code of the UNet keeps something between calls.
    """
    holders = {n: h for n, h in (*unet.named_modules(), *unet.attn_processors.items()) if hasattr(h, "__dict__")}
    held = [_Held(path, holder) for path, holder in holders.items()]
    kept: list[str] = []
    try:
        for module in unet.modules():
            module.training = False
        yield
        kept += [f"{each.path}, attribute {name}" for each in held for name in each.changes()]
    finally:
        for each in held:
            each.restore()
    if kept:
        raise SourceError(
            "the code of the UNet keeps something between calls, which a graph does not",
            where=kept[0],
            hint="unet.set_default_attn_processor(), or write it as a function of its tensors",
        )


class _Held:
    """The attributes of a module or an attention processor, and what is in them."""

    def __init__(self, path: str, holder: Any) -> None:
        self.path, self._holder = path, holder
        self._attributes = dict(vars(holder))
        self._contents = {name: value.copy() for name, value in self._attributes.items() if type(value) in CONTAINERS}
        self._versions = {name: _version(value) for name, value in self._attributes.items()}

    def changes(self) -> list[str]:
        """Return the names of attributes that were set or edited in place, but for the training flag."""
        now = vars(self._holder)
        return [
            name
            for name in dict.fromkeys((*self._attributes, *now))
            if name != "training"
            and not (
                name in self._attributes
                and name in now
                and _same(self._attributes[name], now[name])
                and (name not in self._contents or _same_contents(self._contents[name], now[name]))
                and self._versions[name] == _version(now[name])
            )
        ]

    def restore(self) -> None:
        vars(self._holder).clear()
        vars(self._holder).update(self._attributes)
        for name, contents in self._contents.items():
            value = self._attributes[name]
            if not _same_contents(contents, value):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(contents)


def _version(value: Any) -> int | None:
    return value._version if type(value) is torch.Tensor and not value.is_inference() else None


def _same(before: Any, now: Any) -> bool:
    return before is now or (type(before) is type(now) and type(now) in (bool, int, float, str) and before == now)


def _same_contents(before: Any, now: Any) -> bool:
    if isinstance(before, dict):
        return before.keys() == now.keys() and all(_same(before[key], now[key]) for key in before)
    return len(before) == len(now) and all(map(_same, before, now))


@checked(SpecError)
def trace_code(code: Callable[..., Any] | nn.Module, **shapes: tuple[Dim, ...]) -> Graph:
    """Return a graph of any PyTorch code, such as the examples of a `Rewrite`.

    Args:
        code: a function or module of tensors.
        shapes: the shapes of the arguments, in order, by their names in the graph; a dimension is a number or one of
            "B", "H", "W", "L".
    Raises:
        TraceError: the code does something that no graph for all sizes can do.
    Example:
        `trace_code(lambda x: x.sin(), x=("B", 4))`
    """
    known = tuple(symbol.name for symbol in SYMBOLS)
    for name, shape in shapes.items():
        if not isinstance(shape, tuple) or not all((type(dim) is int and dim >= 0) or dim in known for dim in shape):
            raise SpecError(
                f"{name} has the shape {shape!r}", where="trace_code", hint=f"a tuple of numbers and {', '.join(known)}"
            )
    model = code if isinstance(code, nn.Module) else None
    specs = tuple(Input(name, (name,), shape) for name, shape in shapes.items())
    graph = Graph(fx.Graph(), Weights(), specs, Dims(SYMBOLS))
    if model is not None:
        parameter = next(model.parameters(), None)
        if parameter is not None:
            graph.dtype, graph.device = parameter.dtype, parameter.device
    call = model.forward if model is not None else code
    return _capture(graph, lambda **flat: call(*flat.values()), model)


@torch.inference_mode(False)
def _capture(graph: Graph, call: Callable[..., Any], root: nn.Module | None) -> Graph:
    tracer = Tracer(graph, root)
    sizes = [{s.name: getattr(s, key) for s in graph.dims.symbols} for key in ("nominal", "generic")]
    flat = {}
    for spec in graph.inputs:
        node = graph.fx.placeholder(spec.name)
        if node.name != spec.name:
            raise SpecError(f"{spec.name!r} cannot name an input", hint="choose another name")
        node.meta["nn_module_stack"] = {}
        for key, size in zip(("val", "probe"), sizes, strict=True):
            node.meta[key] = example_of(spec, size, graph.probe_dtype(key))
        flat[spec.name] = tracer.proxy(node)
    try:
        with tracing(tracer):
            result = call(**flat)
    except SdgraphError:
        raise
    except Exception as error:
        raise TraceError(
            f"the model's code failed while being traced: {type(error).__name__}: {error}",
            where=tracer.failed_at,
            hint="check that the model runs on such inputs; if it does, this is a gap of sdgraph: please report it",
        ) from error
    graph.fx.output(tracer.create_arg(result))
    graph.guards += tuple(tracer.guards)
    graph.eliminate_dead_code()
    return graph
