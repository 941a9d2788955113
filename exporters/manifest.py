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
from sdgraph.accept import accept
from sdgraph.dims import evaluate
from sdgraph.errors import CallError, ExportError, SavedError
from sdgraph.inputs import Input
from sdgraph.specialise import per_call
from sdgraph.trace import Guard

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
        guards: what the sizes of a call must satisfy.
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
    guards: tuple[Guard, ...] = ()
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
                guards=tuple(_guard(each) for each in json.loads(found["guards"])),
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
        for expression in (
            *(d for shape in (*shapes, self.output) for d in shape),
            *(g.condition for g in self.guards),
        ):
            evaluate(str(expression), free)

    def check(self, flat: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The sizes of a call.

        Args:
            flat: its inputs, as `sdgraph.inputs.flatten` gives them.
        Raises:
            CallError: the model does not cover it; naming the input, what it is and what it should be.
        """
        self._check_given(flat)
        given = {name: value for name, value in flat.items() if name in self.given}
        return accept(self.model_inputs, self.guards, given, self.torch_dtype)

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
    inputs = graph.resolved_inputs()
    if any(node.target is per_call for node in graph.nodes):  # in the exported graph one timestep serves all samples
        inputs = tuple(replace(i, shape=(1,), broadcast=False) if i.name == "timestep" else i for i in inputs)
    for spec in inputs:
        if "?" in (spec.shape or ()):
            what = f"a size of {spec.name} is no known expression of the call's sizes"
            raise ExportError(what, where=f"input {spec.name}", cure="a pass has made it so; please report it")
    return Manifest(
        config_sha256=hashlib.sha256(config).hexdigest(),
        dtype=str(unet.dtype).removeprefix("torch."),
        opset=opset,
        inputs=inputs,
        given=tuple(i.name for i in inputs if i.shape is not None and (not i.optional or i.name in given)),
        output=graph.dims.expressions(graph.output.meta["val"], graph.output.meta["probe"]),
        guards=graph.guards,
        recipe=tuple(map(str, graph.passes)),
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


def _guard(raw: Any) -> Guard:
    return Guard(_checked(raw["condition"]), bool(raw["outcome"]), str(raw["where"]))


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
