"""Learned routing: which regions of a UNet are left out at which timesteps is learned together with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from ..errors import EditError, SdgraphError, SpecError, TuningError
from ..options import Bounds, Budget, Count, Positive
from ..redundancy.pruning_program import Parts, PruningProgram
from ..redundancy.redundancy import Redundancy
from ..runtime.apply import apply
from ..runtime.masks_by_call import MasksByCall
from ..runtime.unet import GraphUNet
from ..spec import Spec
from .learned_pruning import LEAST, allowed_removals, savings_identity
from .losses import Loss
from .report import GATE, ROUTING, write_learned
from .settings import Settings

LEANING = 2.0  # the first logit of the mask that an interval begins with


@dataclass(frozen=True)
class LearnedRouting(Spec):
    """Masks by call that are learned together with the weights, for `learn_routing` of `sdgraph.tune`.

    There are several masks, each with a score for every region, and a router, which has a score of every mask for each
    of some equal intervals of the training timesteps. A step adds noise to all scores. Every sample gets the mask that
    then has the highest score at its timestep, and the masks are those that cost least for the budget, by integer
    programming. The gradients of the gates pass straight through to both kinds of scores. At first nothing is left out;
    the budget falls over the first half of the search, and the noise falls to zero at its end. From then on the masks
    stay, and the steps that are left tune the weights with them. All masks share the weights.

    Args:
        steps: the number of optimizer steps of the search, which are the first of the run.
        masks: the number of masks.
        intervals: the number of intervals of the timesteps, each of which is routed to one mask.
        time: the seconds of a mean call that may be left, as a share of those of the student before.
        macs: the multiply-accumulates of a mean call that may be left, as a share. Budgets hold for the sum of what
            each removal saves alone, in the mean over the training timesteps.
        levels: the levels of the regions: "block", "layer" (resnets and attentions), "unit" (attn1, attn2, ff).
        gate_learning_rate: the learning rate of the scores.
    Raises:
        TuningError: there is no budget, or there are more masks than intervals.
    Example:
        `sdgraph.tune(unet, unet, data, learn_routing=LearnedRouting(1000, macs=0.65), max_train_steps=5000, **options)`
    Source:
        Yang et al., "ALTER: All-in-One Layer Pruning and Temporal Expert Routing", 2025, where a hypernetwork writes
        the scores and a penalty replaces the budget. Drawing masks by integer programming is our own, as in
        `LearnedPruning`.
    """

    refusal: ClassVar[type[SdgraphError]] = TuningError

    steps: Count
    masks: Count = 4
    intervals: Count = 10
    time: Budget | None = None
    macs: Budget | None = None
    levels: Annotated[tuple[Literal["block", "layer", "unit"], ...], Bounds(length=1)] = ("layer",)
    gate_learning_rate: Positive = 0.05

    def __post_init__(self) -> None:
        if not self.budgets:
            raise TuningError("there is no budget", where="LearnedRouting", hint="time=0.65 or macs=0.65")
        if self.masks > self.intervals:
            raise TuningError(
                f"{self.masks} masks for {self.intervals} intervals",
                where="LearnedRouting",
                hint="at most one mask for each interval",
            )

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are set, by name."""
        return {name: share for name, share in {"time": self.time, "macs": self.macs}.items() if share is not None}


