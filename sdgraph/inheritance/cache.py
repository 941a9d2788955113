"""The feature cache of a generation, and the backend that computes its calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import torch

from ..forecasts import weighted
from ..ir.sites import Site
from ..schedules import Drift, SamplingRun

Inputs = TypeVar("Inputs", contravariant=True)
Output = TypeVar("Output", covariant=True)


class Backend(Protocol[Inputs, Output]):
    """The seam between the plan of a call and its computation.

    PyTorch's variants, ONNX Runtime's sessions and the interpreter of contracts compute tensors. Models of costs
    compute a cost in the place of the output, and sizes in bytes in the place of values.
    """

    @property
    def sites(self) -> Mapping[str, Site]:
        """The sites that calls may reuse, by name, in graph order."""

    def compute(
        self, inputs: Inputs, reused: frozenset[str], read: Callable[[str], Any]
    ) -> tuple[Output, Mapping[str, Any]]:
        """Compute a call.

        Args:
            inputs: the inputs of the call, by name; None for a model of costs.
            reused: the sites that the call does not compute.
            read: the function that returns the value of a reused site.
        Returns:
            the output, and the values of the sites that were computed.
        """


@dataclass(frozen=True)
class Turn:
    """The UNet that computes a call, which is one of several in a switch.

    Args:
        backend: its backend.
        member: its name; "" for a UNet that computes all calls.
        carried: the sites whose values it may take from the UNet that computed the call before, when its turn begins.
    """

    backend: Backend[Any, Any]
    member: str = ""
    carried: frozenset[str] = frozenset()


Turns: TypeAlias = Callable[[int | None, float | None, SamplingRun], Turn]
"""Return the turn of a call, by the number of the call, its timestep and its run. The number is None if nothing vouches
for it, and the timestep is None if the samples of the call have several."""


def always(backend: Backend[Any, Any]) -> Turns:
    """Return the turns of a UNet that computes all calls.

    Args:
        backend: its backend.
    """
    turn = Turn(backend)
    return lambda call, timestep, run: turn


class FeatureCache:
    """The values of sites that a generation keeps between its calls.

    A loop asks `reused` which sites the next call reuses, computes the call with `read`, hands the new values to
    `write`, and goes on by `advance`. The rules need no tensors: of sizes in bytes, the same loop gives what a
    generation will do and keep.

    Args:
        sites: the sites that calls may reuse, by name.
        run: the sampling run, as far as it is known.
        number: the number of the first call in that run.
        member: the name of the UNet whose sites they are, in a switch.
    """

    def __init__(self, sites: Mapping[str, Site], run: SamplingRun, number: int = 0, member: str = "") -> None:
        self.sites, self.run, self.number, self.member = sites, run, number, member
        self.shared = False
        self._away: dict[str, FeatureCache] = {}  # of the other members of a switch, with invariant values alone
        self.gaps: dict[Drift, int] = {}
        self._values: dict[str, list[tuple[int, Any]]] = {}
        self._missed: set[str] = set()  # due at a call that did not need them; computed when next needed
        self._reused: frozenset[str] = frozenset()

    @property
    def over(self) -> bool:
        """Whether all calls of the run were made."""
        return self.run.calls is not None and self.number >= self.run.calls

    # -- one call ------------------------------------------------------------------------------------------------

    def reused(self, timestep: float) -> frozenset[str]:
        """Return the sites that the call under way reuses: read from the cache, or bypassed.

        Args:
            timestep: the timestep of the call.
        Raises:
            ScheduleError: a schedule does not fit the run.
        """
        self._reused = frozenset(
            name
            for name, site in self.sites.items()
            if ((site.bypassed and self.number) or (name in self._values and name not in self._missed))
            and not self._is_due(name, site, timestep)
        )
        return self._reused

    def _is_due(self, name: str, site: Site, timestep: float) -> bool:
        if isinstance(site.schedule, Drift):
            return self.number - self._values[name][-1][0] >= self.gaps.get(site.schedule, site.schedule.least)
        return site.schedule.refreshes(self.number, timestep, self.run)

    def read(self, site: str) -> torch.Tensor:
        """Return the value of a reused site at the call under way: the last one, or a forecast.

        Args:
            site: the name of the site, which was computed before.
        """
        return weighted([value for _, value in self._values[site]], self.weights(site))

    def weights(self, site: str) -> tuple[float, ...]:
        """Return the weights of the kept values of a site in its value at the call under way, oldest first."""
        numbers = [number for number, _ in self._values[site]]
        return self.sites[site].forecast.weights(numbers, self.number, self.run)

    def write(self, values: Mapping[str, Any]) -> None:
        """Keep what the call under way computed.

        Args:
            values: the values of the computed sites, tensors or sizes in bytes.
        """
        self._adapt(values)
        for name, value in values.items():
            site = self.sites[name]
            if not self.shared or site.invariant:
                self._values[name] = [*self._values.get(name, ()), (self.number, value)][-site.forecast.memory :]
        self._missed = {
            name
            for name, site in self.sites.items()
            if name not in values and name not in self._reused and not site.bypassed
        }

    def _adapt(self, values: Mapping[str, Any]) -> None:
        """Widen or narrow the gaps of drift schedules, by the errors of forecasts at the call under way."""
        errors: dict[Drift, list[torch.Tensor]] = {}
        for name, value in values.items():
            schedule = self.sites[name].schedule
            if isinstance(schedule, Drift) and name in self._values and isinstance(value, torch.Tensor):
                error = (value - self.read(name)).float().norm() / value.float().norm().clamp_min(1e-12)
                errors.setdefault(schedule, []).append(error)
        for schedule, of_sites in errors.items():  # the host reads one number for every schedule
            gap = self.gaps.get(schedule, schedule.least)
            self.gaps[schedule] = schedule.next_gap(gap, float(torch.stack(of_sites).max()))

    def advance(self) -> None:
        """End the call under way; after the last one of a run of known length nothing is kept."""
        self.number += 1
        if self.over:
            self._values.clear()
            self._away.clear()

    def turned(self, turn: Turn) -> FeatureCache:
        """Return the cache of the UNet that computes the call under way: this one, or another where the turn changes.

        The other one counts the same calls. It holds the values that depend on conditioning alone from the last turn of
        its UNet, and those that this turn carries over; so everything else is computed.

        Args:
            turn: the turn of the call.
        """
        if turn.member == self.member:
            return self
        cache = FeatureCache(turn.backend.sites, self.run, self.number, turn.member)
        cache.take_over(self)
        cache.shared = self.shared
        if not self.shared:
            for name in turn.carried & self._values.keys():
                cache._values[name] = self._values[name][-cache.sites[name].forecast.memory :]
        return cache

    # -- what is kept --------------------------------------------------------------------------------------------

    def kept(self) -> list[Any]:
        """Return all values."""
        away = [value for cache in self._away.values() for value in cache.kept()]
        return [value for values in self._values.values() for _, value in values] + away

    def age(self, site: str) -> int | None:
        """Return the number of calls since a site was computed; None if no value of it is kept."""
        return self.number - self._values[site][-1][0] if site in self._values else None

    def clear(self) -> None:
        """Forget all values, and what was learned of their drift."""
        self._values.clear()
        self._away.clear()
        self.gaps.clear()
        self._missed.clear()

    def share(self) -> None:
        """Keep values that depend on conditioning alone, and no others: several samples may use this cache by turns."""
        self.shared = True
        self._values.clear()
        self._away.clear()

    def take_over(self, before: FeatureCache) -> None:
        """Take the values that depend on conditioning alone from a generation with the same conditioning.

        Args:
            before: the cache of the earlier generation.
        """
        for cache in (before, *before._away.values()):
            values = {
                name: values
                for name, values in cache._values.items()
                if cache.sites[name].invariant and cache.sites[name].forecast.memory == 1
            }
            if cache.member == self.member:
                self._values = {name: value for name, value in values.items() if name in self.sites}
            elif values:
                self._away[cache.member] = FeatureCache(cache.sites, self.run, cache.number, cache.member)
                self._away[cache.member]._values = values

    def copy(self, gaps: Mapping[Drift, int]) -> FeatureCache:
        """Return a cache with the same values that goes on by itself.

        Args:
            gaps: the calls from one refresh to the next, of the schedules that follow the drift of features.
        """
        copied = FeatureCache(self.sites, self.run, self.number, self.member)
        copied.shared, copied.gaps, copied._away = self.shared, dict(gaps), dict(self._away)
        copied._values, copied._missed = dict(self._values), set(self._missed)
        return copied

    def state(self) -> object:
        """Return the part of the cache that decides about later calls, apart from gaps and values."""
        computed = frozenset(
            (name, len(values), values[-1][0] if isinstance(self.sites[name].schedule, Drift) else None)
            for name, values in self._values.items()
        )
        return computed, frozenset(self._missed), frozenset((name, c.state()) for name, c in self._away.items())


def no_value(site: str) -> torch.Tensor:
    """Raise an error: a call that computes everything reads nothing.

    Args:
        site: the name of a site.
    Raises:
        KeyError: always.
    """
    raise KeyError(site)


def apart(values: Mapping[str, torch.Tensor], others: Collection[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the values, as copies where they share memory with others, which a caller may edit.

    Args:
        values: the tensors by name.
        others: the tensors that they shall not share memory with.
    """
    taken = {other.untyped_storage().data_ptr() for other in others}
    return {n: v.clone() if v.untyped_storage().data_ptr() in taken else v for n, v in values.items()}
