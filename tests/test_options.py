"""Options: values that annotations do not describe are refused when an object is made, in every class."""

from __future__ import annotations

import dataclasses
import inspect
import math
import subprocess
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdgraph
import sdgraph.tuning.losses
from sdgraph import Pass, Spec, parse
from sdgraph.errors import ScheduleError, SdgraphError, SpecError
from sdgraph.forecasts import Fitted, Forecast, Polynomial
from sdgraph.options import (
    Bounds,
    Count,
    Finite,
    Index,
    Misfit,
    Number,
    Paths,
    Share,
    annotations_of,
    described,
    fitted,
)
from sdgraph.passes import Assemble, CleanUp, GRIAttention, InheritFeatures, MECondConv, PruneBlocks, ShareWeights
from sdgraph.schedules import DenseEarly, Drift, Explicit, Gate, Once, PerCall, Range, Schedule, Uniform, Warm
from sdgraph.spec import _check_name, known, presets, read
from sdgraph.tuning import AttentionMaps, Denoising, Features, Guidance, Loss, Output, Wavelet

# -- annotations -------------------------------------------------------------------------------------------------------


class Described(Protocol):
    name: str


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, Count, 3),
        (np.int64(3), Count, 3),
        (torch.tensor(2), Index, 2),
        (np.float32(0.5), Share, 0.5),
        (1, float, 1),
        (np.bool_(True), bool, True),
        (np.str_("a"), str, "a"),
        ([0, 2], tuple[Index, ...], (0, 2)),
        (np.array([0, 3]), tuple[Index, ...], (0, 3)),
        (range(3), tuple[int, ...], (0, 1, 2)),
        ((path for path in "ab"), Paths, ("a", "b")),
        ("a.b", Paths, "a.b"),
        ((("a", "b"), "c"), tuple[str | tuple[str, str], ...], (("a", "b"), "c")),
        (None, int | None, None),
        (math.inf, Number, math.inf),
        (math.nan, float, math.nan),
        ("b", Literal["a", "b"], "b"),
        ({"a": 1}, Mapping[str, Count], {"a": 1}),
        (["a"], Sequence[str], ["a"]),
        (len, typing.Callable[[Any], int], len),
        (object, type[object], object),
        (3, Described, 3),
        (3, Any, 3),
        (3, Annotated[str, Any], 3),
        (Path("a"), str | Path, Path("a")),
    ],
)
def test_what_fits(value: Any, kind: Any, expected: Any) -> None:
    found = fitted(value, kind)
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (0, Count, "a whole number of at least 1"),
        (True, Count, "a whole number"),
        (2.0, int, "a whole number"),
        (False, float, "a number"),
        ("1", float, "a number"),
        (10**400, float, "a number"),
        (math.nan, Finite, "a finite number"),
        (math.nan, Number, "a number"),
        (math.inf, Finite, "a finite number"),
        (1.5, Share, "from 0 to 1"),
        (1, bool, "True or False"),
        (b"a", str, "text"),
        ("", Paths, "text that is not empty"),
        ((), Paths, "a tuple that is not empty"),
        (("a", 3), Paths, "of which each is text"),
        ("ab", tuple[str, ...], "a tuple"),
        ({"a", "b"}, tuple[str, ...], "a tuple"),
        ((1, 2, 3), tuple[int, int], "a tuple of 2"),
        (3, tuple[int, ...], "a tuple"),
        ("ab", Sequence[str], "a sequence, of which each is text"),
        ({"a": -1}, Mapping[str, Count], "a mapping from text to a whole number"),
        ({1: 1}, Mapping[str, Count], "a mapping from text"),
        ("c", Literal["a", "b"], "one of 'a', 'b'"),
        (True, Literal[0, 1], "one of 0, 1"),
        (0, None, "None"),
        (torch.zeros(2), float, "a number"),
        (torch.zeros((), device="meta"), float, "a number"),
        (Uniform, Schedule, "a Schedule"),
    ],
)
def test_what_does_not_fit(value: Any, kind: Any, words: str) -> None:
    with pytest.raises(Misfit):
        fitted(value, kind)
    assert words in described(kind)


