"""The request for an export: the UNet, its inputs and the directory, which are checked before anything is done."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph import GraphUNet, SwitchUNet
from sdgraph.errors import ExportError, SdgraphError, SpecError, did_you_mean
from sdgraph.ir.inputs import Input

from ..bundle.manifest import DTYPES, MANIFEST, REPORT


def as_graph(unet: Any, dtype: torch.dtype | None) -> GraphUNet:
    """Return the UNet as it is to be exported: traced, and in a dtype that ONNX Runtime has.

    Raises:
        ExportError: it is no UNet, or its dtype is not served.
    """
    if isinstance(unet, UNet2DConditionModel):
        unet = sdgraph.apply(unet)
    if not isinstance(unet, GraphUNet):
        hint = "pass pipe.unet" if hasattr(unet, "unet") else "pass what sdgraph.apply returned, or a diffusers UNet"
        raise ExportError(f"a {type(unet).__name__} cannot be exported", hint=hint)
    if dtype not in (None, unet.dtype):
        unet = sdgraph.apply(unet, (), verify=False)
        unet.to(dtype)
    unet.follow_changes()
    name = str(unet.dtype).removeprefix("torch.")
    if name not in DTYPES:
        why = "; ONNX Runtime has no bfloat16 kernels for Resize" if name == "bfloat16" else ""
        raise ExportError(
            f"a UNet in {name} cannot be exported{why}", where="dtype", hint="unet.to(torch.float16) or torch.float32"
        )
    return unet  # type: ignore[no-any-return]


def check_members(unet: SwitchUNet, quantized: bool) -> None:
    """Refuse a switch that cannot be one directory.

    Raises:
        ExportError: the files of two members would have one name where capitals do not count.
        SpecError: 8 bits are asked for.
    """
    if quantized:
        hint = "export the switch in float, or each of unet.members[name] with quantize="
        raise SpecError("8 bits are calibrated for one UNet, and this is a switch", where="quantize", hint=hint)
    known: dict[str, str] = {}
    for name in unet.members:
        other = known.setdefault(name.lower(), name)
        if other != name:
            raise ExportError(
                f"the files of {other} and {name} would have one name where capitals do not count",
                where=f"member {name}",
                hint="name the members differently in sdgraph.switch",
            )


@contextmanager
def of_member(name: str) -> Iterator[None]:
    """Name the member of a switch in the errors of its export.

    Args:
        name: the name of the member; "" for a UNet alone.
    """
    try:
        yield
    except SdgraphError as error:
        if not name:
            raise
        where = f"member {name}" + (f", {error.where}" if error.where else "")
        raise type(error)(error.what, where=where, hint=error.hint) from error


def chosen_inputs(inputs: Iterable[Input], names: Collection[str]) -> frozenset[str]:
    """Return the names of the flat inputs that argument names stand for.

    Raises:
        SpecError: the UNet has no such optional input.
    """
    if isinstance(names, str):
        names = (names,)
    chosen = {"timestep_cond"}  # pipelines give it whenever the configuration has it
    optional = [spec for spec in inputs if spec.optional]
    for name in names:
        matches = {spec.name for spec in optional if name in (spec.name, spec.place[0])}
        if not matches:
            known = list(dict.fromkeys(str(spec.place[0]) for spec in optional))
            hint = did_you_mean(name, known) or f"optional inputs of this UNet: {', '.join(known)}"
            raise SpecError(f"no optional input {name!r}", where="inputs", hint=hint)
        chosen |= matches
    return frozenset(chosen)


def check_target(overwrite: bool, target: Path) -> None:
    """Refuse a directory that an export must not replace.

    Args:
        overwrite: whether an earlier export may be replaced.
        target: the directory.
    Raises:
        ExportError: the path exists and is not an earlier export, or `overwrite` is False.
    Example:
        `check_target(False, Path("unet-onnx"))`
    """
    if not target.exists():
        return
    if not overwrite:
        hint = "pass overwrite=True (--overwrite on the command line), or choose another"
        raise ExportError("the directory exists", where=str(target), hint=hint)
    if not target.is_dir() or (
        any(target.iterdir()) and not any((target / name).exists() for name in (MANIFEST, REPORT))
    ):
        raise ExportError(
            "this is not an earlier export", where=str(target), hint="remove it yourself, or choose another"
        )
