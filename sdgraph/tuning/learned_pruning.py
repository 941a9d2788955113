"""Learned pruning: which regions a budget removes is learned together with updates of low rank, as a first training."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..errors import PathError, SdgraphError, SpecError, TuningError
from ..extra import imported
from ..options import Bounds, Budget, Count, Neighbours, Positive
from ..redundancy.analysis import analyse_unet
from ..redundancy.pruning_program import PruningChoice, PruningProgram
from ..redundancy.redundancy import Redundancy
from ..runtime.apply import apply
from ..runtime.digest import hash_model, hash_text
from ..runtime.unet import GraphUNet
from ..spec import Spec
from .losses import Loss
from .report import CHOICE, GATE, write_learned
from .settings import Settings
from .train_state import training_dtype

LEAST = 0.01  # the cost of a removal, however low the score, so that nothing is removed beyond the budget


@dataclass(frozen=True)
class LearnedPruning(Spec):
    """Pruning that is learned in the first steps of a tuning, for `learn_pruning` of `sdgraph.tune`.

    Every region that can be removed has a score. A step draws a set of removals: noise is added to the scores, and the
    set that then costs least meets the budget and the limit for neighbours, by integer programming. The student without
    these regions is compared with its teacher by the losses of the run. The gradients of the gates pass straight
    through to the scores, and the layers of the regions learn updates of low rank at the same time: what is kept is not
    what can be removed at once, but what tuning recovers best. The noise falls to zero in the end. Then the set without
    noise becomes a plain `PruneBlocks`, the updates become part of the weights, and the run goes on as any other.

    Args:
        steps: the number of optimizer steps of the search, which are the first of the run.
        time: the seconds of a call that may be left, as a share of those of the student before.
        macs: the multiply-accumulates of a call that may be left, as a share.
        parameters: the parameters that may be left, as a share.
        levels: the levels of the regions: "block", "layer" (resnets and attentions), "unit" (attn1, attn2, ff).
        neighbours: N and M: of M regions that follow each other in a block at most N are removed; None for no limit.
        rank: the rank of the updates.
        learning_rate: the learning rate of the updates.
        gate_learning_rate: the learning rate of the scores.
    Raises:
        TuningError: there is no budget.
    Example:
        `sdgraph.tune(unet, unet, data, learn_pruning=LearnedPruning(1000, macs=0.7), max_train_steps=5000, **options)`
    Source:
        Fang et al., "TinyFusion: Diffusion Transformers Learned Shallow", 2025, where each group of layers keeps N of
        M. One budget for all groups is our own: the set that costs least after noise is a sample as in Papandreou and
        Yuille, "Perturb-and-MAP Random Fields", 2011.
    """

    refusal: ClassVar[type[SdgraphError]] = TuningError

    steps: Count
    time: Budget | None = None
    macs: Budget | None = None
    parameters: Budget | None = None
    levels: Annotated[tuple[Literal["block", "layer", "unit"], ...], Bounds(length=1)] = ("layer",)
    neighbours: Neighbours | None = (2, 3)
    rank: Count = 8
    learning_rate: Positive = 1e-4
    gate_learning_rate: Positive = 0.05

    def __post_init__(self) -> None:
        if not self.budgets:
            raise TuningError("there is no budget", where="LearnedPruning", hint="time=0.7, macs=0.7 or parameters=0.7")

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are set, by name."""
        every = {"time": self.time, "macs": self.macs, "parameters": self.parameters}
        return {name: share for name, share in every.items() if share is not None}

    def settings(self, of_run: Settings) -> tuple[Settings, Settings]:
        """Return the settings of the search, and those of the steps after it.

        The rates of the search are constant, and its random numbers are others than those of the steps after it.

        Args:
            of_run: the settings of the whole run.
        Raises:
            TuningError: the run has no step beside the search.
        """
        rest = of_run.last_step - self.steps
        if rest < 1:
            raise TuningError(
                f"the search takes {self.steps} of {of_run.last_step} steps, and none is left for tuning",
                where="learn_pruning",
                hint="raise max_train_steps, or search in fewer steps",
            )
        options: dict[str, Any] = {
            f.name: f.default for f in dataclasses.fields(Settings) if f.name.startswith(("lr_", "step_rules"))
        }
        options |= {"max_train_steps": self.steps, "learning_rate": self.learning_rate, "learning_rates": None}
        search = dataclasses.replace(of_run, **options, seed=(of_run.seed + 1) % 2**63)
        return search, dataclasses.replace(of_run, max_train_steps=rest)