class RoutingMasks(nn.Module):
    """Masks of regions by timestep, 1 for those that are kept: a distribution over what a budget allows.

    Args:
        found: the regions, and what their removals save.
        spec: the budget and its limits.
        learning_rate: the learning rate of the run.
        last_step: the number of steps of the run.
        timesteps: the number of training timesteps.
    """

    def __init__(
        self, found: Redundancy, spec: LearnedRouting, learning_rate: float, last_step: int, timesteps: int
    ) -> None:
        super().__init__()
        self.paths, self.spec = tuple(one.path for one in found.removals), spec
        self.scores = nn.Parameter(torch.zeros(spec.masks, len(self.paths)))
        self.router = nn.Parameter(torch.zeros(spec.intervals, spec.masks))
        self._removals, self._timesteps, self._searched = found.removals, timesteps, spec.steps / last_step
        self._scale = spec.gate_learning_rate / learning_rate  # Adam moves a parameter by its learning rate
        savings = torch.tensor([[getattr(one, name) for name in spec.budgets] for one in found.removals]).double()
        first = torch.arange(spec.intervals) * spec.masks // spec.intervals
        self.register_buffer("savings", savings, persistent=False)  # (regions, budgets)
        self.register_buffer("start", LEANING * one_hot(first, spec.masks).float(), persistent=False)
        self.savings: Tensor
        self.start: Tensor

    @property
    def routes(self) -> list[int]:
        """The number of the mask of each interval, that of the least noise first."""
        return (self.start + self._scale * self.router.detach()).argmax(1).tolist()

    @property
    def gates(self) -> dict[str, float]:
        """The gates by path, from 0 to 1, as the mean over the intervals."""
        values = torch.sigmoid(self._scale * self.scores.detach()).cpu()[self.routes].mean(0).tolist()
        return dict(zip(self.paths, values, strict=True))

    def figures(self) -> dict[str, float]:
        """Return the gates by the names of their columns in the log."""
        return {f"{GATE}{path}": gate for path, gate in self.gates.items()}

    def noise(self, draw: np.random.Generator, progress: float) -> Tensor:
        """Return the noise of all scores, (masks x regions + intervals x masks + 1,), and the progress at its end.

        Args:
            draw: the generator.
            progress: the share of the run that is over. At the end of the search there is no noise any more.
        """
        over = min(1.0, progress / self._searched)
        noise = (draw.logistic(size=self.scores.numel()), draw.gumbel(size=self.router.numel()))
        return torch.from_numpy(np.append((1 - over) * np.concatenate(noise), over)).float()

    def removed(self, noise: Tensor | None = None, parts: Parts | None = None) -> list[frozenset[int]]:
        """Return the numbers of the regions that each mask leaves out.

        Args:
            noise: the noise as of `noise`; by default there is none.
            parts: which removals can be made together, by paths that begin with the number of the mask.
        Raises:
            TuningError: no masks meet the budget.
        """
        count, regions = self.scores.shape
        noises = 0.0 if noise is None else noise[: self.scores.numel()].view_as(self.scores)
        over = 1.0 if noise is None else float(noise[-1])
        falling = {name: 1 - min(1.0, 2 * over) * (1 - share) for name, share in self.spec.budgets.items()}
        shares = self._usage()
        removals = [
            replace(one, path=f"{mask}:{one.path}", **{name: getattr(one, name) * share for name in self.spec.budgets})
            for mask, share in enumerate(shares)
            for one in self._removals
        ]
        costs = softplus(self._scale * self.scores.detach() + noises).double().flatten()
        program = PruningProgram(removals, ([LEAST + float(cost) for cost in costs], {}), None, None, (), parts)
        chosen = program.best(falling)
        if chosen is None:
            least = ", ".join(f"{name}={share:g}" for name, share in program.least(falling).items())
            raise TuningError(
                "no masks meet the budget by the sum of what each removal saves alone",
                where="learn_routing",
                hint=f"the least possible is {least}",
            )
        return [frozenset(n - mask * regions for n in chosen if n // regions == mask) for mask in range(count)]

    def forward(self, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the gates of each sample, (regions, B).

        Args:
            noise: the noise of the scores and the progress, as of `noise`.
            timesteps: the timesteps, (B,).
        """
        masks = torch.ones_like(self.scores)
        for mask, removed in enumerate(self.removed(noise)):
            masks[mask, sorted(removed)] = 0.0
        learning = float(noise[-1] < 1)
        # Of closed gates, but for what all masks of the budget have in common, as in `PruningMasks`.
        usage = torch.tensor(self._usage(), dtype=torch.float64, device=masks.device)
        scores = self._scale * self.scores
        apart = _apart((usage[:, None, None] * self.savings).flatten(0, 1), scores.flatten()[None])
        through = learning * (1 - masks) * apart.view_as(scores)
        rows = timesteps.long() * self.spec.intervals // self._timesteps
        noises = noise[self.scores.numel() : -1].view_as(self.router)
        logits = (self.start + self._scale * self.router + noises)[rows]
        chosen, soft = one_hot(logits.argmax(1), len(masks)).to(masks), logits.softmax(1)
        gates = chosen @ (masks + (through - through.detach()))
        routed = learning * (soft - soft.detach()) @ _apart(self.savings, masks) * (1 - gates.detach())
        by_region: Tensor = (gates + routed).T
        return by_region

    def _usage(self) -> list[float]:
        """Return the share of the timesteps that each mask serves."""
        counts = np.bincount(self.routes, minlength=self.spec.masks)
        return [float(count) / self.spec.intervals for count in counts]


def _apart(savings: Tensor, values: Tensor) -> Tensor:
    """Return values (..., n) without their part along what removals save, (n, budgets)."""
    along = (savings @ torch.linalg.pinv(savings)).to(values)
    apart: Tensor = values - values @ along
    return apart


class RoutingSearch:
    """The search of a learned routing: the student with masks, and what becomes of them.

    Args:
        spec: the budget and its limits.
        student: the student, which stays as it is.
        teacher: the teacher.
        losses: the losses of the run. Regions that they name stay.
        settings: the settings of the run.
        timesteps: the number of training timesteps.
        output_dir: the folder of the run, which keeps what removals save.
    Raises:
        TuningError: no region can be left out, nothing has to be, the budget cannot be met, the search is longer than
            the run, or there are more intervals than timesteps.
    """

    def __init__(
        self,
        spec: LearnedRouting,
        student: GraphUNet,
        teacher: GraphUNet,
        losses: Sequence[Loss],
        settings: Settings,
        timesteps: int,
        output_dir: Path,
    ) -> None:
        where = "learn_routing"
        if spec.steps >= settings.last_step:
            what = f"the search takes {spec.steps} of {settings.last_step} steps, and none is left for tuning"
            raise TuningError(what, where=where, hint="raise max_train_steps, or search in fewer steps")
        if spec.intervals > timesteps:
            what = f"{spec.intervals} intervals of a schedule of {timesteps} timesteps"
            raise TuningError(what, where=where, hint=f"at most {timesteps} intervals")
        if all(share == 1 for share in spec.budgets.values()):
            raise TuningError("the student meets the budget as it is", where=where, hint="lower the budget")
        self.spec, self.student, self._timesteps, self._output_dir = spec, student, timesteps, output_dir
        try:
            self._found = allowed_removals(spec.levels, spec.time is not None, student, teacher, losses, output_dir)
        except SpecError as error:
            raise TuningError(error.what, where=where, hint=error.hint) from error
        self.masks = RoutingMasks(self._found, spec, settings.learning_rate, settings.last_step, timesteps)
        self.chosen()  # refuses a budget that no masks meet

    @property
    def identity(self) -> dict[str, str]:
        """All that decides the search beside the student, as text by name."""
        return {"learned routing": str(self.spec), "savings of removals": savings_identity(self._found)}

    def chosen(self) -> MasksByCall:
        """Return the masks without noise. Sets that cannot be removed together are replaced by others."""
        paths = self.masks.paths

        @cache
        def possible(left_out: tuple[str, ...]) -> bool:
            try:
                apply(self.student, f"PruneBlocks({left_out!r})" if left_out else (), verify=False)
            except EditError:
                return False
            return True

        def lost(prefixed: tuple[str, ...]) -> tuple[str, ...] | None:
            by_mask: dict[str, list[str]] = {}
            for one in prefixed:
                mask, _, path = one.partition(":")
                by_mask.setdefault(mask, []).append(path)
            return () if all(possible(tuple(each)) for each in by_mask.values()) else None

        removed = self.masks.removed(None, Parts({}, lost))
        left_out = {f"mask-{n}": tuple(paths[one] for one in sorted(each)) for n, each in enumerate(removed)}
        routes = tuple(f"mask-{n}" for n in reversed(self.masks.routes))
        return MasksByCall.routed(left_out, routes, self._timesteps)

    def finish(self) -> None:
        """Write what was learned.

        Raises:
            TuningError: it cannot be written.
        """
        chosen, whole = self.chosen(), self.student.graph.macs
        left = {
            name: apply(self.student, f"PruneBlocks({paths!r})" if paths else (), verify=False).graph.macs / whole
            for name, paths in chosen.masks.items()
        }
        record = {
            "learned routing": str(self.spec),
            "masks": str(chosen),
            "macs left": left,
            "gates": self.masks.gates,
        }
        write_learned(self._output_dir / ROUTING, record)
