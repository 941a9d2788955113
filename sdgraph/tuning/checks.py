"""Checks before a run begins: models, data and the folder of the run fit each other."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..atomic import check_apart, lies_in
from ..errors import TuningError, did_you_mean
from ..ir.guards import check_call
from ..runtime.feature_extractor import FeatureExtractor
from ..runtime.recipe import RECIPE
from ..runtime.serialization import check_savable
from ..runtime.unet import GraphUNet
from .sources import Source
from .train_state import UNET, training_dtype

DATA = "data"  # the folder in that of a run that may keep its encoded data

log = logging.getLogger("sdgraph")


def check_models(student: GraphUNet, teacher: GraphUNet) -> None:
    """Refuse a student that cannot learn from the teacher.

    Args:
        student: the student.
        teacher: the teacher.
    Raises:
        TuningError: they take other inputs, or return another shape.
        ModeError: the student could not be saved.
    """
    for unet in (student, teacher):
        unet.follow_changes()
    of_student, of_teacher = (
        {one.name: one.shape for one in unet.graph.resolved_inputs() if not one.optional} for unet in (student, teacher)
    )
    for name in sorted(of_student.keys() | of_teacher.keys()):
        if of_student.get(name) != of_teacher.get(name):
            raise TuningError(
                f"the student's input {name} has shape {of_student.get(name)}, and the teacher's "
                f"{of_teacher.get(name)}",
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


def check_call_of_both(student: GraphUNet, teacher: GraphUNet, inputs: Mapping[str, Tensor]) -> None:
    """Refuse data that one of the models cannot be called with.

    Args:
        student: the student.
        teacher: the teacher.
        inputs: the inputs of a call by name, (B, ...) each, such as those of the first row of the data.
    Raises:
        TuningError: the data have an input that no model has.
        CallError: an input has another shape than the models take.
    """
    known = list(dict.fromkeys(one.name for unet in (student, teacher) for one in unet.graph.inputs))
    for name in inputs:
        if name not in known:
            hint = did_you_mean(name, known) or f"inputs: {', '.join(known)}"
            raise TuningError(f"the models have no input {name!r}", where="data", hint=f"{hint}; or leave it out")
    for unet in (student, teacher):
        check_call(unet.graph.resolved_inputs(), unet.graph.guards, inputs, training_dtype(unet))


def check_different(student: GraphUNet, teacher: GraphUNet, inputs: Mapping[str, Tensor]) -> None:
    """Refuse a student that has nothing to learn.

    Args:
        student: the student.
        teacher: the teacher.
        inputs: the inputs of a call by name, (B, ...) each.
    Raises:
        TuningError: the student has the teacher's parameters and predicts what it predicts.
    """
    if _computes_the_same(student, teacher, inputs):
        passes = [str(applied.one) for applied in student.graph.passes]
        raise TuningError(
            f"the student computes what the teacher computes{' but for ' * bool(passes)}{', '.join(passes)}, so there "
            "is nothing to learn",
            where="student",
            hint="apply a pass that changes what is computed, such as PruneBlocks, or pass the teacher that it comes "
            "from",
        )


def _computes_the_same(student: GraphUNet, teacher: GraphUNet, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether two UNets have the same parameters and predict the same, if both compute everything.

    Training computes everything at every call, so that passes which leave something out at some calls, such as
    `InheritFeatures`, do not change it.
    """
    if student is teacher:
        return True
    of_student, of_teacher = (dict(unet.named_parameters()) for unet in (student, teacher))
    if of_student.keys() != of_teacher.keys():
        return False
    if not all(torch.equal(parameter, of_teacher[name].to(parameter)) for name, parameter in of_student.items()):
        return False
    found, expected = (_prediction(unet, inputs).float() for unet in (student, teacher))
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def _prediction(unet: GraphUNet, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what a UNet predicts if it computes everything."""
    cast = {
        name: value.to(unet.device, unet.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }
    with torch.no_grad():
        prediction: Tensor = FeatureExtractor(unet, (), frozenset(cast))(cast)[0]
    return prediction


def has_empty(source: Source) -> bool:
    """Return whether a source has the conditions of an empty caption, in the shapes of the others."""
    try:
        empty, other = source.conditions([None]), source.conditions([0])
    except Exception as reason:  # whatever the code of a source raises that does not have them
        log.info("no captions are left out: %s", reason)
        return False
    return bool(empty) and {n: t.shape for n, t in empty.items()} == {n: t.shape for n, t in other.items()}


def check_output(output_dir: Path, models: Iterable[GraphUNet | UNet2DConditionModel], source: Source) -> None:
    """Refuse a folder for a run that models or data are read from, or that holds a model of others.

    Raises:
        TuningError: the folder is one of these, or cannot exist.
    """
    try:
        output_dir.exists()
    except (OSError, ValueError) as error:  # too long, or with a character that no disk has
        raise TuningError(f"there can be no such folder: {error}", where="output_dir", hint="name another") from error
    contents = getattr(source, "contents", None)
    names = [name for name in (model.config.get("_name_or_path") for model in models) if name and os.path.exists(name)]
    inputs = [("the model's folder", Path(name)) for name in names]
    if contents is not None:
        inputs += [("the folder of the data", folder) for folder in contents.folders]
        if contents.cache is not None and not lies_in(contents.cache, output_dir / DATA):
            inputs.append(("the cache of the data", contents.cache))
    check_apart(output_dir, inputs, TuningError, "output_dir")
    if (output_dir / UNET / "config.json").exists() and not (output_dir / UNET / RECIPE).exists():
        raise TuningError(
            f"{output_dir / UNET} holds a model that no run of sdgraph has written",
            where="output_dir",
            hint="the result would take its place: name a new folder",
        )