class PruningMasks(nn.Module):
    """Masks of regions, 1 for those that are kept: a distribution over the sets that a budget allows.

    Args:
        found: the regions, and what their removals save.
        spec: the budget and its limits.
    """

    def __init__(self, found: Redundancy, spec: LearnedPruning) -> None:
        super().__init__()
        self.paths, self.spec = tuple(one.path for one in found.removals), spec
        self.scores = nn.Parameter(torch.zeros(len(self.paths)))
        self._removals = found.removals
        self._scale = spec.gate_learning_rate / spec.learning_rate  # Adam moves a parameter by its learning rate
        savings = torch.tensor([[getattr(one, name) for name in spec.budgets] for one in found.removals]).double()
        self.register_buffer("along", (savings @ torch.linalg.pinv(savings)).float(), persistent=False)
        self.along: Tensor

    @property
    def gates(self) -> dict[str, float]:
        """The gates by path: how likely a region costs more than nothing, from 0 to 1."""
        values = torch.sigmoid(self._scale * self.scores.detach()).tolist()
        return dict(zip(self.paths, values, strict=True))

    def figures(self) -> dict[str, float]:
        """Return the gates by the names of their columns in the log."""
        return {f"{GATE}{path}": gate for path, gate in self.gates.items()}

    def costs(self, noise: Tensor | float = 0.0) -> list[float]:
        """Return the costs of the removals.

        Args:
            noise: the noise of the scores, (regions,).
        """
        return [LEAST + float(cost) for cost in softplus(self._scale * self.scores.detach() + noise).double()]

    def noise(self, draw: np.random.Generator, progress: float) -> Tensor:
        """Return the noise of a mask, (regions,), the differences of two Gumbel variables.

        Args:
            draw: the generator.
            progress: the share of the search that is over, at whose end there is none.
        """
        return torch.from_numpy((1 - progress) * draw.logistic(size=len(self.paths))).float()

    def forward(self, noise: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Return a mask, (regions,), which is the same for all timesteps.

        Gradients of closed gates pass straight through to the scores, but for their part along what removals save,
        where a budget leaves no choice: what hurts more than others for its saving rises, and all others fall. Those of
        open gates are left out, because the error is quadratic in what is missing, and its slope where nothing is
        missing is that of no removal.

        Args:
            noise: the noise of the scores, (regions,).
            timesteps: the timesteps of the samples, (B,), which a set for all calls does not depend on.
        Raises:
            TuningError: no removals meet the budget.
        """
        program = PruningProgram(self._removals, (self.costs(noise), {}), None, self.spec.neighbours)
        removed = program.best(self.spec.budgets)
        if removed is None:
            least = ", ".join(f"{name}={share:g}" for name, share in program.least(self.spec.budgets).items())
            raise TuningError(
                "no removals meet the budget by the sum of what each of them saves alone",
                where="learn_pruning",
                hint=f"the least possible is {least}{', or set neighbours=None' if self.spec.neighbours else ''}",
            )
        scores = self._scale * self.scores
        mask = torch.ones_like(scores).index_fill(0, torch.tensor(sorted(removed), device=scores.device), 0.0)
        through = (1 - mask) * (scores - (self.along * scores).sum(1))
        return mask + (through - through.detach())


class PruningSearch:
    """The search of a learned pruning: the student with updates of low rank, its masks, and what becomes of them.

    Args:
        spec: the budget and its limits.
        student: the student, which stays as it is.
        teacher: the teacher.
        losses: the losses of the run. Regions that they name stay.
        train: the patterns of the modules whose weights may be trained; None for all.
        output_dir: the folder of the search, which keeps what removals save.
    Raises:
        TuningError: no region can be removed, nothing has to be, or the budget cannot be met; the error names the least
            possible.
    """

    def __init__(
        self,
        spec: LearnedPruning,
        student: GraphUNet,
        teacher: GraphUNet,
        losses: Sequence[Loss],
        train: Sequence[str] | None,
        output_dir: Path,
    ) -> None:
        self.spec, self.output_dir, self._before, self._train = spec, output_dir, student, train
        try:
            self._found = allowed_removals(spec.levels, spec.time is not None, student, teacher, losses, output_dir)
            choice = self._choice({})
        except SpecError as error:
            raise TuningError(error.what, where="learn_pruning", hint=error.hint) from error
        if not choice.paths:
            raise TuningError(
                "the student meets the budget as it is", where="learn_pruning", hint="leave it out, or lower the budget"
            )
        self._pruned(choice)  # what cannot be applied is refused before the search
        self.masks = PruningMasks(self._found, spec)
        self.masks(torch.zeros(len(self.masks.paths)))  # refuses a budget that no mask meets
        self._layers = _layers(student, self.masks.paths, train)
        updates = f"Overparameterize({tuple(self._layers)!r}, kind='low-rank', rank={spec.rank})"
        self.student = apply(student, updates if self._layers else (), verify=False)

    def trainable(self) -> GraphUNet:
        """Return a copy of the student of the search to train, in which the updates alone require gradients."""
        trained = copy.deepcopy(self.student).to(training_dtype(self._before)).requires_grad_(False).train()
        for layer in self._layers:
            for part in ("down", "up"):
                trained.get_parameter(f"{layer}.{part}").requires_grad_(True)
        return trained

    def left_to_train(self, pruned: GraphUNet) -> tuple[str, ...] | None:
        """Return the paths of `train` that the pruned student has; None if all of it is trained.

        Args:
            pruned: the pruned student.
        Raises:
            TuningError: none is left.
        """
        if self._train is None:
            return None
        present = set(pruned.graph.paths())
        left = tuple(path for path in self._before.graph.matching(self._train) if path in present)
        if not left:
            raise TuningError(
                "all modules that were to be trained are pruned", where="train", hint="name more, or leave it out"
            )
        return left

    @property
    def identity(self) -> dict[str, str]:
        """All that decides the search beside the student, as text by name."""
        return {"learned pruning": str(self.spec), "savings of removals": savings_identity(self._found)}

    def finish(self, tuned: GraphUNet) -> GraphUNet:
        """Return the pruned student with the weights that the search has learned, and write what was chosen.

        Args:
            tuned: the student of the search with its updates trained.
        Raises:
            TuningError: the choice cannot be written.
        """
        choice = self._choice(self.masks.gates)
        pruned = copy.deepcopy(self._pruned(choice)).to(training_dtype(self._before))
        learned = tuned.state_dict()
        for layer in self._layers:
            weight, down, up = (learned[f"{layer}.{part}"] for part in ("weight", "down", "up"))
            learned[f"{layer}.weight"] = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        pruned.load_state_dict({name: learned[name] for name in pruned.state_dict()})
        record = {
            "learned pruning": str(self.spec),
            "passes": [f"PruneBlocks({choice.paths!r})"],
            "left": {name: share for name, share in choice.left.items() if name != "time" or self.spec.time},
            "gates": self.masks.gates,
        }
        write_learned(self.output_dir / CHOICE, record)
        return pruned

    def _choice(self, gates: Mapping[str, float]) -> PruningChoice:
        """Return the removals whose gates cost least; all cost the same if there are none."""
        costs = dict(zip(self.masks.paths, self.masks.costs(), strict=True)) if gates else {}
        largest = max(costs.values(), default=1.0)
        removals = tuple(
            dataclasses.replace(one, gate=costs.get(one.path, largest) / largest) for one in self._found.removals
        )
        found = dataclasses.replace(self._found, removals=removals)
        limits: dict[str, Any] = {**self.spec.budgets, "neighbours": self.spec.neighbours}
        return found.cheapest(**limits, criterion="gate", unet=self._before)

    def _pruned(self, choice: PruningChoice) -> GraphUNet:
        return apply(self._before, f"PruneBlocks({choice.paths!r})", verify=False)


def allowed_removals(
    levels: Sequence[Any],
    timed: bool,
    student: GraphUNet,
    teacher: GraphUNet,
    losses: Sequence[Loss],
    output_dir: Path,
) -> Redundancy:
    """Return the removals that the losses allow, and what they save, which the main process measures once.

    Args:
        levels: the levels of the regions.
        timed: whether seconds are measured.
        student: the student.
        teacher: the teacher.
        losses: the losses. Regions that they name stay.
        output_dir: the folder that keeps what is measured, because seconds differ every time.
    Raises:
        SpecError: no region can be removed.
        TuningError: the student inherits or bypasses features.
    """
    if student.graph.sites:
        raise TuningError(
            f"the student inherits or bypasses features at {next(iter(student.graph.sites))}",
            where="student",
            hint="apply these passes to the tuned student",
        )
    key = hash_text(hash_model(student), *levels, str(timed))
    path = output_dir / f"savings-{key[:12]}.json"
    process = imported("accelerate", "tuning").PartialState(cpu=not torch.accelerator.is_available())
    with process.main_process_first():
        if path.exists():
            found = Redundancy.load(path)
        else:
            found = analyse_unet(student, levels=levels, calls=1, nominal=timed)
            output_dir.mkdir(parents=True, exist_ok=True)
            found.save(path)
    taps = [tap.path for loss in losses for tap, _ in loss.taps(student.graph, teacher.graph)]
    removals = []
    for one in found.removals:
        if any(f"{path}.".startswith(f"{one.path}.") for path in taps):
            graph = apply(student, f"PruneBlocks({one.path!r})", verify=False).graph
            try:
                for loss in losses:
                    loss.taps(graph, teacher.graph)
            except PathError:
                continue
        removals.append(one)
    if not removals:
        raise SpecError("the losses name every region that could be removed", hint="leave some of them out")
    return dataclasses.replace(found, removals=tuple(removals))


def savings_identity(found: Redundancy) -> str:
    """Return a hash of what removals save."""
    return hash_text(*(f"{one.path} {one.time} {one.macs} {one.parameters}" for one in found.removals))


def _layers(student: GraphUNet, paths: Sequence[str], train: Sequence[str] | None) -> list[str]:
    """Return the layers of regions that updates of low rank may be added to: with weights that no other layer has."""
    graph = student.graph
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    trained = paths if train is None else graph.matching(train)
    of_regions, allowed = (
        {str(n.target) for path in among for n in graph.region(path).nodes if n.op == "call_module"}
        for among in (paths, trained)
    )
    found = []
    for name in (name for name in calls if calls[name] == 1 and name in of_regions & allowed):
        layer = graph.module(name)
        plain = type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
        if plain or type(layer) is nn.Linear:
            found.append(name)
    return found
