"""The passes of a command: text, a file with passes, or a plan that `sdgraph search` saved."""

from __future__ import annotations

import argparse
import ast
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SpecError
from ..plan_search import PLAN_FORMAT
from ..progress import note
from ..text import from_json, read_text

if TYPE_CHECKING:
    from ..compiler.passes import Pass

PASSES = "passes as text, separated by commas, or a file: a plan of `sdgraph search --save`, or text with passes"
FILE = re.compile(r"[^()\[\],'\"=\n]*[./][^()\[\],'\"=\n]*")  # what may be the name of a file, and is no call


def add_passes(parser: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """Add an argument for passes.

    Args:
        parser: the parser of the command.
        names: the names of the argument.
        options: further options of the argument.
    """
    parser.add_argument(*names, **{"metavar": "PASSES", "help": f"{PASSES}; see `sdgraph passes`", **options})


@dataclass(frozen=True)
class RequestedPasses:
    """The passes that a command line names, and the plans that they come from.

    Args:
        passes: the passes.
        plans: the plans by the names of their files, each as `SearchResult.as_dict` returns it.
    """

    passes: tuple[Pass, ...]
    plans: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def steps(self) -> int | None:
        """The number of steps that a plan is for."""
        return next((plan["steps"] for plan in self.plans.values()), None)

    @property
    def calls(self) -> int | None:
        """The number of calls that a plan is for."""
        return next((plan["timetable"]["calls"] for plan in self.plans.values()), None)

    def check_steps(self, steps: int | None) -> None:
        """Refuse another number of steps than that of a plan.

        Args:
            steps: the number of steps; None if the command line has none.
        Raises:
            SpecError: the numbers differ.
        """
        self._check_number("steps", self.steps, steps)

    def check_calls(self, calls: int | None) -> None:
        """Refuse another number of calls than that of a plan.

        Args:
            calls: the number of calls; None if the command line has none.
        Raises:
            SpecError: the numbers differ.
        """
        self._check_number("calls", self.calls, calls)

    def _check_number(self, name: str, planned: int | None, number: int | None) -> None:
        if planned is not None and number not in (None, planned):
            raise SpecError(
                f"the plan is for {planned} {name}, not for {number}", where=", ".join(self.plans),
                hint=f"leave --{name} out, or search for a plan of {number}",
            )  # fmt: skip

    def check_unet(self, config: Mapping[str, Any]) -> None:
        """Refuse a plan of another model.

        Args:
            config: the configuration of the UNet that the passes are for.
        Raises:
            SpecError: the configurations differ; the error names the differences.
        """
        from ..plan_search.switch_plan import check_model

        for file, plan in self.plans.items():
            check_model(plan["unet"], config, file)

    def check_solver(self, solver: str) -> None:
        """Print a note if a plan was found with another solver.

        Args:
            solver: the class name of the scheduler that generates the images.
        """
        for file, plan in self.plans.items():
            if plan["solver"] != solver:
                note(f"{file} was found with {plan['solver']}; with {solver} its errors are not known")


def read_passes(texts: str | Sequence[str], *, folders: bool = False) -> RequestedPasses:
    """Read passes from text and from files.

    Args:
        texts: passes as text, or the name of a file; several are read one after the other.
        folders: whether a folder could have been meant too, for the message.
    Raises:
        SpecError: a text is not understood, there is no such file, or it holds no passes.
    """
    passes: list[Pass] = []
    plans: dict[str, Mapping[str, Any]] = {}
    for text in (texts,) if isinstance(texts, str) else texts:
        requested = _read(text, folders)
        passes += requested.passes
        plans |= requested.plans
    return RequestedPasses(tuple(passes), plans)


def _read(text: str, folders: bool) -> RequestedPasses:
    from ..compiler.passes import Pass, parse
    from ..spec import known

    path = Path(text).expanduser() if text and "\n" not in text and len(text) < 1000 else None
    if path is not None and path.is_dir():
        raise SpecError(f"{text} is a folder, not passes", hint='write passes, as in "CleanUp", or give a file of them')
    if path is not None and path.is_file():
        return _read_file(path)
    if path is None or not FILE.fullmatch(text) or text.partition(".")[0] in known(Pass):
        return RequestedPasses(parse(text))
    beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
    near = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, beside)]
    meant = f"did you mean {' or '.join(map(repr, near))}?" if near else f"give {PASSES}"
    raise SpecError(f"there is no folder {text}, and no file" if folders else f"there is no file {text}", hint=meant)


def _read_file(path: Path) -> RequestedPasses:
    from ..compiler.passes import parse

    text = read_text(path, SpecError, hint=f"give {PASSES}")
    if text.lstrip().startswith("{"):
        plan = _plan(text, path)
        return RequestedPasses(parse(plan["passes"]), {str(path): plan})
    hint = "write one on each line"
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        reason = getattr(error, "msg", error)
        raise SpecError(f"{path} holds no passes: {reason}", where=f"{path}{line}", hint=hint) from error
    values = [part.value for part in statements if isinstance(part, ast.Expr)]
    if not values or len(values) < len(statements):
        raise SpecError(f"{path} holds no passes", where=str(path), hint=hint)
    calls = [call for value in values for call in (value.elts if isinstance(value, ast.Tuple) else [value])]
    return RequestedPasses(tuple(one for call in calls for one in parse(ast.unparse(call))))


def _plan(text: str, path: Path) -> Mapping[str, Any]:
    hint = "give a plan of `sdgraph search --save`"
    try:
        plan = from_json(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not JSON: {error}", where=str(path), hint=hint) from error
    if isinstance(plan, dict) and "unets" in plan:
        raise SpecError(
            f"{path} is a plan of several UNets, not passes of one",
            where=str(path),
            hint="pipe.unet = sdgraph.SwitchPlan.load(file).switch(unets)",
        )
    kinds = {"format": int, "passes": str, "steps": int, "solver": str, "unet": dict, "timetable": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(plan.get(name), kind)]
    if wrong or not isinstance(plan["timetable"].get("calls"), int):
        raise SpecError(f"{path} is no plan: it has no {' and no '.join(wrong) or 'calls'}", where=str(path), hint=hint)
    if plan["format"] != PLAN_FORMAT:
        raise SpecError(
            f"{path} is a plan of format {plan['format']}, and this version reads format {PLAN_FORMAT}",
            where=str(path),
            hint="search again, or install the version that saved it",
        )
    return plan  # type: ignore[no-any-return]
