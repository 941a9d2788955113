"""What must hold before a run begins: the models fit each other, and there is a checkpoint where one is named."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..atomic import check_apart, lies_in
from ..errors import TuningError, did_you_mean
from ..runtime.recipe import RECIPE
from ..runtime.serialization import check_savable
from ..runtime.unet import GraphUNet
from .feature_extractor import FeatureExtractor
from .sources import Source
from .train_state import UNET, checkpoints

DATA = "data"  # the folder in that of a run that may keep its encoded data

log = logging.getLogger("sdgraph")


def check_models(student: GraphUNet, teacher: GraphUNet) -> None:
    """Refuse a student that cannot learn from the teacher.

    Raises:
        TuningError: they take other inputs, or return another shape.
        ModeError: the student could not be saved.
    """
    for model in (student, teacher):
        model.follow_changes()
    mine, its = ({i.name: i.shape for i in m.graph.resolved_inputs() if not i.optional} for m in (student, teacher))
    for name in sorted(mine.keys() | its.keys()):
        if mine.get(name) != its.get(name):
            raise TuningError(
                f"the student's input {name} has shape {mine.get(name)}, and the teacher's {its.get(name)}",
                where=f"input {name}",
                hint="both are called with the same tensors, so their configurations must agree on this input",
            )
    shapes = [model.graph.shape(model.graph.output) for model in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise TuningError(
            f"the student predicts {shapes[0]}, and the teacher {shapes[1]}",
            where="output",
            hint="both must predict latents of the same shape",
        )
    check_savable(student.graph)


def check_inputs(models: Iterable[GraphUNet], inputs: Mapping[str, Tensor]) -> None:
    """Refuse data for inputs that no model has, and that would stay unread.

    Raises:
        TuningError: see there.
    """
    known = list(dict.fromkeys(one.name for unet in models for one in unet.graph.inputs))
    for name in inputs:
        if name not in known:
            hint = did_you_mean(name, known) or f"inputs: {', '.join(known)}"
            raise TuningError(f"the models have no input {name!r}", where="data", hint=f"{hint}; or leave it out")


def check_results(results: object) -> dict[str, float]:
    """Return the figures of a validation.

    Raises:
        TuningError: it returns something else than figures and images by name.
    """
    hint = "return a dict of figures and PIL images by name, {} if there are none"
    if not isinstance(results, Mapping):
        raise TuningError(f"validate returns a {type(results).__name__}", where="validate", hint=hint)
    figures = {}
    for name, value in results.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]{1,200}", name):
            raise TuningError(f"validate returns something named {name!r}", where="validate", hint="use short names")
        if hasattr(value, "save"):
            continue
        try:
            figures[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(value).__name__
            raise TuningError(f"validate returns a {kind} as {name!r}", where="validate", hint=hint) from error
    return figures


def check_differs(student: GraphUNet, teacher: GraphUNet, inputs: Mapping[str, Tensor]) -> None:
    """Refuse a student with the teacher's parameters that predicts what the teacher predicts.

    Training computes everything at every call, so that passes which leave something out at some calls, such as
    `InheritFeatures`, change nothing of it.

    Args:
        inputs: those of a call, such as the first row of the data.
    Raises:
        TuningError: there is nothing to learn.
    """
    if student is not teacher:
        mine, its = (dict(unet.named_parameters()) for unet in (student, teacher))
        if mine.keys() != its.keys() or not all(torch.equal(p, its[n].to(p)) for n, p in mine.items()):
            return
        found, expected = (_prediction(unet, inputs).float() for unet in (student, teacher))
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std())):
            return
    passes = [str(applied.one) for applied in student.graph.passes]
    raise TuningError(
        f"the student computes what the teacher computes{' but for ' * bool(passes)}{', '.join(passes)}, so there is "
        "nothing to learn",
        where="student",
        hint="apply a pass that changes what is computed, such as PruneBlocks, or pass the teacher that it comes from",
    )


def _prediction(unet: GraphUNet, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what a UNet predicts if it computes everything."""
    given = {
        name: value.to(unet.device, unet.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }
    with torch.no_grad():
        prediction: Tensor = FeatureExtractor(unet, (), frozenset(given))(given)[0]
    return prediction


def has_empty(source: Source) -> bool:
    """Return whether the conditions of an empty caption can be had of a source, in the shapes of the others."""
    try:
        empty, other = source.conditions([None]), source.conditions([0])
    except Exception as reason:  # whatever the code of a source raises that does not have them
        log.info("no captions are left out: %s", reason)
        return False
    return bool(empty) and {n: t.shape for n, t in empty.items()} == {n: t.shape for n, t in other.items()}


def check_output(out: Path, models: Iterable[GraphUNet | UNet2DConditionModel], source: Source) -> None:
    """Refuse a folder for a run that models or data are read from, or that holds a model of others.

    Raises:
        TuningError: see there.
    """
    try:
        out.exists()
    except (OSError, ValueError) as error:  # too long, or with a character that no disk has
        raise TuningError(f"there can be no such folder: {error}", where="out", hint="name another") from error
    contents = getattr(source, "contents", None)
    names = [name for name in (model.config.get("_name_or_path") for model in models) if name and os.path.exists(name)]
    inputs = [("the model's folder", Path(name)) for name in names]
    if contents is not None:
        inputs += [("the folder of the data", folder) for folder in contents.folders]
        if contents.cache is not None and not lies_in(contents.cache, out / DATA):
            inputs.append(("the cache of the data", contents.cache))
    check_apart(out, inputs, TuningError, "out")
    if (out / UNET / "config.json").exists() and not (out / UNET / RECIPE).exists():
        raise TuningError(
            f"{out / UNET} holds a model that no run of sdgraph has written",
            where="out",
            hint="the result would take its place: name a new folder",
        )


def checkpoint_to_resume(out: Path, wanted: str | Path | None) -> Path | None:
    """Return the checkpoint that a run goes on from, None if it begins.

    Args:
        out: the folder of the run.
        wanted: "latest", a folder, or None to begin.
    Raises:
        TuningError: the folder is missing, or a run that is to begin would replace another.
    """
    kept = checkpoints(out)
    if wanted == "latest":
        return kept[-1][1] if kept else None
    if wanted is not None:
        folder = Path(wanted) if Path(wanted).exists() else out / wanted
        if not folder.is_dir():
            raise TuningError(
                f"there is no checkpoint {str(wanted)!r}",
                where="resume_from_checkpoint",
                hint=f"there are {', '.join(path.name for _, path in kept) or 'none'} in {out}; or pass 'latest'",
            )
        return folder
    if kept:
        raise TuningError(
            f"{out} holds the checkpoints of another run",
            where="out",
            hint="pass resume_from_checkpoint='latest' to go on with it, or another folder",
        )
    return None
