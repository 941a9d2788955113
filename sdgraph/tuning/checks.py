"""What must hold before a run begins or goes on: the models fit each other, and a checkpoint is of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import TuningError
from ..ir.structure import alike
from ..runtime.serialization import check_savable
from ..runtime.unet import GraphUNet
from .state import checkpoints


def check_models(student: GraphUNet, teacher: GraphUNet) -> None:
    """Refuse a student that cannot learn from the teacher.

    Raises:
        TuningError: they take other inputs, return another shape, or compute the same already.
        ModeError: the student could not be saved.
    """
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
    if student is teacher or (alike(student.graph, teacher.graph) and _equal_weights(student, teacher)):
        raise TuningError(
            "the student computes what the teacher computes, so there is nothing to learn",
            where="student",
            hint="apply a pass to the student, such as PruneBlocks, or pass the teacher that it was derived from",
        )
    check_savable(student.graph)


def _equal_weights(student: GraphUNet, teacher: GraphUNet) -> bool:
    other = teacher.state_dict()
    return all(torch.equal(value, other[name].to(value)) for name, value in student.state_dict().items())


def checkpoint_to_resume(out: Path, wanted: str | None) -> Path | None:
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
                f"there is no checkpoint {wanted!r}",
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


def check_same_run(now: Mapping[str, str], saved: Mapping[str, str], checkpoint: Path) -> None:
    """Refuse a checkpoint of a run with other models, data or losses.

    Raises:
        TuningError: see there; the error names what differs.
    """
    for name, value in now.items():
        if value != saved.get(name):
            shown = f": {saved.get(name)!r} then, {value!r} now" if name in ("losses", "batch", "train") else ""
            raise TuningError(
                f"the checkpoint is of a run with another {name}{shown}",
                where=str(checkpoint),
                hint="pass what that run was started with, or another `out`",
            )
