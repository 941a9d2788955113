"""Facts about a diffusers scheduler: the noise levels of its calls, its name, and whether its steps are random."""

from __future__ import annotations

from math import isfinite, log
from typing import Any

import numpy as np
import torch

# Schedulers whose steps add random numbers, whatever the arguments of the call.
RANDOM = ("Ancestral", "SDE", "LCM", "TCD", "DDPM", "SASolver", "CosineDPM")
# Schedulers whose steps combine the predictions of several calls.
COMBINING = ("DEIS", "DPMSolver", "Heun", "IPNDM", "KDPM2", "LMS", "PNDM", "SASolver", "UniPC")
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
    "use_lu_lambdas",
)


def lambdas_of(scheduler: Any, timesteps: tuple[float, ...], part: slice = slice(None)) -> tuple[float, ...] | None:
    """Return log(alpha / sigma) at timesteps of a scheduler; None if the scheduler has no noise levels.

    Args:
        scheduler: a diffusers scheduler on which `set_timesteps` has been called.
        timesteps: training timesteps, possibly fractional; or log(sigma) / 4 for a scheduler of continuous timesteps.
        part: the slice of the scheduler's timesteps that `timesteps` is.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if _config(scheduler).get("timestep_type") == "continuous":
        levels = [-4 * timestep for timestep in timesteps]
    elif alphas is not None:
        squares = np.asarray(alphas.detach().cpu().double())
        ratios = 0.5 * (np.log(np.maximum(squares, 1e-30)) - np.log(np.maximum(1 - squares, 1e-30)))
        levels = np.interp(timesteps, np.arange(len(ratios)), ratios).tolist()
    else:
        sigmas = torch.as_tensor(getattr(scheduler, "sigmas", ())).tolist()[part][: len(timesteps)]
        if len(sigmas) < len(timesteps) or min(sigmas) <= 0:
            return None
        levels = [-log(sigma) for sigma in sigmas]
    return tuple(levels) if all(map(isfinite, levels)) else None


def name_of(scheduler: Any) -> str:
    """Return the class of a scheduler, with the options that decide which calls it makes."""
    config = _config(scheduler)
    options = [f"{option}={config[option]!r}" for option in OPTIONS if config.get(option) not in (None, False)]
    return f"{type(scheduler).__name__}({', '.join(options)})"


def is_random(scheduler: Any) -> bool:
    """Return whether the steps of a scheduler add random numbers; `eta` and `s_churn`, arguments of a call, are not
    seen.
    """
    kind = str(_config(scheduler).get("algorithm_type", ""))
    return any(word in type(scheduler).__name__ for word in RANDOM) or kind.startswith("sde")


def looks_back(solver: str) -> bool:
    """Return whether the steps of a solver combine the predictions of several calls.

    Args:
        solver: the solver as `name_of` returns it.
    """
    name, _, options = solver.partition("(")
    return any(word in name for word in COMBINING) and "solver_order=1" not in options


def _config(scheduler: Any) -> Any:
    return getattr(scheduler, "config", {})
