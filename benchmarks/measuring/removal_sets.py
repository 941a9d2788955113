"""Sets of removals: by preset, at random, and by criteria for a budget; and what every criterion predicts of a set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize

from sdgraph import Redundancy, Removal
from sdgraph.runtime.recorded_calls import spread

PRESETS = ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")
CLOSE = 0.03  # how far below its budget a random set may be


@dataclass(frozen=True)
class Criterion:
    """A criterion of what to remove.

    Args:
        cost: a function that returns the cost of one removal in an analysis; None for the errors of the analysis.
        pairs: whether pairs that were measured together correct the sum.
        neighbours: the limit of removals among neighbours, see `Redundancy.cheapest`.
    """

    cost: Callable[[Removal], float | None] | None = None
    pairs: bool = False
    neighbours: tuple[int, int] | None = None

    def of(self, found: Redundancy) -> Redundancy | None:
        """Return the analysis whose errors are the costs of the criterion, None if it lacks what they are made of."""
        if self.cost is None:
            return found if self.pairs else dataclasses.replace(found, pairs=())
        costs = [self.cost(one) for one in found.removals]
        if None in costs:
            return None
        removals = tuple(
            dataclasses.replace(one, errors=(float(cost or 0.0),) * len(one.errors))
            for one, cost in zip(found.removals, costs, strict=True)
        )
        return dataclasses.replace(found, removals=removals, pairs=())


CRITERIA = {
    "MACs only": Criterion(lambda one: max(one.macs, 0.0)),
    "similarity": Criterion(lambda one: 1 - one.similarity),
    "output error": Criterion(),
    "output error, pairs": Criterion(pairs=True),
    "output error, 2 of 3": Criterion(neighbours=(2, 3)),
    "output error, pairs, 1 of 2": Criterion(pairs=True, neighbours=(1, 2)),
    "final latents": Criterion(lambda one: None if one.latents is None else one.latents**2),
    "gates": Criterion(lambda one: getattr(one, "gate", None)),
}


def chosen(found: Redundancy, name: str, budgets: dict[str, float]) -> tuple[str, ...] | None:
    """Return the paths that a criterion chooses, None if the analysis lacks what it is made of.

    Raises:
        SpecError: no choice meets the budgets.
    """
    costs = CRITERIA[name].of(found)
    return None if costs is None else costs.cheapest(**budgets, neighbours=CRITERIA[name].neighbours).paths  # type: ignore[arg-type]


def at_random(found: Redundancy, cost: str, share: float, seed: int) -> Iterator[tuple[str, ...]]:
    """Yield random sets that leave a share of a cost, or a little less."""
    random = np.random.default_rng(seed)
    while True:
        left, paths = 1.0, list[str]()
        for number in random.permutation(len(found.removals)):
            one = found.removals[number]
            if left <= share:
                break
            inside = (path.startswith(f"{one.path}.") or one.path.startswith(f"{path}.") for path in paths)
            if not any(inside):
                left -= getattr(one, cost)
                paths.append(one.path)
        if share - CLOSE <= left <= share:
            yield tuple(one.path for one in found.removals if one.path in paths)


def weighings(found: Redundancy, seed: int = 0) -> Iterator[tuple[str, ...]]:
    """Yield random sets with about half of the removals, whose times say what each removal saves.

    A few percent of noise are more than most removals save. In as many measurements of sets as of single removals, the
    noise of each saving is several times smaller, because every measurement weighs half of the removals.

    Source:
        Hotelling, "Some Improvements in Weighing and Other Experimental Techniques", 1944.
    """
    random = np.random.default_rng(seed)
    while True:
        taken = list[str]()
        for number in random.permutation(len(found.removals)):
            path = found.removals[number].path
            near = (other.startswith(f"{path}.") or path.startswith(f"{other}.") for other in taken)
            if random.random() < 0.5 and not any(near):
                taken.append(path)
        yield tuple(one.path for one in found.removals if one.path in taken)


def weighed(found: Redundancy, measured: Sequence[tuple[Sequence[str], float]]) -> Redundancy:
    """Return an analysis with the savings of time, none below zero, that explain the times of sets best.

    Args:
        found: the analysis.
        measured: sets and their times, as shares of the time of the whole UNet.
    """
    sets = np.array([[one.path in paths for one in found.removals] for paths, _ in measured], dtype=float)
    savings, _ = optimize.nnls(sets, np.array([1 - time for _, time in measured]))
    removals = (dataclasses.replace(one, time=float(s)) for one, s in zip(found.removals, savings, strict=True))
    return dataclasses.replace(found, target="eager", removals=tuple(removals))


def parts(found: Redundancy, paths: Sequence[str]) -> list[Removal]:
    """Return the removals that a set consists of; of a region that cannot be removed alone, those inside it."""
    every, known = [], {one.path: one for one in found.removals}
    for path in paths:
        every += [known[path]] if path in known else [one for one in found.removals if one.path.startswith(f"{path}.")]
    return every


def predicted(found: Redundancy, paths: Sequence[str], cost: str) -> float:
    """Return the share of a cost that is left without a set, by adding up."""
    return 1 - float(sum(getattr(one, cost) for one in parts(found, paths)))


def score(found: Redundancy, name: str, paths: Sequence[str]) -> float | None:
    """Return the cost of a set by a criterion, None if the analysis lacks what it is made of."""
    costs = CRITERIA[name].of(found)
    if costs is None:
        return None
    removals = {one.path: costs.error(one) for one in parts(costs, paths)}
    total = sum(removals.values())
    for pair in costs.pairs:
        if set(pair.paths) <= removals.keys():
            total += costs.error(pair) - sum(removals[path] for path in pair.paths)
    return float(total)


def predictions(found: Redundancy, paths: Sequence[str]) -> dict[str, Any]:
    """Return what an analysis predicts of a set: the shares of costs that are left, and its cost by every criterion."""
    scores = {name: score(found, name, paths) for name in CRITERIA}
    return {
        "predicted": {cost: predicted(found, paths, cost) for cost in ("time", "macs")},
        "scores": {name: cost for name, cost in scores.items() if cost is not None},
    }


class Calls:
    """Calls of generations of the whole UNet, on which the errors of sets are measured as an analysis does.

    Args:
        pipe: the pipeline.
        whole: the whole UNet.
        prompts: the prompts.
        steps: the number of inference steps.
        count: the number of calls, spread evenly.
    """

    def __init__(self, pipe: Any, whole: Any, prompts: Sequence[str], steps: int, count: int) -> None:
        calls, own = list[tuple[Any, Any]](), pipe.unet
        hook = whole.register_forward_pre_hook(lambda _, args, named: calls.append((args, named)), with_kwargs=True)
        pipe.unet = whole
        try:
            generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
            pipe(list(prompts), num_inference_steps=steps, output_type="latent", generator=generators)
        finally:
            pipe.unet = own
            hook.remove()
        self._calls = spread(calls, count)
        self._outputs = [self._output(whole, call) for call in self._calls]
        alphas = pipe.scheduler.alphas_cumprod
        self._noise = [1 - float(alphas[round(float(args[1] if len(args) > 1 else named["timestep"]))])
                       for args, named in self._calls]  # fmt: skip

    def error(self, unet: Any) -> float:
        """Return the squared error of a UNet's output relative to the squared output, weighted by the noise."""
        errors = []
        for call, output in zip(self._calls, self._outputs, strict=True):
            off = (self._output(unet, call) - output).square().flatten(1).mean(1)
            errors.append(float((off / output.square().flatten(1).mean(1)).mean()))
        return float(np.average(errors, weights=self._noise))

    @torch.no_grad()
    def _output(self, unet: Any, call: tuple[Any, Any]) -> Any:
        args, named = call
        return unet(*args, **{**named, "return_dict": False})[0].double()
