"""Passes: the base class, combinations of passes, and passes from text."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from torch import fx

from ..contract import Contract
from ..errors import ContractError, PassError, PreconditionError, SdgraphError, SpecError
from ..graph import Graph
from ..ir.decisions import Applied, Decisions
from ..ir.edits import Edit
from ..ir.guards import Guard
from ..ir.verify import check_interface, check_invariants, fingerprint
from ..options import Count, checked
from ..spec import Spec, value_of
from .error_location import failure, location
from .report import NearMiss, PassReport, Size

Condition = Callable[..., Iterable[fx.Node | str]]  # of a graph, see `Pass`


@dataclass(frozen=True)
class CompilerRun:
    """The state of one run of a pass, and of the passes that it consists of.

    Args:
        original: the graph before the run.
        decisions: the decisions of the run.
    """

    original: Graph
    decisions: Decisions


@dataclass(frozen=True)
class Findings:
    """The findings of a pass, besides its edits, which the graph records.

    Args:
        near_misses: places where the pass almost applied.
        notes: further lines of text for the report.
    """

    near_misses: tuple[NearMiss, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass(Spec, abstract=True):
    """A transformation of a graph. Subclass it as a frozen dataclass; fields are its options.

    A pass edits the graph that it is given and nothing else. The runner gives it a copy, checks the edited copy against
    `contract`, and drops the copy if anything fails.

    A condition is a function of a graph. It returns the places at which it does not hold, nodes or module paths; none
    if it holds. A condition that depends on options is a method of the pass. Errors give its name and its docstring:
    the first line says what should hold, and the rest is the hint, an instruction.

    Class attributes:
        contract: what the pass promises about the numbers.
        may_change_nothing: whether a run may have no effect; otherwise that is an error.
        requires: names of passes that must have run before.
        not_after: names of passes that must not have run before, with the reasons.
        chooses: whether another pass is run and recorded in its place, see `choose`.
        preconditions: conditions on the graph that the pass is applied to.
        postconditions: conditions on the graph that it leaves.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    may_change_nothing: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()
    not_after: ClassVar[Mapping[str, str]] = {}
    chooses: ClassVar[bool] = False
    preconditions: ClassVar[tuple[Condition, ...]] = ()
    postconditions: ClassVar[tuple[Condition, ...]] = ()

    @property
    def parts(self) -> tuple[Pass, ...]:
        """The passes that a pass consists of; none if it edits graphs itself."""
        return ()

    def choose(self, graph: Graph) -> tuple[Pass, tuple[str, ...]]:
        """Return the pass to run and to record in the place of this one, if `chooses`.

        A pass that measures something before it decides what to do returns the pass that does it, so that a saved UNet
        can be loaded without what was measured.

        Args:
            graph: the graph that the pass is applied to. It is not changed.
        Returns:
            The pass, and lines of text for its report.
        """
        return self, ()

    def run(self, graph: Graph) -> Findings | None:
        """Edit the graph; docs/writing-a-pass.md shows how.

        Decisions that depend on the values of weights go through `graph.decide`, and conditions on the sizes of calls
        through `graph.require`.

        Args:
            graph: the graph to edit in place.
        Returns:
            The findings for the report, or None.
        """
        raise NotImplementedError(f"{type(self).__name__}.run")

    def apply(self, graph: Graph, run: CompilerRun) -> PassReport:
        """Run the pass on a graph, and check what must hold before and after.

        Args:
            graph: the graph to edit.
            run: the run of the compiler, whose original graph has the inputs and the shape of the output to keep.
        Returns:
            The report, without the difference of the outputs.
        Raises:
            SdgraphError: the pass raised an error, broke an invariant of the graph, or a condition does not hold.
        """
        start, before, guards = time.perf_counter(), Size.of(graph), graph.guards
        try:
            with graph.recording(str(self), run.decisions) as recording:
                self._check(self.preconditions, graph, PreconditionError, "needs")
                findings = self.run(graph)
                if not isinstance(findings, Findings | None):
                    raise PassError(
                        f"run returned a {type(findings).__name__}",
                        where=type(self).__qualname__,
                        hint="edit the graph that run receives, and return None, or Findings with what was found",
                    )
                graph.guards = tuple(guard if guard in guards else self._named(guard) for guard in graph.guards)
                graph.eliminate_dead_code()
                graph.propagate()
                check_interface(run.original, graph)
                check_invariants(graph)
                self._check(self.postconditions, graph, ContractError, "promises")
        except SdgraphError as error:
            ours = type(self).__module__.startswith("sdgraph.")  # errors of ours are for users, not for authors
            error.came_through(", ".join(filter(None, (str(self), "" if ours else location(error, self, graph)))))
            raise
        except Exception as error:
            raise failure(self, error, graph) from error
        return self._report(graph, start, before, findings or Findings(), tuple(recording.edits))

    def stages(self, graph: Graph) -> Sequence[Pass]:
        """Return passes that do the same one after another, and whose changes can be trained apart; see `incubate`.

        Args:
            graph: the graph that the pass would be applied to. It is not changed.
        Returns:
            The pass itself, where a pass does not say more.
        """
        return (self,)

    def _check(self, conditions: Iterable[Condition], graph: Graph, error: type[PassError], verb: str) -> None:
        for condition in conditions:
            method: Any = getattr(self, condition.__name__, None)
            check = method if getattr(method, "__func__", None) is condition else condition
            places = [f"{p.name} of {graph.module_path(p) or 'the model'}" if isinstance(p, fx.Node) else p
                      for p in check(graph)]  # fmt: skip
            if places:
                about, _, hint = (condition.__doc__ or "").partition("\n")
                more = f" and {len(places) - 3} more" if len(places) > 3 else ""
                where, hint = ", ".join(places[:3]) + more, " ".join(hint.split()).removesuffix(".")
                hint = hint[:1].lower() + hint[1:]
                name = condition.__name__.lstrip("_")
                raise error(f"{self} {verb} {name}: {about}", where=where, hint=hint)

    def _named(self, guard: Guard) -> Guard:
        """Return a guard with the name of the pass that it comes from."""
        return replace(guard, where=f"{self}{f': {guard.where}' if guard.where else ''}")

    def _report(
        self,
        graph: Graph,
        start: float,
        before: Size,
        findings: Findings,
        edits: tuple[Edit, ...],
        children: tuple[PassReport, ...] = (),
    ) -> PassReport:
        return PassReport(
            str(self),
            str(self.contract),
            before,
            Size.of(graph),
            None,
            time.perf_counter() - start,
            edits,
            findings.near_misses,
            findings.notes,
            children,
        )


