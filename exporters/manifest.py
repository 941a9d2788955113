"""What an exported directory says of itself: written into the model's metadata, checked on load."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from sdgraph import GraphUNet, __version__
from sdgraph.dims import evaluate
from sdgraph.errors import CallError, ExportError, SavedError
from sdgraph.inputs import Input

FORMAT = 1
CONFIG, MODEL, DATA, REPORT = "config.json", "model.onnx", "model.onnx.data", "export.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
AGAIN = "export the UNet again"

_PREFIX = "sdgraph."
_KINDS = {"index": torch.int64, "time": torch.float32}
# Expressions are evaluated on load: numbers, names, `ceil(...)` and arithmetic; no attributes, no powers.
_EXPRESSION = re.compile(r"(?!.*\*\*)(?:[A-Za-z]\w{0,15}|\d{1,9}|[ ()+\-*/%<>=!])+")


@dataclass(frozen=True)
class Manifest:
    """What an exported model is, and the calls it takes.

    Args:
        config_sha256: of `config.json`.
        dtype: "float32" or "float16".
        opset: version of the ONNX operators.
        inputs: every input of the traced UNet, each dimension a number or an expression in the call's sizes.
        given: names of those that the model has; a call gives exactly these.
        output: shape of the output, as of the inputs.
        guards: `(condition, outcome)` that a call must satisfy.
        recipe: the passes applied, as text.
        role: which of several graphs this is; "full" computes everything.
        version: of the sdgraph that wrote it.
        format: of this description.
    """

    config_sha256: str
    dtype: str
    opset: int
    inputs: tuple[Input, ...]
    given: tuple[str, ...]
    output: tuple[int | str, ...]
    guards: tuple[tuple[str, bool], ...] = ()
    recipe: tuple[str, ...] = ()
    role: str = "full"
    version: str = __version__
    format: int = FORMAT

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def dtype_of(self, spec: Input) -> torch.dtype:
        """Dtype of an input of the model. Times are float32: the UNet casts them to it first thing."""
        return _KINDS.get(spec.kind, self.torch_dtype)

    @property
    def model_inputs(self) -> tuple[Input, ...]:
        """The inputs that the model has, in its order."""
        return tuple(spec for spec in self.inputs if spec.name in self.given)

    def metadata(self) -> dict[str, str]:
        """As metadata properties of an ONNX model: each value JSON, or plain text."""
        return {_PREFIX + k: v if isinstance(v, str) else json.dumps(v) for k, v in asdict(self).items()}

    @classmethod
    def read(cls, metadata: Mapping[str, str], where: str) -> Manifest:
        """The reverse of `metadata`, for untrusted input.

        Raises:
            SavedError: something is missing, malformed, or of a newer format.
        """
        found = {k.removeprefix(_PREFIX): v for k, v in metadata.items() if k.startswith(_PREFIX)}
        if "format" not in found:
            raise SavedError("the model was not exported by sdgraph", where=where, cure=AGAIN)
        if not found["format"].isdigit() or int(found["format"]) > FORMAT:
            raise SavedError(
                f"the model has format {found['format'][:20]}, this sdgraph reads up to {FORMAT}",
                where=where,
                cure=f"upgrade sdgraph; it was written by {found.get('version', 'an unknown version')[:20]}",
            )
        try:
            manifest = cls(
                config_sha256=found["config_sha256"],
                dtype=_known_dtype(found["dtype"]),
                opset=int(found["opset"]),
                inputs=tuple(_input(each) for each in json.loads(found["inputs"])),
                given=tuple(map(str, json.loads(found["given"]))),
                output=_shape(json.loads(found["output"])),
                guards=tuple((_checked(c), bool(o)) for c, o in json.loads(found["guards"])),
                recipe=tuple(map(str, json.loads(found["recipe"]))),
                role=found["role"],
                version=found["version"],
                format=int(found["format"]),
            )
            manifest._check_expressions()
        except (KeyError, ValueError, TypeError, NameError, ArithmeticError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            raise SavedError(f"the model's metadata is damaged ({reason})", where=where, cure=AGAIN) from error
        return manifest

    def _check_expressions(self) -> None:
        shapes = [spec.shape or () for spec in self.inputs]
        free = {d: 64 for shape in shapes for d in shape if isinstance(d, str) and d.isidentifier()}
        for expression in (*(d for shape in (*shapes, self.output) for d in shape), *(c for c, _ in self.guards)):
            evaluate(str(expression), free)

    def check(self, flat: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The sizes of a call.

        Args:
            flat: its inputs, as `sdgraph.inputs.flatten` gives them.
        Raises:
            CallError: the model does not cover it; naming the input, what it is and what it should be.
        """
        self._check_given(flat)
        sizes: dict[str, int] = {}
        for spec in self.model_inputs:
            value = flat[spec.name]
            if spec.kind == "index" and (value.is_floating_point() or value.is_complex()):
                raise CallError(f"{spec.name} is {value.dtype}", where="call", cure="pass integers")
            if spec.kind == "float" and value.dtype != self.torch_dtype:
                what = f"{spec.name} is {value.dtype}, the model is {self.torch_dtype}"
                raise CallError(what, where="call", cure=f"cast it: .to({self.torch_dtype})")
            _fit(spec, tuple(value.shape), sizes)
        for condition, outcome in self.guards:
            if bool(evaluate(condition, sizes)) != outcome:
                what = f"this call takes another branch: {condition} is no longer {outcome}"
                raise CallError(what, where="call", cure="use sizes on the traced side, or the source UNet")
        return sizes

    def _check_given(self, flat: Mapping[str, torch.Tensor]) -> None:
        places = {spec.name: str(spec.place[0]) for spec in self.inputs}
        missing = [n for n in self.given if n not in flat]
        if missing:
            raise CallError(
                f"{places[missing[0]]} is missing", where="call", cure="this model was exported with it; pass it"
            )
        for name in flat:
            used = next(spec for spec in self.inputs if spec.name == name).shape is not None
            if name not in self.given and used:  # an unused one had its place pruned away
                raise CallError(
                    f"this model was exported without {places[name]}",
                    where=f"argument {places[name]}",
                    cure=f"export again with inputs=({places[name]!r},)",
                )