# -- specs of users ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halves(Pass):
    """A pass as a user writes it, with annotations of all kinds."""

    contract: ClassVar[sdgraph.Contract] = sdgraph.Contract.CLOSE
    ratio: Annotated[float, Bounds(gt=0, le=0.5)] = 0.5
    implied: int = None  # type: ignore[assignment]
    later: NotYetThere = 3  # type: ignore[name-defined]  # noqa: F821
    anything: Any = None
    named: str = field(default="a", kw_only=True)

    def __post_init__(self) -> None:
        assert type(self.ratio) in (int, float)  # checked before
        if self.named == "wrong":
            raise SpecError("named is wrong", where="Halves")

    @classmethod
    def third(cls, of: Share = 1.0) -> Halves:
        """A preset."""
        return cls(of / 3)


def test_a_user_s_pass_is_checked_without_code_of_its_own() -> None:
    assert str(Halves(np.float64(0.25))) == "Halves(0.25)"
    assert parse("Halves.third(0.5)") == (Halves(0.5 / 3),)
    assert Halves(later="what a type checker knows", anything=(1, {"a": None})).implied is None
    for make, words in (
        (lambda: Halves(0.75), "ratio is 0.75"),
        (lambda: Halves("0.5"), "ratio is '0.5'"),
        (lambda: Halves(implied="x"), "implied is 'x'"),
        (lambda: Halves(named=3), "named is 3"),
        (lambda: Halves(named="wrong"), "named is wrong"),
        (lambda: Halves.third(2), "of is 2"),
        (lambda: dataclasses.replace(Halves(), ratio=1), "ratio is 1"),
        (lambda: parse("Halves(ratio=1)"), "ratio is 1"),
        (lambda: parse("Halves.third('all')"), "of is 'all'"),
    ):
        with pytest.raises(SpecError, match=words) as error:
            make()
        assert "Halves" in error.value.where
    with pytest.raises(TypeError):  # in Python's own words
        Halves.third(size=3)


# -- all specs of ours -------------------------------------------------------------------------------------------------

MODULES = ("sdgraph.passes", "sdgraph.schedules", "sdgraph.forecasts", "sdgraph.tuning", "sdgraph.compiler")
OURS = sorted(
    (c for c in known(Spec).values() if c.__module__.startswith(MODULES) and dataclasses.fields(c)),
    key=lambda c: c.__name__,
)
VALUES: tuple[Any, ...] = (
    None, True, False, -2, -1, 0, 1, 2, 3, 7, 10**30, -1.5, -1e-9, 0.0, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 1e9,
    math.nan, math.inf, -math.inf, "", "1", "mid_block", "nonsense", "call", "input", "branch", "stage",
    (), (0,), (0, 3), (0, -1), (0, 0.5), (3,), ("mid_block",), ("",), (1, "a"), ((1.0,), ()), (("a", "b"),),
    (math.nan,), [0, 3], ["mid_block"], {"a": 1}, {"mid_block"}, Uniform(2), Once(), Polynomial(1), CleanUp(),
    Uniform, object(), b"x", 1j, np.int64(2), np.float64(0.5), np.array([0, 3]), torch.tensor(2), torch.zeros(3), len,
)  # fmt: skip
REQUIRED: dict[str, dict[str, Any]] = {
    "DenseCenter": {"interval": 2},
    "DenseEarly": {"interval": 2},
    "DenseLate": {"interval": 2},
    "Explicit": {"steps": (0,)},
    "Fitted": {"table": ((1.0,),)},
    "Gate": {"call": 3},
    "Range": {"low": -1e12, "high": 1e12},
    "Uniform": {"interval": 2},
    "Warm": {"then": Uniform(2)},
    "PruneBlocks": {"blocks": "mid_block"},
    "InheritFeatures": {"sites": "mid_block"},
    "Bypass": {"sites": "mid_block"},
    "Assemble": {"regions": "mid_block", "source": "unet"},
    "ShareWeights": {"groups": ("mid_block.*",)},
    "ByCall": {"members": ("a", "b"), "starts": (3,)},
    "ByShare": {"members": ("a", "b"), "starts": (0.5,)},
    "ByTimestep": {"members": ("a", "b"), "starts": (500.0,)},
    "InTurns": {"members": ("a", "b")},
    "PerCall": {"members": ("a", "b")},
    "LearnedPruning": {"steps": 3, "macs": 0.5},
    "LearnedRouting": {"steps": 3, "macs": 0.5},
    "MasksByCall": {"left_out": ((),), "schedule": PerCall(("a",))},
    "PruneChannels": {"macs": 0.7},
    "PruneToBudget": {"macs": 0.7},
    "ImageFeatures": {"encoder": torch.nn.Identity(), "vae": torch.nn.Identity()},
}