@dataclass(frozen=True)
class Chain(Pass, abstract=True):
    """A pass that runs other passes in order. Its contract is the weakest of theirs, and it fails as a whole.

    Args:
        passes: the passes. Some may change nothing as long as another changes something.
    """

    passes: Annotated[tuple[Pass, ...], Any] = ()  # texts too, see `as_passes`

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", as_passes(self.passes))

    @property
    def contract(self) -> Contract:  # type: ignore[override]
        return Contract.weakest([p.contract for p in self.passes])

    @property
    def may_change_nothing(self) -> bool:  # type: ignore[override]
        return all(p.may_change_nothing for p in self.passes)

    @property
    def chooses(self) -> bool:  # type: ignore[override]
        return any(p.chooses for p in self.passes)

    @property
    def parts(self) -> tuple[Pass, ...]:
        return self.passes

    def choose(self, graph: Graph) -> tuple[Pass, tuple[str, ...]]:
        trial, passes, notes = graph.copy(), list(self.passes), list[str]()
        for number, inner in enumerate(passes):
            if not any(later.chooses for later in passes[number:]):
                break
            passes[number], more = inner.choose(trial)
            passes[number].apply(trial, CompilerRun(graph, Decisions()))
            trial.passes += (Applied(passes[number]),)
            notes += more
        return replace(self, passes=tuple(passes)), tuple(notes)

    def apply(self, graph: Graph, run: CompilerRun) -> PassReport:
        start, before = time.perf_counter(), Size.of(graph)
        reports, _ = self._round(graph, run, fingerprint(graph))
        return self._summary(graph, start, before, [reports])

    def _round(self, graph: Graph, run: CompilerRun, mark: Hashable) -> tuple[list[tuple[PassReport, bool]], Hashable]:
        """Apply every pass once.

        Args:
            graph: the graph to edit.
            run: the run of the compiler.
            mark: the fingerprint of the graph.
        Returns:
            The reports of the passes, each with whether the pass changed the graph; and the fingerprint after them.
        """
        reports = []
        for inner in self.passes:
            report, before = inner.apply(graph, run), mark
            mark = fingerprint(graph)
            reports.append((report, mark != before))
        return reports, mark

    def _summary(
        self, graph: Graph, start: float, before: Size, rounds: list[list[tuple[PassReport, bool]]]
    ) -> PassReport:
        reports = [report for each in rounds for report in each]
        misses = tuple(miss for report, _ in rounds[-1] for miss in report.near_misses)
        notes = tuple(note for report, _ in reports for note in report.notes)
        edits = tuple(edit for report, _ in reports for edit in report.edits)
        children = tuple(report for report, changed in reports if changed)
        return self._report(graph, start, before, Findings(misses, notes), edits, children)


