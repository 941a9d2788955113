"""What inheriting does to a generation, measured stretch by stretch. `search` chooses by it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..forecasts import weighted
from ..graph import Graph
from ..runtime.interface import no_value
from ..runtime.unet import GraphUNet
from ..schedules import Run
from ..solvers import is_random, lambdas_of, name_of
from .latents import Array


@dataclass(frozen=True)
class RecordedCall:
    """A call that computed everything."""

    flat: Mapping[str, Tensor]
    output: Tensor
    values: Mapping[str, Tensor]


class _Enough(Exception):
    """What was to be seen of a generation has been seen."""


class ReplayUNet(GraphUNet):
    """A UNet that computes everything once and remembers it; then it plays the generation again, by heart up to some
    call, with sites inherited for some calls and computing all from then on.

    Args:
        graph: with sites.
        generate: a generation with a UNet, always from the same noise; returns the final latents.
        scheduler: of the pipeline that generates, for forecasts along noise levels.
    """

    def __init__(self, graph: Graph, generate: Callable[[GraphUNet], Tensor], scheduler: Any = None) -> None:
        super().__init__(graph)
        self.generate = generate
        self.recorded: list[RecordedCall] = []
        self.play = self._record
        self.final = generate(self)
        self.calls = Run.of(self.timesteps)
        if scheduler is not None:
            lambdas, random = lambdas_of(scheduler, self.timesteps), is_random(scheduler)
            self.calls = replace(self.calls, lambdas=lambdas, solver=name_of(scheduler), random=random)

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(float(call.flat["timestep"].reshape(-1)[0]) for call in self.recorded)

    def run(self, flat: Mapping[str, Tensor]) -> Tensor:
        return self.play(flat)

    def _record(self, flat: Mapping[str, Tensor]) -> Tensor:
        output, values = self._step(flat, frozenset(), no_value)
        self.recorded.append(RecordedCall(dict(flat), output, values))
        return output

    @torch.no_grad()
    def errors(self, refreshes: tuple[int, ...], sites: frozenset[str], until: int, stop: int) -> Array:
        """(calls, samples) mean squared errors of the latents if `sites` are inherited for some calls.

        Args:
            refreshes: calls they are inherited from; the calls up to the last of them are as recorded.
            until: the first call that computes everything again.
            stop: the call at which to stop.
        Returns:
            of the latents that go into each call after the last refresh, up to and with the one at which it stops; the
            end of the generation counts as a call.
        """
        errors: list[Array] = []
        number = -1
        samples = len(self.final)

        def play(flat: Mapping[str, Tensor]) -> Tensor:
            nonlocal number
            number += 1
            if number > refreshes[-1]:
                errors.append(distances(flat["sample"], self.recorded[number].flat["sample"], samples))
            if number == stop:
                raise _Enough
            if number <= refreshes[-1]:
                return self.recorded[number].output
            stale = sites if number < until else frozenset()
            return self._step(flat, stale, value)[0]

        def value(site: str) -> Tensor:
            weights = self._sites[site].forecast.weights(refreshes, number, self.calls)
            return weighted([self.recorded[i].values[site] for i in refreshes], weights)

        self.play = play
        with contextlib.suppress(_Enough):
            errors.append(distances(self.generate(self), self.final, samples))
        return np.array(errors)

    def weights(self, sites: frozenset[str], probes: int) -> Array:
        """(T + 1, samples) by how much an error of the latents that go into each call is multiplied until the end.

        Measured at some calls, with errors that inheriting makes: guidance weakens what they have in common with and
        without the prompt, and would magnify random ones. Between these calls the weights are geometric.
        """
        T = len(self.recorded)
        at = sorted({round(k) for k in np.linspace(2, T - 1, probes)} - {*range(2)}) if T > 2 else []
        logs = []
        for k in at:
            errors = np.maximum(self.errors((k - 2,), sites, k, T), 1e-300)
            logs.append(np.log(errors[-1] / errors[1]))
        logs.append(np.zeros(len(self.final)))
        return np.exp(
            [np.interp(np.arange(T + 1), [*at, T], logs_of_sample) for logs_of_sample in np.transpose(logs)]
        ).T


def distances(a: Tensor, b: Tensor, samples: int) -> Array:
    """(samples,) mean squared differences. There may be several latents of each sample, as with guidance: then samples
    come by turns."""
    squares = (a.double() - b.double()).square().flatten(1).mean(1)
    errors: Array = squares.reshape(-1, samples).mean(0).cpu().numpy()
    return errors


class MeasurementCache:
    """Measurements in a folder, named by what they are of and by the latents that the undisturbed pipeline makes:
    those depend on the weights, prompts, scheduler and steps alike."""

    def __init__(self, folder: Path | None, final: Tensor) -> None:
        self.folder = folder
        self.key = final.cpu().float().numpy().tobytes()

    def __call__(self, name: str, measure: Callable[[], Array]) -> Array:
        if self.folder is None:
            return measure()
        path = self.folder / f"{hashlib.sha256(name.encode() + self.key).hexdigest()[:20]}.npy"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")
            with unfinished.open("wb") as file:
                np.save(file, measure())
            unfinished.rename(path)
        return np.load(path)  # type: ignore[no-any-return]
