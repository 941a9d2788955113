"""The learning rate of each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import PathError, TuningError, did_you_mean
from ..ir.regions import matching
from .settings import Settings


def by_rate(trained: Iterable[nn.Parameter], student: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Return the parameters as groups of an optimizer, first those whose learning rate has no factor.

    Args:
        trained: the parameters, of the student and others.
        student: the module whose parameters the patterns name.
        settings: of the run.
    Raises:
        TuningError: a pattern names no parameter.
    """
    named = dict(student.named_parameters())
    factors: dict[nn.Parameter, float] = {}
    for pattern, factor in (settings.learning_rates or {}).items():
        for name in _matching(pattern, named):
            factors.setdefault(named[name], factor)
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for parameter in trained:
        groups.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    return [{"params": params, "lr": factor * settings.learning_rate} for factor, params in groups.items()]


def _matching(pattern: str, named: Mapping[str, nn.Parameter]) -> list[str]:
    try:
        return matching(pattern, list(named), named.__getitem__)
    except (PathError, KeyError) as error:
        hint = did_you_mean(pattern, named) or "patterns of names of parameters, such as '**.routing.*'"
        raise TuningError(f"no parameter is named {pattern!r}", where="learning_rates", hint=hint) from error
