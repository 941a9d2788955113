"""What a diffusers scheduler tells of a generation: the noise levels of its calls, its name, whether it is random."""

from __future__ import annotations

from math import isfinite, log
from typing import Any

import numpy as np

# Schedulers whose steps add random numbers, whatever the arguments of the call.
RANDOM = ("Ancestral", "SDE", "LCM", "TCD", "DDPM", "SASolver")
# Options that change which calls a solver makes of the same number of steps, or how it combines them.
OPTIONS = (
    "algorithm_type",
    "beta_schedule",
    "final_sigmas_type",
    "prediction_type",
    "solver_order",
    "solver_type",
    "timestep_spacing",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)


def lambdas_of(scheduler: Any, timesteps: tuple[float, ...]) -> tuple[float, ...] | None:
    """log(alpha / sigma) at timesteps of a scheduler; None if it does not tell.

    Args:
        scheduler: a diffusers scheduler on which `set_timesteps` has been called.
        timesteps: of training, fractions included; where a scheduler's timesteps are log(sigma) / 4, these.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if _config(scheduler).get("timestep_type") == "continuous":
        levels = [-4 * timestep for timestep in timesteps]
    elif alphas is not None:
        squares = np.asarray(alphas.detach().cpu().double())
        ratios = 0.5 * (np.log(np.maximum(squares, 1e-30)) - np.log(np.maximum(1 - squares, 1e-30)))
        levels = np.interp(timesteps, np.arange(len(ratios)), ratios).tolist()
    else:
        sigmas = [float(sigma) for sigma in getattr(scheduler, "sigmas", ())][: len(timesteps)]
        if len(sigmas) < len(timesteps) or min(sigmas) <= 0:
            return None
        levels = [-log(sigma) for sigma in sigmas]
    return tuple(levels) if all(map(isfinite, levels)) else None


def name_of(scheduler: Any) -> str:
    """The class of a scheduler and those of its options that decide which calls it makes."""
    config = _config(scheduler)
    options = [f"{option}={config[option]!r}" for option in OPTIONS if config.get(option) not in (None, False)]
    return f"{type(scheduler).__name__}({', '.join(options)})"


def is_random(scheduler: Any) -> bool:
    """Whether a scheduler's steps add random numbers. What `eta` and `s_churn` do is an argument of the call, and is
    not seen here."""
    kind = str(_config(scheduler).get("algorithm_type", ""))
    return any(word in type(scheduler).__name__ for word in RANDOM) or kind.startswith("sde")


def _config(scheduler: Any) -> Any:
    return getattr(scheduler, "config", {})
