"""The ways of generating images that `frontier.py` compares, as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from peers import PooledKeys, spectrum
from solvers import KARRAS
from studio import UNIT, Way, fitted, merging_tokens, on_onnx_runtime, searched, skipping

from sdgraph.passes import Bypass, GRIAttention, InheritFeatures
from sdgraph.schedules import DenseCenter, DenseEarly, DenseLate, Drift, Schedule, Uniform

CONVERGED = Way("converged", "reference", KARRAS, 100)
SOLVERS = (KARRAS, "DPM++ 2M", "UniPC", "AYS", "DDIM", "Euler")
EVERYWHERE = "{down_blocks.*,mid_block,up_blocks.*}"


def plain(*solvers: str, steps: tuple[int, ...]) -> Iterator[Way]:
    """Each solver at each number of steps, with every call computed."""
    for solver, number in product(solvers, steps):
        way = Way("", "plain", solver, number)
        yield replace(way, name=way.plain)


def accelerated(way: Way, kind: str, what: str, passes: Any = (), **options: Any) -> Way:
    """The way with passes, named after them."""
    return replace(way, name=f"{way.name}, {what}", kind=kind, passes=passes, **options)


def peers(way: Way) -> Iterator[Way]:
    """Published methods, with their published constants."""
    for interval in (2, 3, 5):
        yield accelerated(way, "DeepCache", f"DeepCache {interval}", InheritFeatures.deep_cache(interval))
    yield accelerated(way, "Spectrum", "Spectrum", spectrum())
    yield accelerated(way, "SADA", "SADA", make=skipping)


def forecasts(way: Way, interval: int) -> Iterator[Way]:
    """Our forecasts with a refresh at every `interval`-th call; a fit takes minutes, so for one solver only."""
    damped = InheritFeatures.damped(interval)
    yield accelerated(way, "damped", f"damped {interval}", damped)
    if way.solver == KARRAS:
        yield accelerated(way, "fitted", f"fitted {interval}", damped, make=fitted)


def drift(way: Way, *bounds: float) -> Iterator[Way]:
    """Damped forecasts that are refreshed as often as the features drift."""
    for bound in bounds:
        passes = InheritFeatures.damped(Drift(bound))
        yield accelerated(way, "drift", f"drift {bound}", passes)


def bypasses(way: Way, interval: int) -> Iterator[Way]:
    """Modules left out at calls that do not refresh, alone and together with a forecast."""
    schedule: Schedule = Uniform(interval)
    yield accelerated(way, "bypass", f"bypass {interval}", Bypass("mid_block", schedule))
    damped, last = InheritFeatures.damped(interval), Bypass("up_blocks.3.attentions.2", schedule)
    yield accelerated(way, "bypass", f"damped {interval} and bypass", (damped, last))


def plans(quick: bool) -> list[Way]:
    """The steps people use: plain solvers, published methods, and ours."""
    if quick:
        few, many = plain(KARRAS, steps=(4, 6))
        ways = [CONVERGED, few, many, *peers(many), *forecasts(many, 2), *drift(many, 0.1), *bypasses(many, 2)]
        return [replace(way, unit=many.name) for way in ways]
    ways = [CONVERGED]
    for solver in SOLVERS:
        ways += plain(solver, steps=(5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50))
        for way in plain(solver, steps=(20, 25)):
            if solver != "Euler":  # it takes DDIM's steps
                ways += [*peers(way), *forecasts(way, 2), *drift(way, 0.2)]
            if solver == KARRAS:
                mended = accelerated(way, "Spectrum", "Spectrum over the run", spectrum(calls=None))
                ways += [mended, *drift(way, 0.1, 0.4), *bypasses(way, 2)]
        if solver == KARRAS:
            for steps, interval in ((20, 3), (30, 3), (40, 4)):
                ways += forecasts(next(plain(KARRAS, steps=(steps,))), interval)
    best = next(way for way in ways if way.name == f"{UNIT}, fitted 2")
    return [*ways, *on_another_runtime(next(way for way in ways if way.name == UNIT), best)]


def on_another_runtime(unit: Way, *others: Way) -> Iterator[Way]:
    """The ways on ONNX Runtime, whose time is measured in the first of them."""
    name = f"{unit.name}, ONNX Runtime"
    for way in (unit, *others):
        make = partial(on_onnx_runtime, of=way)
        yield accelerated(way, "ONNX Runtime", "ONNX Runtime", way.passes, make=make, unit=name)


def inheritance(quick: bool) -> list[Way]:
    """Feature inheritance at 50 steps of DDIM: published methods, forecasts, and searched schedules."""
    solver, steps = "DDIM of the model", 6 if quick else 50
    (whole,) = plain(solver, steps=(steps,))
    fewer = plain(solver, steps=(3,) if quick else (30, 25, 20, 17, 14, 12, 10))
    intervals, deep = (2,) if quick else (2, 3, 5), InheritFeatures.deep_cache()
    ways = [whole, *fewer]
    for interval, branch in product(intervals, (0,) if quick else (0, 1, 2)):
        passes = InheritFeatures.deep_cache(interval, branch)
        ways.append(accelerated(whole, "DeepCache", f"DeepCache {interval}, branch {branch}", passes))
    if not quick:
        for schedule in (DenseEarly(5), DenseLate(5), DenseCenter(5)):
            ways.append(accelerated(whole, "DeepCache", f"DeepCache {schedule}", replace(deep, schedule=schedule)))
        published = {
            "Faster Diffusion": InheritFeatures.faster_diffusion(),
            "T-GATE": InheritFeatures.t_gate(20),
            "attention broadcast": InheritFeatures.attention_broadcast(),
            "all layers, every 2nd": InheritFeatures.at_level("layer", within=EVERYWHERE),
        }
        ways += [accelerated(whole, "published", name, passes) for name, passes in published.items()]
    for forecast, interval in product((0, 1), intervals):
        passes = replace(deep, schedule=Uniform(interval), forecast=forecast)
        kind = "searched, forecast" if forecast else "searched"
        if forecast:
            ways.append(accelerated(whole, "forecast", f"DeepCache {interval}, forecast", passes))
        ways.append(accelerated(whole, kind, f"as much as DeepCache {interval}, {kind}", passes, make=searched))
    return [replace(way, unit=whole.name) for way in ways]


def attention(quick: bool) -> list[Way]:
    """Global-regional attention, pooled keys and token merging at 50 steps of DDIM, without training."""
    (whole,) = plain("DDIM of the model", steps=(2 if quick else 50,))
    ways = [whole]
    for window, pool in ((8, 4),) if quick else ((8, 2), (8, 4), (4, 2), (4, 4), (2, 2)):
        ways.append(accelerated(whole, "GRI", f"GRI, window {window}, pool {pool}", GRIAttention(window, pool)))
    if not quick:
        ways.append(accelerated(whole, "GRI", "GRI, window 8, pool 4, shift 4", GRIAttention(8, 4, shift=4)))
        for window in (4, 2):
            passes = GRIAttention(window, 2, (0, 1))
            ways.append(accelerated(whole, "GRI, two levels", f"GRI, window {window}, pool 2, two levels", passes))
    for pool in (2,) if quick else (2, 4):
        ways.append(accelerated(whole, "pooled keys", f"pooled keys, pool {pool}", PooledKeys(pool)))
    for ratio in (0.5,) if quick else (0.25, 0.5, 0.75):
        make = partial(merging_tokens, ratio=ratio)
        ways.append(accelerated(whole, "token merging", f"tomesd, ratio {ratio}", make=make))
    return [replace(way, unit=whole.name) for way in ways]


# By name; the first way of each is the reference.
SETS: Mapping[str, Callable[[bool], list[Way]]] = {"plans": plans, "inheritance": inheritance, "attention": attention}
