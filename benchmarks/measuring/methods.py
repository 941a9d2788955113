"""The methods of generating images that `benchmarks/frontier.py` compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from sdgraph.passes import Bypass, GRIAttention, InheritFeatures
from sdgraph.schedules import DenseCenter, DenseEarly, DenseLate, Drift, Schedule, Uniform

from .generator import UNIT, Method, fitted, merging_tokens, on_onnx_runtime, searched, skipping
from .published import PooledKeys, spectrum
from .solvers import KARRAS

CONVERGED = Method("converged", "reference", KARRAS, 100)
SOLVERS = (KARRAS, "DPM++ 2M", "UniPC", "AYS", "DDIM", "Euler")
EVERYWHERE = "{down_blocks.*,mid_block,up_blocks.*}"


def plain(*solvers: str, steps: tuple[int, ...]) -> Iterator[Method]:
    """Yield each solver at each number of steps, with every call computed."""
    for solver, number in product(solvers, steps):
        method = Method("", "plain", solver, number)
        yield replace(method, name=method.plain)


def accelerated(method: Method, kind: str, what: str, passes: Any = (), **options: Any) -> Method:
    """Return the method with passes, named after them."""
    return replace(method, name=f"{method.name}, {what}", kind=kind, passes=passes, **options)


def peers(method: Method) -> Iterator[Method]:
    """Yield published methods, with their published constants."""
    for interval in (2, 3, 5):
        yield accelerated(method, "DeepCache", f"DeepCache {interval}", InheritFeatures.deep_cache(interval))
    yield accelerated(method, "Spectrum", "Spectrum", spectrum())
    yield accelerated(method, "SADA", "SADA", make=skipping)


def forecasts(method: Method, interval: int) -> Iterator[Method]:
    """Yield our forecasts with every `interval`-th call computed, and for one solver fitted ones."""
    damped = InheritFeatures.damped(interval)
    yield accelerated(method, "damped", f"damped {interval}", damped)
    if method.solver == KARRAS:
        yield accelerated(method, "fitted", f"fitted {interval}", damped, make=fitted)


def drift(method: Method, *bounds: float) -> Iterator[Method]:
    """Yield damped forecasts that are computed again as often as the features drift."""
    for bound in bounds:
        passes = InheritFeatures.damped(Drift(bound))
        yield accelerated(method, "drift", f"drift {bound}", passes)


def bypasses(method: Method, interval: int) -> Iterator[Method]:
    """Yield bypasses at calls that reuse features, alone and together with a forecast."""
    schedule: Schedule = Uniform(interval)
    yield accelerated(method, "bypass", f"bypass {interval}", Bypass("mid_block", schedule))
    damped, last = InheritFeatures.damped(interval), Bypass("up_blocks.3.attentions.2", schedule)
    yield accelerated(method, "bypass", f"damped {interval} and bypass", (damped, last))


def plans(quick: bool) -> list[Method]:
    """Return the methods at the usual steps: plain solvers, published methods, and ours."""
    if quick:
        few, many = plain(KARRAS, steps=(4, 6))
        methods = [CONVERGED, few, many, *peers(many), *forecasts(many, 2), *drift(many, 0.1), *bypasses(many, 2)]
        return [replace(method, unit=many.name) for method in methods]
    methods = [CONVERGED]
    for solver in SOLVERS:
        methods += plain(solver, steps=(5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50))
        for method in plain(solver, steps=(20, 25)):
            if solver != "Euler":  # it takes DDIM's steps
                methods += [*peers(method), *forecasts(method, 2), *drift(method, 0.2)]
            if solver == KARRAS:
                mended = accelerated(method, "Spectrum", "Spectrum over the run", spectrum(calls=None))
                methods += [mended, *drift(method, 0.1, 0.4), *bypasses(method, 2)]
        if solver == KARRAS:
            for steps, interval in ((20, 3), (30, 3), (40, 4)):
                methods += forecasts(next(plain(KARRAS, steps=(steps,))), interval)
    best = next(method for method in methods if method.name == f"{UNIT}, fitted 2")
    return [*methods, *on_another_runtime(next(method for method in methods if method.name == UNIT), best)]


def on_another_runtime(unit: Method, *others: Method) -> Iterator[Method]:
    """Yield the methods on ONNX Runtime, whose unit of time is the first of them."""
    name = f"{unit.name}, ONNX Runtime"
    for method in (unit, *others):
        make = partial(on_onnx_runtime, of=method)
        yield accelerated(method, "ONNX Runtime", "ONNX Runtime", method.passes, make=make, unit=name)


def inheritance(quick: bool) -> list[Method]:
    """Return feature inheritance at 50 steps of DDIM: published methods, forecasts, and searched schedules."""
    solver, steps = "DDIM of the model", 6 if quick else 50
    (whole,) = plain(solver, steps=(steps,))
    fewer = plain(solver, steps=(3,) if quick else (30, 25, 20, 17, 14, 12, 10))
    intervals, deep = (2,) if quick else (2, 3, 5), InheritFeatures.deep_cache()
    methods = [whole, *fewer]
    for interval, branch in product(intervals, (0,) if quick else (0, 1, 2)):
        passes = InheritFeatures.deep_cache(interval, branch)
        methods.append(accelerated(whole, "DeepCache", f"DeepCache {interval}, branch {branch}", passes))
    if not quick:
        for schedule in (DenseEarly(5), DenseLate(5), DenseCenter(5)):
            methods.append(accelerated(whole, "DeepCache", f"DeepCache {schedule}", replace(deep, schedule=schedule)))
        published = {
            "Faster Diffusion": InheritFeatures.faster_diffusion(),
            "T-GATE": InheritFeatures.t_gate(20),
            "attention broadcast": InheritFeatures.attention_broadcast(),
            "all layers, every 2nd": InheritFeatures.at_level("layer", within=EVERYWHERE),
        }
        methods += [accelerated(whole, "published", name, passes) for name, passes in published.items()]
    for forecast, interval in product((0, 1), intervals):
        passes = replace(deep, schedule=Uniform(interval), forecast=forecast)
        kind = "searched, forecast" if forecast else "searched"
        if forecast:
            methods.append(accelerated(whole, "forecast", f"DeepCache {interval}, forecast", passes))
        methods.append(accelerated(whole, kind, f"as much as DeepCache {interval}, {kind}", passes, make=searched))
    return [replace(method, unit=whole.name) for method in methods]


def attention(quick: bool) -> list[Method]:
    """Return global-regional attention, pooled keys and token merging at 50 steps of DDIM, without training."""
    (whole,) = plain("DDIM of the model", steps=(2 if quick else 50,))
    methods = [whole]
    for window, pool in ((8, 4),) if quick else ((8, 2), (8, 4), (4, 2), (4, 4), (2, 2)):
        methods.append(accelerated(whole, "GRI", f"GRI, window {window}, pool {pool}", GRIAttention(window, pool)))
    if not quick:
        methods.append(accelerated(whole, "GRI", "GRI, window 8, pool 4, shift 4", GRIAttention(8, 4, shift=4)))
        for window in (4, 2):
            passes = GRIAttention(window, 2, (0, 1))
            methods.append(accelerated(whole, "GRI, two levels", f"GRI, window {window}, pool 2, two levels", passes))
    for pool in (2,) if quick else (2, 4):
        methods.append(accelerated(whole, "pooled keys", f"pooled keys, pool {pool}", PooledKeys(pool)))
    for ratio in (0.5,) if quick else (0.25, 0.5, 0.75):
        make = partial(merging_tokens, ratio=ratio)
        methods.append(accelerated(whole, "token merging", f"tomesd, ratio {ratio}", make=make))
    return [replace(method, unit=whole.name) for method in methods]


# By name; the first method of each is the reference.
SETS: Mapping[str, Callable[[bool], list[Method]]] = {
    "plans": plans,
    "inheritance": inheritance,
    "attention": attention,
}
