"""`Redundancy`: what each region of a UNet is worth, and the removals that cost least for a budget."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from diffusers import UNet2DConditionModel

from ..atomic import written
from ..compiler.passes import Pass
from ..contract import Contract
from ..errors import EditError, SavedError, SpecError
from ..graph import Graph
from ..options import Budget, Count, Finite, Neighbours, check, checked
from ..runtime.apply import apply
from ..runtime.digest import hash_each, hash_model, hash_program
from ..runtime.unet import GraphUNet
from ..text import json_object
from ..views.format import format_table
from .heat_map import draw_heat_map
from .pruning_program import Parts, PruningChoice, PruningProgram

Level = Literal["block", "layer", "unit"]
LEVELS: tuple[Level, ...] = ("block", "layer", "unit")
FORMAT = 1
Criterion = Literal["error", "gate"]
BUDGETS = ("time", "macs", "parameters")
GONE = "removed by"  # begins the reason of a region that an earlier pass removed


def check_budgets(budgets: Mapping[str, float], target: str | None) -> None:
    """Refuse budgets that an analysis cannot serve.

    Args:
        budgets: the shares that may be left, by name.
        target: what the analysis times; None for nothing.
    Raises:
        SpecError: a share is not above 0 and at most 1, or there is a budget in time, and no target.
    """
    for name, share in budgets.items():
        if not 0 < share <= 1:
            raise SpecError(f"{name} is {share:g}", where=name, hint="a budget is a share above 0 and at most 1")
    if "time" in budgets and target is None:
        raise SpecError(
            "no target was timed in this analysis, so there is no budget in time", where="time",
            hint="measure seconds too: sdgraph.analyse(pipe, prompts, target='eager'), or sdgraph analyse PIPELINE "
            "--target eager; or a budget in macs or parameters",
        )  # fmt: skip


@dataclass(frozen=True)
class Removal:
    """The removal of one region.

    Args:
        path: the module path of the region.
        level: its level.
        parameters: the share of all parameters that it saves, with what is not needed any more after it.
        macs: the share of the multiply-accumulates of a call that it saves.
        time: the share of the seconds of a call that it saves on the target; noise can make it negative. None if no
            target was timed.
        errors: the squared error of the output relative to the squared output, by call that was measured.
        similarity: the cosine similarity of the region's output and of the value that replaces it.
        latents: the error of the final latents relative to the latents; None if it was not measured.
        gate: the learned gate, from 0 for a region that is not needed to 1; None if it was not learned.
        images: the structural similarity (SSIM) of the decoded images and those of the whole UNet; None if it was not
            measured.
    """

    path: str
    level: str
    parameters: Finite
    macs: Finite
    time: Finite | None
    errors: tuple[Finite, ...]
    similarity: Finite
    latents: Finite | None = None
    gate: Finite | None = None
    images: Finite | None = None

    def __post_init__(self) -> None:
        check(self, SpecError, self.path if isinstance(self.path, str) else "")


@dataclass(frozen=True)
class JointRemoval:
    """The removal of two neighbouring regions together.

    Args:
        paths: their module paths.
        errors: the error of the output without both, as in `Removal`.
    """

    paths: tuple[str, str]
    errors: tuple[Finite, ...]

    def __post_init__(self) -> None:
        check(self, SpecError, "pairs")


@dataclass(frozen=True)
class Redundancy:
    """The redundancy of the regions of a UNet. Prints as a table, the most redundant region first.

    Args:
        model: the hash of the UNet: of its operations and weights.
        target: what was timed, and where; None if nothing was.
        prompts: the number of prompts.
        timesteps: the timesteps of the calls on which errors were measured.
        noise: the share of noise in the samples of these calls, which weights their errors.
        removals: the regions that can be removed alone, in the order of the UNet.
        pairs: pairs of neighbours that were removed together.
        fixed: the regions that cannot be removed alone, and why not.
        program: the hash of the operations of the UNet.
        weights: the hash of each of its weights, by name.
        sizes: its parameters, and its multiply-accumulates of a call.
    """

    model: str
    target: str | None
    prompts: int
    timesteps: tuple[Finite, ...]
    noise: tuple[Finite, ...]
    removals: tuple[Removal, ...]
    pairs: tuple[JointRemoval, ...] = ()
    fixed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    program: str = ""
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, Count] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, SpecError, "Redundancy")

    def error(self, removal: Removal | JointRemoval) -> float:
        """Return the mean of the errors of a removal over the calls, weighted by their noise.

        Args:
            removal: the removal of one region, or of two together.
        Returns:
            The squared error of the output, relative to the squared output.
        """
        return float(np.average(removal.errors, weights=self.noise))

    def cost(self, removal: Removal, criterion: Criterion = "error") -> float:
        """Return the cost of a removal by a criterion.

        Args:
            removal: the removal of one region.
            criterion: "error" is `error`, "gate" the learned gate.
        Raises:
            SpecError: the gate was not learned.
        """
        if criterion == "error":
            return self.error(removal)
        if removal.gate is None:
            raise SpecError(
                f"the analysis has no gate of {removal.path}",
                where="criterion",
                hint="learn it: sdgraph.analyse(..., gates=100)",
            )
        return removal.gate

    @checked(SpecError)
    def cheapest(
        self,
        *,
        time: Budget | None = None,
        macs: Budget | None = None,
        parameters: Budget | None = None,
        neighbours: Neighbours | None = (2, 3),
        criterion: Criterion = "error",
        unet: Annotated[UNet2DConditionModel | GraphUNet | Graph | None, Any] = None,
        tuned: bool = False,
    ) -> PruningChoice:
        """Choose the removals that cost least for one or more budgets, by integer programming.

        Costs and savings are added up over the removals; pairs that were measured together correct the sum of their
        errors. No region is removed within another one that is. With the UNet, macs and parameters are those of
        the pruned UNet, with everything that nothing reads any more, and the choice is the best by them.

        Args:
            time: the seconds of a call that may be left, as a share of those of the whole UNet.
            macs: the multiply-accumulates of a call that may be left, as a share.
            parameters: the parameters that may be left, as a share.
            neighbours: N and M: of M layers that follow each other in a block at most N are removed, because runs of
                removals recover badly; None for no limit.
            criterion: the cost of a removal: the "error" of the output, or the learned "gate".
            unet: the UNet to prune, which must be the one that was analysed. Of a UNet that is pruned already, the
                regions that are gone are left out, and shares are still those of the whole UNet.
            tuned: whether the weights may be others than those that were analysed, as after a tuning.
        Returns:
            The choice, whose `paths` are those of a `PruneBlocks`.
        Raises:
            SpecError: no budget, or one that no choice meets, and the error names the least possible shares; the
                analysis has no times or no gates; or it is of another UNet, and the error says whether structure or
                weights differ.
            ExtraError: scipy is not installed.
        Example:
            `PruneBlocks(redundancy.cheapest(time=0.7).paths)`
        Source:
            The knapsack over additive output errors is LAPTOP-Diff's (Zhang et al., 2024), the limit for neighbours
            TinyFusion's (Fang et al., 2025).
        """
        budgets = {name: b for name, b in zip(BUDGETS, (time, macs, parameters), strict=True) if b is not None}
        if not budgets:
            raise SpecError("there is no budget", where="cheapest", hint="time=0.7, macs=0.7 or parameters=0.7")
        check_budgets(budgets, self.target if self._has("time") else None)
        model = None if unet is None else apply(unet, (), verify=False)
        gone = () if model is None else self._gone(model, tuned)
        program = PruningProgram(
            self.removals,
            (
                [self.error(one) for one in self.removals],
                {(self._index[a], self._index[b]): self.error(pair) for pair in self.pairs for a, b in [pair.paths]},
            ),
            None if criterion == "error" else [self.cost(one, criterion) for one in self.removals],
            neighbours,
            [self._index[path] for path in gone],
            None if model is None else self._parts(model.graph),
        )
        chosen = program.best(budgets)
        if chosen is None:
            least = ", ".join(f"{name}={share:g}" for name, share in program.least(budgets).items())
            raise SpecError(
                f"no choice meets {', '.join(f'{name}={share:g}' for name, share in budgets.items())}",
                where="cheapest",
                hint=f"the least possible is {least}{', or set neighbours=None' if neighbours else ''}",
            )
        left = {name: share for name, share in program.left(chosen).items() if self._has(name)}
        return PruningChoice(tuple(self.removals[n].path for n in sorted(chosen)), program.error(chosen), left, gone)

    def _has(self, name: str) -> bool:
        return all(getattr(one, name) is not None for one in self.removals)

    def _parts(self, graph: Graph) -> Parts:
        """Return the parts of a graph, with their sizes as shares of those of the whole UNet."""
        whole = dict(self.sizes) or sizes_of(graph)
        sizes = {name: {part: size / whole[name] for part, size in of.items()} for name, of in _sizes(graph).items()}

        def lost(paths: tuple[str, ...]) -> Collection[str] | None:
            pruned = graph.copy()
            try:
                for path in reversed(pruned.matching(paths) if paths else ()):  # the order of `PruneBlocks`
                    pruned.bypass(path)
                pruned.eliminate_dead_code()
                pruned.propagate()
            except EditError:
                return None
            present = {part for of in _sizes(pruned).values() for part in of}
            return {part for of in sizes.values() for part in of} - present

        return Parts(sizes, lost)

    def _gone(self, model: GraphUNet, tuned: bool) -> tuple[str, ...]:
        """Return the regions of the analysis that a UNet has lost.

        Raises:
            SpecError: the analysis is of another UNet.
        """
        if hash_model(model) == self.model:
            return ()
        graph, tensors = model.graph, hash_each(model.tensors())
        present, removed = set(graph.paths()), graph.removed
        gone = tuple(one.path for one in self.removals if one.path not in present)
        strange = [path for path in gone if not any(path == r or path.startswith(f"{r}.") for r in removed)]
        strange += [name for name in tensors if name not in self.weights]
        exact = all(isinstance(a.one, Pass) and a.one.contract == Contract.EXACT for a in graph.passes)
        if not strange and hash_program(model) != self.program and not removed and not (graph.passes and exact):
            strange.append("operations")
        if strange:
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            raise SpecError(
                "the analysis is of another UNet: its structure differs",
                where=", ".join(strange[:3]) + more,
                hint="analyse this UNet: sdgraph.analyse; before it only exact passes and removals are applied",
            )
        changed = [name for name, found in tensors.items() if self.weights[name] != found]
        if changed and not tuned:
            raise SpecError(
                f"the analysis is of another UNet: its structure is the same, and {len(changed)} of {len(tensors)} "
                "weights differ",
                where=", ".join(changed[:3]) + ("" if len(changed) <= 3 else " ..."),
                hint="analyse this UNet, or pass tuned=True if it is the analysed one after a tuning",
            )
        return gone

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the analysis to a JSON file.

        Args:
            path: the file.
        """
        plain = {"format": FORMAT, **dataclasses.asdict(self)}
        with written(Path(path)) as file:
            file.write_text(json.dumps(plain, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read an analysis that `save` wrote.

        Args:
            path: the file.
        Returns:
            The analysis, equal to the one that was saved.
        Raises:
            SavedError: the file is missing, damaged, incomplete or of another format.
        """
        hint = "measure again: sdgraph.analyse, or the command that wrote it"
        plain = json_object(Path(path), SavedError, hint=hint, format=FORMAT)
        del plain["format"]
        try:
            plain["removals"] = tuple(Removal(**one) for one in plain["removals"])
            plain["pairs"] = tuple(JointRemoval(**one) for one in plain["pairs"])
            read = cls(**plain)
        except (TypeError, KeyError, SpecError) as error:
            raise SavedError(f"the analysis is damaged: {error}", where=str(path), hint=hint) from error
        errors = [*(one.errors for one in read.removals), *(pair.errors for pair in read.pairs)]
        paths, timed = [one.path for one in read.removals], {one.time is not None for one in read.removals}
        if (
            {len(read.timesteps), len(read.noise), *map(len, errors)} != {len(read.timesteps)}
            or not (read.timesteps and paths)
            or not any(read.noise)
            or len(set(paths)) != len(paths)
            or timed != {read.target is not None}
            or {name for pair in read.pairs for name in pair.paths} - set(paths)
        ):
            raise SavedError("the analysis is damaged: its parts do not fit together", where=str(path), hint=hint)
        return read

    @cached_property
    def _index(self) -> dict[str, int]:
        return {one.path: number for number, one in enumerate(self.removals)}

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the U of the UNet as a heat map of what removals change, to an `.svg` or `.png` file.

        Down blocks are on the left, up blocks on the right, the mid block at the bottom. The colour of a region is the
        error of its removal, on a logarithmic scale; its text is the time that it saves, or the multiply-accumulates if
        no target was timed. Regions that cannot be removed alone are white. In an SVG the id of a cell is the path.

        Args:
            path: the file.
        Raises:
            ExtraError: matplotlib is not installed.
            SpecError: the file has another suffix.
        Example:
            `redundancy.draw("redundancy.svg")`
        """
        saved = {one.path: one.macs if one.time is None else one.time for one in self.removals}
        errors = {one.path: self.error(one) for one in self.removals}
        draw_heat_map(path, errors, saved, self.fixed, "MACs" if self.target is None else f"time ({self.target})")

    def __str__(self) -> str:
        def share(name: str) -> Callable[[Removal], str]:
            return lambda one: "" if getattr(one, name) is None else f"{getattr(one, name):.1%}"

        columns: dict[str, Callable[[Removal], str]] = {
            "region": lambda one: one.path,
            "level": lambda one: one.level,
            "error": lambda one: f"{self.error(one):.2e}",
            "latents": share("latents"),
            "SSIM": lambda one: "" if one.images is None else f"{one.images:.3f}",
            "gate": lambda one: "" if one.gate is None else f"{one.gate:.3f}",
            "similarity": lambda one: f"{one.similarity:.3f}",
            "parameters": share("parameters"),
            "MACs": share("macs"),
            "time": share("time"),
        }
        ordered = sorted(self.removals, key=self.error)
        cells = {name: [text(one) for one in ordered] for name, text in columns.items()}
        shown = {name: texts for name, texts in cells.items() if any(texts)}  # and not what was not measured
        rows = [tuple(shown), *zip(*shown.values(), strict=True)]
        timed = "" if self.target is None else f" and time ({self.target})"
        legend = (
            f"error: squared error of the output without the region, relative to the squared output, at "
            f"{len(self.timesteps)} timesteps of {f'{self.prompts} prompts' if self.prompts else 'random inputs'}, "
            f"weighted by their noise.\n"
            f"Parameters, MACs{timed}: what the removal saves."
        )
        gone = sum(reason.startswith(GONE) for reason in self.fixed.values())
        fixed = f"\nRegions that cannot be removed alone: {len(self.fixed) - gone}." * (len(self.fixed) > gone)
        fixed += f"\nRegions that were removed before this analysis: {gone}." * bool(gone)
        return f"{format_table(rows)}\n\n{legend}{fixed}"


def sizes_of(graph: Graph) -> dict[str, int]:
    """Return the macs of a call and the parameters of a graph."""
    return {name: sum(of.values()) for name, of in _sizes(graph).items()}


def _sizes(graph: Graph) -> dict[str, dict[str, int]]:
    """Return the macs of each operation that has some, and the elements of each parameter."""
    macs = {node.name: graph.macs_of(node) for node in graph.nodes}  # names without a dot, which parameters have
    elements = {name: p.numel() for name, p in graph.parameters().items()}
    return {"macs": {name: count for name, count in macs.items() if count}, "parameters": elements}