def options_of(spec: type[Spec]) -> list[tuple[str, Any]]:
    hints = annotations_of(spec)
    return [(f.name, hints[f.name]) for f in dataclasses.fields(spec) if f.init]


def test_all_specs_are_seen_and_all_their_options_are_annotated() -> None:
    assert len(OURS) > 25
    assert {"Uniform", "Polynomial", "InheritFeatures", "Guidance", "MECondConv"} <= {spec.__name__ for spec in OURS}
    for spec in OURS:
        for name, kind in options_of(spec):
            loose = (int, float, tuple[int, ...], tuple[float, ...])
            assert kind not in loose, f"{spec.__name__}.{name} has no range"


@pytest.mark.parametrize("spec", OURS, ids=lambda spec: spec.__name__)
def test_every_option_of_every_spec_is_right_or_refused_by_name(spec: type[Spec]) -> None:
    required = REQUIRED.get(spec.__name__, {})
    for name, kind in options_of(spec):
        for value in VALUES:
            options = {**required, name: value}
            try:
                fitted(value, kind)
            except Misfit:
                with pytest.raises(spec.refusal, match=f"^{name} is ") as refused:
                    spec(**options)
                assert refused.value.where == spec.__name__
                assert refused.value.hint
                continue
            try:
                one = spec(**options)
            except SdgraphError:
                continue  # it does not go with the others
            if spec.__name__ != "ImageFeatures":
                assert read(str(one)) == one, str(one)


@pytest.mark.parametrize("spec", OURS, ids=lambda spec: spec.__name__)
def test_defaults_are_what_annotations_describe(spec: type[Spec]) -> None:
    required = REQUIRED.get(spec.__name__, {})
    one = spec(**required)
    assert read(str(one)) == one if spec.__name__ != "ImageFeatures" else True
    for field_ in dataclasses.fields(spec):
        if field_.name in required or field_.default is dataclasses.MISSING:
            continue
        assert fitted(field_.default, annotations_of(spec)[field_.name]) == field_.default


PRESETS = [(spec, name) for spec in OURS for name in presets(spec) if not issubclass(spec, Fitted)]