@dataclass(frozen=True)
class Fixpoint(Chain, abstract=True):
    """A chain that repeats its passes until nothing changes. More than `repeat` rounds are an error.

    Args:
        passes: the passes, as of a `Chain`.
        repeat: the largest number of rounds; a single round may change something.
    """

    repeat: Count = 10

    def apply(self, graph: Graph, run: CompilerRun) -> PassReport:
        start, before, rounds = time.perf_counter(), Size.of(graph), []
        mark: Hashable = fingerprint(graph)
        for _ in range(self.repeat):
            reports, mark = self._round(graph, run, mark)
            rounds.append(reports)
            if not any(changed for _, changed in rounds[-1]):
                break
        else:
            if self.repeat > 1:
                raise PassError(
                    f"{self} still changes the graph after {self.repeat} rounds",
                    hint="raise repeat, or break the cycle",
                )
        return self._summary(graph, start, before, rounds)


@checked()
def parse(text: str) -> tuple[Pass, ...]:
    """Return the passes that a text names, as calls separated by commas.

    Args:
        text: the passes, as they are printed.
    Raises:
        SpecError: a part of the text is not understood; the error gives the nearest known name.
    Example:
        `parse("CleanUp, PruneBlocks('bk-sdm-base')")`
    """
    try:
        tree = ast.parse(f"({text},)" if text.strip() else "()", mode="eval").body
    except SyntaxError as error:
        raise SpecError(
            f"cannot read the spec {text!r}: {error.msg}", hint="write calls: \"CleanUp(), PruneBlocks('bk-sdm-base')\""
        ) from error
    assert isinstance(tree, ast.Tuple)
    return tuple(_as_pass(value_of(item, text, Pass), text) for item in tree.elts)


def as_passes(passes: Any) -> tuple[Pass, ...]:
    """Return the passes in an argument of `apply`: a pass, a text, or an iterable of both.

    Raises:
        SpecError: the argument is or contains something else.
    """
    if isinstance(passes, str):
        return parse(passes)
    if isinstance(passes, Pass):
        return (passes,)
    if isinstance(passes, type) or not isinstance(passes, Iterable) or getattr(passes, "ndim", 1) == 0:
        raise _not_a_pass(passes)
    parsed: list[Pass] = []
    for item in passes:
        parsed += parse(item) if isinstance(item, str) else [_as_pass(item, "")]
    return tuple(parsed)


def _as_pass(value: Any, text: str) -> Pass:
    if not isinstance(value, Pass):
        raise _not_a_pass(value, text)
    return value


def _not_a_pass(value: Any, text: str = "") -> SpecError:
    if isinstance(value, type) and issubclass(value, Spec):
        hint = f"construct it: {value.__name__}(...)"
    else:
        hint = "pass objects of sdgraph.Pass or text specs"
    return SpecError(f"{value!r} is not a pass", where=text, hint=hint)
