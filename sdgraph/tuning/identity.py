"""The identity of a run: all that decides its result, by which a checkpoint is recognised as one of the same run."""

from __future__ import annotations

import collections
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..errors import TuningError
from ..runtime.digest import hash_model, hash_program, hash_tensors, hash_text, is_hash, without_places
from ..runtime.unet import GraphUNet
from ..version import __version__
from .losses import Loss
from .noise_schedule import NoiseSchedule
from .sources import Source

DATA, SCHEDULE = "data", "noise schedule"
CLOSE = 1e-4  # relative difference of two noise schedules; computing one twice differs by 1e-6
log = logging.getLogger("sdgraph")


@dataclass(frozen=True)
class Identity:
    """All that decides the result of a run beside its settings, as text and hashes by name.

    Args:
        parts: everything that may not differ when a run goes on.
        rows: the hashes of the rows of data. They may differ, unless `parts` has the data.
    """

    parts: Mapping[str, str]
    rows: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        student: GraphUNet,
        teacher: GraphUNet,
        source: Source,
        noise_schedule: NoiseSchedule,
        losses: Sequence[Loss],
        train: Sequence[str] | None,
        batch: int,
        precision: str,
    ) -> Identity:
        """Return the identity of a run.

        Args:
            student: the student before its first step.
            teacher: the teacher.
            source: the data.
            noise_schedule: the noise schedule.
            losses: the terms.
            train: the patterns of the modules that are trained.
            batch: the number of samples per step, of all processes.
            precision: the precision in which the models are called, as accelerate names it.
        """
        contents = getattr(source, "contents", None)
        if contents is None:
            data = {DATA: source.fingerprint()}
        else:
            fixed = {} if contents.repairable else {DATA: hash_text(*contents.rows)}
            data = {**fixed, **{f"{name} of the data": value for name, value in contents.recipe.items()}}
        parts = {
            "dtype": f"student {_dtype(student)}, teacher {_dtype(teacher)}",
            "student's passes": _passes(student),
            "student's graph": hash_program(student),
            "student": hash_model(student),
            "teacher's passes": _passes(teacher),
            "teacher's graph": hash_program(teacher),
            "teacher": hash_model(teacher),
            "mixed precision": precision,
            "prediction type": noise_schedule.prediction,
            SCHEDULE: " ".join(f"{alpha:.7g}" for alpha in noise_schedule.alphas.tolist()),
            "losses": ", ".join(map(_described, losses)),
            "train": "all" if train is None else ", ".join(train),
            "batch": str(batch),
            **data,
        }
        return cls(parts, () if contents is None else tuple(contents.rows))

    def check(self, saved: Identity, checkpoint: Path) -> Mapping[str, int]:
        """Refuse a checkpoint of another run, and say in the log which rows of the data have changed.

        Args:
            saved: the identity of that run.
            checkpoint: the folder, for the error.
        Returns:
            The numbers of rows that are gone and new, empty if the rows are the same.
        Raises:
            TuningError: something differs, which the error names; or most rows are gone.
        """
        hint = "pass what that run was started with, or another `output_dir`"
        mine, its = collections.Counter(self.rows), collections.Counter(saved.rows)
        gone, new = (its - mine).total(), (mine - its).total()
        for name in {**self.parts, **saved.parts}:
            before, now = saved.parts.get(name), self.parts.get(name, "none")
            if before != now and not (name == SCHEDULE and _same_schedule(before or "", now)):
                shown = "" if name == SCHEDULE or is_hash(now) else f": {before!r} then, {now!r} now"
                if name == DATA and saved.rows:
                    shown = f": {gone} of its {len(saved.rows)} rows are gone or changed, and {new} are new"
                raise TuningError(
                    f"the checkpoint is of a run with another {name}{shown}", where=str(checkpoint), hint=hint
                )
        if self.rows == saved.rows:
            return {}
        if gone > len(saved.rows) / 2:
            raise TuningError(
                f"the checkpoint is of a run with other data: {gone} of its {len(saved.rows)} rows are gone or changed",
                where=str(checkpoint),
                hint=f"{hint}; a run goes on while at least half of its rows are as they were",
            )
        log.warning(
            "the data have changed since step %s: of %s rows %s are gone or changed, and %s are new%s. The run goes on "
            "with the rows as they are now, so that its result is not that of an uninterrupted run",
            checkpoint.name.removeprefix("checkpoint-"), len(saved.rows), gone, new,
            "" if gone or new else "; their order is another",
        )  # fmt: skip
        return {"gone": gone, "new": new}


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return {"sdgraph": __version__, "torch": str(torch.__version__), "diffusers": diffusers.__version__}


def check_versions(saved: Mapping[str, str]) -> None:
    """Log that a checkpoint was written with other versions; the last bits of a step may differ then."""
    pairs = {name: (saved.get(name), now) for name, now in versions().items()}
    changed = [f"{name} {before} then, {now} now" for name, (before, now) in pairs.items() if before != now]
    if changed:
        log.warning("the run goes on, but may not equal an uninterrupted one bit for bit: %s", "; ".join(changed))


def _passes(unet: GraphUNet) -> str:
    return ", ".join(str(applied.one) for applied in unet.graph.passes) or "none"


def _dtype(unet: GraphUNet) -> str:
    return str(unet.dtype).removeprefix("torch.")


def _same_schedule(before: str, now: str) -> bool:
    """Compare numbers, of which another machine or version may compute the last digits otherwise."""
    pairs = [[float(alpha) for alpha in text.split()] for text in (before, now)]
    return len(pairs[0]) == len(pairs[1]) and all(
        math.isclose(a, b, rel_tol=CLOSE, abs_tol=1e-12) for a, b in zip(*pairs, strict=True)
    )


def _described(loss: Loss) -> str:
    """Return a loss with all of its options; models and tensors by their hashes."""
    options = [(field.name, getattr(loss, field.name), field.default) for field in fields(loss)]
    options += [(name, value, None) for name, value in vars(loss).items() if name not in {f.name for f in fields(loss)}]
    told = ", ".join(f"{name}={_value(value)}" for name, value, default in options if value is not default)
    return f"{type(loss).__name__}({told})"


def _value(value: Any) -> str:
    if isinstance(value, nn.Module):
        return hash_model(value)
    if isinstance(value, Tensor):
        return hash_tensors({"": value})
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_value, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, set | frozenset):  # the order of texts is another in every process
        return f"{{{', '.join(sorted(map(_value, value)))}}}"
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    return without_places(repr(value))