@pytest.mark.parametrize(("spec", "name"), PRESETS, ids=lambda part: getattr(part, "__name__", part))
def test_every_argument_of_every_preset_is_right_or_refused_by_name(spec: type[Spec], name: str) -> None:
    preset = presets(spec)[name]
    hints = annotations_of(preset.__func__)
    parameters = inspect.signature(preset).parameters
    needed = {"level": "block", "ratio": 0.5, "share": 0.5, "end": 0.5, "calls": 3}
    required = {n: needed[n] for n, p in parameters.items() if p.default is inspect.Parameter.empty and n in needed}
    for argument in parameters:
        for value in VALUES:
            try:
                fitted(value, hints[argument])
            except Misfit:
                with pytest.raises(spec.refusal, match=f"^{argument} is ") as error:
                    preset(**{**required, argument: value})
                assert error.value.where == f"{spec.__name__}.{name}"
            else:
                try:
                    one = preset(**{**required, argument: value})
                except SdgraphError:
                    continue
                assert read(str(one)) == one


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Range(900, 100), "no timestep lies between 900 and 100"),
        (lambda: Range(5, 5), "no timestep"),
        (lambda: Range(math.nan, 5), "low is nan"),
        (lambda: Uniform(0), "interval is 0"),
        (lambda: Uniform(2.5), "interval is 2.5"),
        (lambda: Uniform("3"), "interval is '3'"),
        (lambda: Uniform(True), "interval is True"),
        (lambda: Warm(2), "then is 2"),
        (lambda: Warm(Uniform), "construct it: Uniform"),
        (lambda: Warm(Uniform(2), first=-1), "first is -1"),
        (lambda: Gate(0), "call is 0"),
        (lambda: Gate(3, before="Uniform(2)"), "before is 'Uniform"),
        (lambda: Drift(-1), "bound is -1"),
        (lambda: Drift(math.nan), "bound is nan"),
        (lambda: Drift(0.1, 4, 2), "most is 2"),
        (lambda: DenseEarly(3, 1), "power is 1"),
        (lambda: Explicit([0, -1]), r"steps is \[0, -1\]"),
        (lambda: Explicit([3, 6]), "does not refresh at the first call"),
        (lambda: Explicit([]), r"steps is \[\]"),
        (lambda: Explicit([0, 1.5]), "steps is"),
        (lambda: Explicit("012"), "steps is '012'"),
        (lambda: Explicit((0, 4), of=-1), "of is -1"),
        (lambda: Polynomial(1, damping=5), "damping is 5"),
        (lambda: Polynomial(3), "order is 3"),
        (lambda: Polynomial(along="lamda"), "did you mean 'lambda'"),
        (lambda: InheritFeatures.deep_cache(branch=-1), "branch is -1"),
        (lambda: InheritFeatures.deep_cache(0), "interval is 0"),
        (lambda: InheritFeatures.damped(2, damping=5), "damping is 5"),
        (lambda: InheritFeatures.t_gate(1), "gate is 1"),
        (lambda: InheritFeatures.at_level("blok"), "did you mean 'block'"),
        (lambda: InheritFeatures.attention_broadcast(between=(800, 100)), "no timestep"),
        (lambda: InheritFeatures("mid_block", part="brunch"), "did you mean 'branch'"),
        (lambda: InheritFeatures("mid_block", forecast=3), "forecast is 3"),
        (lambda: InheritFeatures(["mid_block", 3]), "sites is"),
        (lambda: InheritFeatures(), r"sites is \(\)"),
        (lambda: PruneBlocks(3), "blocks is 3"),
        (lambda: PruneBlocks("bk-sdm-bas"), "did you mean 'bk-sdm-base'"),
        (lambda: GRIAttention(levels=0), "levels is 0"),
        (lambda: GRIAttention(window=16.0), "window is 16.0"),
        (lambda: GRIAttention(variant="jiont"), "did you mean 'joint'"),
        (lambda: MECondConv(temperature=math.inf), "temperature is inf"),
        (lambda: MECondConv(routing="timesteps"), "did you mean 'timestep'"),
        (lambda: ShareWeights("mid_block.*"), "groups is 'mid_block"),
        (lambda: Assemble("mid_block"), "source is ''"),
        (lambda: sdgraph.Fixpoint((CleanUp(),), repeat=0), "repeat is 0"),
        (lambda: sdgraph.Chain(3), "is not a pass"),
        (lambda: Output(weight=-1), "weight is -1"),
        (lambda: Output(weight=math.nan), "weight is nan"),
        (lambda: Output(snr_gamma=-5), "snr_gamma is -5"),
        (lambda: Denoising("5"), "snr_gamma is '5'"),
        (lambda: Guidance(0), "scale is 0"),
        (lambda: Guidance(math.inf), "scale is inf"),
        (lambda: Wavelet(levels=0), "levels is 0"),
        (lambda: Wavelet(below=1.5), "below is 1.5"),
        (lambda: Features("stages"), "did you mean 'stage'"),
        (lambda: Features(()), r"at is \(\)"),
        (lambda: Features(sigma=-2), "sigma is -2"),
        (lambda: AttentionMaps("mid_block"), "at is 'mid_block'"),
        (lambda: sdgraph.Site(3), "schedule is 3"),
        (lambda: sdgraph.Contract.CLOSE(rtol=-1), "rtol is -1"),
        (lambda: sdgraph.Contract.CLOSE(atol=math.nan), "atol is nan"),
        (lambda: sdgraph.Contract("closer"), "did you mean 'close'"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(make: Any, words: str) -> None:
    with pytest.raises((SpecError, ScheduleError), match=words):
        make()


@pytest.mark.law("The text of a pass parses back to the same pass.")
@given(st.integers(1, 99), st.lists(st.integers(0, 99), max_size=5), st.floats(-1, 2), st.sampled_from([0, 1, 2]))
@settings(derandomize=True)
def test_right_options_survive_text(interval: int, calls: list[int], damping: float, order: int) -> None:
    for one in (
        Uniform(interval),
        Explicit([0, *calls]),
        Gate(interval, Uniform(interval)),
        Warm(Uniform(interval), order),
    ):
        assert read(str(one), Schedule) == one
    assert Explicit([0, *calls]).steps == tuple(sorted({0, *calls}))
    forecast = Polynomial(order, damping)
    assert read(str(forecast), Forecast) == forecast
    one = InheritFeatures(["mid_block"], Uniform(interval), forecast=forecast)
    assert parse(str(one)) == (one,)


def test_a_saved_recipe_and_a_text_are_read_as_strictly() -> None:
    for text in (
        "InheritFeatures('mid_block', Uniform(0))",
        "InheritFeatures.deep_cache(branch=-1)",
        "MECondConv(experts=1)",
    ):
        with pytest.raises((SpecError, ScheduleError)):
            parse(text)
    with pytest.raises(SpecError, match="levels is 0"):
        read("Wavelet(levels=0)", Loss)


# -- names -------------------------------------------------------------------------------------------------------------

THEIRS = """
from dataclasses import dataclass
from sdgraph import {base}
from sdgraph.schedules import Schedule
from sdgraph.tuning import Loss

@dataclass(frozen=True)
class {name}({kind}):
    def run(self, graph): return None
    def refreshes(self, call, timestep, run): return True
"""
# The libraries are imported once; each case is a fork that imports sdgraph and the other package for the first time.
CASES = """
import os, sys, traceback
import accelerate, torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

def ask(make):
    try:
        make()
    except SpecError as error:
        assert "theirs." in str(error) and "sdgraph." in str(error), str(error)
        return
    raise SystemExit("accepted")

assert "sdgraph" not in sys.modules
for name, first in {cases}:
    child = os.fork()
    if not child:
        status = 1
        try:
            sys.path.insert(0, name)
            for line in (IMPORTS if first == "theirs" else IMPORTS[::-1]):
                exec(line)
            import sdgraph.spec
            from sdgraph.errors import SpecError
            ask(lambda: getattr(theirs, name)())
            ask(lambda: sdgraph.spec.read(name + "(2)"))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, (name, first)
"""


@pytest.mark.slow
def test_a_class_named_like_one_of_ours_is_refused_whichever_came_first(tmp_path: Path) -> None:
    kinds = {"CleanUp": "Pass", "Uniform": "Schedule", "Output": "Loss"}
    for name, kind in kinds.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "theirs.py").write_text(THEIRS.format(name=name, kind=kind, base="Pass"))
    imports = ["import theirs", "import sdgraph.passes, sdgraph.schedules, sdgraph.tuning"]
    cases = [(name, first) for name in kinds for first in ("theirs", "ours")]
    code = f"IMPORTS = {imports}\n" + CASES.replace("{cases}", repr(cases))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def define(module: str, name: str = "Doubled", qualname: str = "") -> type[Pass]:
    made = type(name, (Pass,), {"__module__": module, "__qualname__": qualname or name, "__annotations__": {}})
    return dataclass(frozen=True)(made)