def describe(unet: GraphUNet, given: frozenset[str], opset: int, config: bytes) -> Manifest:
    """The manifest of a UNet exported with the optional inputs `given`."""
    graph = unet.graph
    inputs = tuple(replace(spec, shape=_resolved(unet, spec)) for spec in graph.inputs)
    return Manifest(
        config_sha256=hashlib.sha256(config).hexdigest(),
        dtype=str(unet.dtype).removeprefix("torch."),
        opset=opset,
        inputs=inputs,
        given=tuple(i.name for i in inputs if i.shape is not None and (not i.optional or i.name in given)),
        output=_named(unet, graph.output.meta["val"], graph.output.meta["probe"]),
        guards=tuple((guard.condition, guard.outcome) for guard in graph.guards),
        recipe=tuple(map(str, graph.passes)),
    )


def _resolved(unet: GraphUNet, spec: Input) -> tuple[int | str, ...] | None:
    """Shape of an input; that of a residual is known from the value it is added to, None if that is gone."""
    node = unet.graph.input(spec.name)
    if spec.shape is not None or node.meta["val"] is None:
        return spec.shape
    return _named(unet, node.meta["val"], node.meta["probe"])


def _named(unet: GraphUNet, nominal: torch.Tensor, generic: torch.Tensor) -> tuple[int | str, ...]:
    names = []
    for pair in zip(nominal.shape, generic.shape, strict=True):
        name = unet.graph.dims.name(*pair)
        if name is None:
            what = f"a size of an input is no known expression of the call's: {pair[0]} at the nominal one"
            raise ExportError(what, cure="leave this input out")
        names.append(int(name) if name.isdigit() else name)
    return tuple(names)


def _fit(spec: Input, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    dims = spec.shape or ()
    wanted: list[Any] = []
    for i, dim in enumerate(dims):
        have = shape[i] if i < len(shape) else None
        if isinstance(dim, str) and not (i == 0 and spec.broadcast and have == 1):
            if dim.isidentifier():
                dim = sizes.setdefault(dim, have) if have is not None else dim
            else:
                dim = evaluate(dim, sizes)
            wanted.append(dim)
        else:
            wanted.append(have if isinstance(dim, str) else dim)
    if list(shape) != wanted or 0 in shape:
        raise CallError(
            f"{spec.name} has shape {shape}, expected ({', '.join(map(str, wanted))})",
            where=f"input {spec.name}",
            cure="batch, height and width must agree over all inputs of a call",
        )


def _known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}")
    return name


def _checked(expression: Any) -> str:
    if not isinstance(expression, str) or len(expression) > 200 or not _EXPRESSION.fullmatch(expression):
        raise ValueError(f"{expression!r} is no size")
    return expression


def _shape(dims: Any) -> tuple[int | str, ...]:
    return tuple(d if isinstance(d, int) else _checked(d) for d in dims)


def _input(raw: Any) -> Input:
    if set(raw) != {f.name for f in fields(Input)}:
        raise ValueError("an input has other fields")
    shape = None if raw["shape"] is None else _shape(raw["shape"])
    return Input(**{**raw, "place": tuple(raw["place"]), "shape": shape})


def read_config(directory: Path) -> tuple[dict[str, Any], str]:
    """The UNet's configuration and its hash.

    Raises:
        SavedError: the file is missing or no JSON object.
    """
    path = directory / CONFIG
    try:
        raw = path.read_bytes()
        config = json.loads(raw)
    except OSError as error:
        raise SavedError(f"{CONFIG} cannot be read: {error.strerror}", where=str(path), cure=AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise SavedError(f"{CONFIG} is not JSON", where=str(path), cure=AGAIN) from error
    if not isinstance(config, dict):
        raise SavedError(f"{CONFIG} holds no configuration", where=str(path), cure=AGAIN)
    return config, hashlib.sha256(raw).hexdigest()