def test_two_packages_with_classes_of_one_name_are_told_and_a_redefinition_is_none() -> None:
    first = define("one_package.passes")
    assert type(parse("Doubled()")[0]) is first
    again = define("one_package.passes")  # as a cell that runs again, or a module that is reloaded
    assert type(parse("Doubled()")[0]) is again

    def clash() -> None:
        other = define("other_package")
        with pytest.raises(SpecError, match=r"2 classes are named Doubled: one_package\.passes\.Doubled and other_pac"):
            parse("Doubled()")
        other()  # objects are clear, where no class is ours

    clash()
    assert type(parse("Doubled()")[0]) is again  # what was deleted is no conflict


def test_an_installed_package_cannot_take_one_of_our_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "acme_names-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-names\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[sdgraph.passes]\nFold = acme_names:Fold\n")
    (tmp_path / "acme_names.py").write_text(THEIRS.format(name="Fold", kind="Pass", base="Pass"))
    monkeypatch.syspath_prepend(str(tmp_path))
    sdgraph.spec._declared.cache_clear()
    try:
        with pytest.raises(SpecError, match=r"acme_names\.Fold and sdgraph\.passes\.fold\.Fold"):
            parse("Fold()")
    finally:
        sys.modules.pop("acme_names", None)
        sdgraph.spec._declared.cache_clear()
        monkeypatch.undo()
    _check_name("Fold")  # without the package it is ours again
