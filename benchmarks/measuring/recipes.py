"""Recipes: the methods of recovering a pruned UNet that `benchmarks/tuning.py` compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sdgraph
from examples.scenes.judge import Judge
from examples.scenes.pipeline import GUIDANCE
from examples.scenes.student import GUIDED, LOSSES, captions, drawn, unseen_captions
from sdgraph import Pass
from sdgraph.passes import Fold, GRIAttention, MECondConv, Overparameterize, PruneBlocks, ShareWeights
from sdgraph.tuning import (
    DEFAULT,
    AttentionMaps,
    Comparison,
    Denoising,
    Features,
    Guidance,
    ImageFeatures,
    Loss,
    MoreCaptions,
    Output,
    Prompts,
    RoutingPrior,
    Source,
    chain,
    incubate,
)

PRESETS = ("base", "small", "tiny")


@dataclass(frozen=True)
class StageSum(Features):
    """BK-SDM's feature loss: the mean squared errors of the stages, added up as they are."""

    sigma: float | None = None

    def __call__(self, comparison: Comparison, values: Any) -> Tensor:
        return torch.stack([(mine - its).square().mean() for mine, its in values]).sum()


class Meaning(nn.Module):
    """The features of the judge."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = Judge.load()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.judge(images)[0]
        return features


def generated(pipe: Any, count: int, folder: Path, calls: int = 20, unseen: bool = False) -> Source:
    """Return as many rows without any drawing: the inputs of the teacher while it generated from captions.

    All calls of a generation are kept.

    Args:
        unseen: half of the captions name a pair of shape and colour that no training scene shows.
    """
    calls = min(calls, count)
    texts = captions(count // calls)
    if unseen:
        texts[::2] = unseen_captions(2 * len(texts))[: len(texts[::2])]
    return Prompts(
        texts,
        pipe,
        cache=folder / f"trajectories{'-unseen' * unseen}",
        num_inference_steps=calls,
        calls_per_prompt=calls,
        batch=32,
    )


def worded(pipe: Any, count: int, folder: Path) -> Source:
    """Return drawn scenes, and captions without scenes, of pairs that no scene shows."""
    return MoreCaptions(drawn(pipe, count, folder), unseen_captions(count), pipe)


# -- uses of the steps: a student of the teacher by pruning and further passes, after `steps` steps in all ------


def jointly(
    teacher: Any, pruning: PruneBlocks, passes: Sequence[Pass], rows: Source, steps: int, **options: Any
) -> Any:
    """Train all blocks together."""
    student = sdgraph.apply(teacher, [pruning, *passes])
    return sdgraph.tune(student, teacher, rows, max_train_steps=steps, **options)[0]


def untrained(teacher: Any, pruning: PruneBlocks, passes: Sequence[Pass], rows: Source, steps: int, **_: Any) -> Any:
    """Train nothing."""
    return sdgraph.apply(teacher, [pruning, *passes])


def in_stages(
    teacher: Any, pruning: PruneBlocks, passes: Sequence[Pass], rows: Source, steps: int, apart: float = 0.5,
    progressive: bool = False, processes: int = 1, **options: Any,
) -> Any:  # fmt: skip
    """Train the stages inside the teacher for a share of the steps, and the assembled student for the rest."""
    stages = pruning.stages(teacher.graph)
    each = round(apart * steps / len(stages))
    return incubate(
        teacher, [*stages, *passes], rows, stage_steps=each, max_train_steps=steps - each * len(stages),
        progressive=progressive, processes=processes, **options,
    )[0]  # fmt: skip


def in_links(
    teacher: Any, pruning: PruneBlocks, passes: Sequence[Pass], rows: Source, steps: int, **options: Any
) -> Any:
    """Prune stage by stage, and let the student before teach the next one."""
    stages = [*pruning.stages(teacher.graph), *passes]
    return chain(teacher, stages, rows, max_train_steps=round(steps / len(stages)), **options)[0]


@dataclass(frozen=True)
class Recipe:
    """A method of tuning.

    Args:
        losses: a function of a pipeline that returns the losses; by default those of `sdgraph.tune`.
        options: further options of `sdgraph.tune`.
        data: a function of a pipeline, a number of rows and a folder that returns the training data.
        passes: the passes that follow the pruning.
        finish: the passes that follow the tuning.
        train: the function that spends the steps.
        kept: the blocks that stay although the preset removes them.
    """

    losses: Callable[[Any], tuple[Loss, ...]] = lambda pipe: DEFAULT
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Callable[[Any, int, Path], Source] = drawn
    passes: tuple[Pass, ...] = ()
    finish: tuple[Pass, ...] = ()
    train: Callable[..., Any] = jointly
    kept: tuple[str, ...] = ()

    def pruning(self, teacher: Any, preset: str) -> PruneBlocks:
        """Return the pruning of a preset, less the blocks that stay."""
        pruning = PruneBlocks(f"bk-sdm-{preset}")
        if not self.kept:
            return pruning
        removed = sdgraph.apply(teacher, [pruning]).graph.removed
        return PruneBlocks(tuple(path for path in removed if path not in self.kept))

    def untrained(self, teacher: Any, preset: str) -> Any:
        """Return a student as it is deployed, with the weights of the teacher."""
        return sdgraph.apply(teacher, [self.pruning(teacher, preset), *self.passes, *self.finish])


def with_default(*losses: Loss) -> Callable[[Any], tuple[Loss, ...]]:
    return lambda pipe: (*DEFAULT, *losses)


ROUTED: Mapping[str, Any] = {"learning_rates": {"**.routing.*": 20}, "timestep_intervals": 4}
# As many parameters as experts of rank 8 add. Those of full experts are more than the teacher has.
MORE_BLOCKS = ("up_blocks.0.resnets.1", "down_blocks.2.resnets.1", "down_blocks.1.resnets.1")
PRIOR = with_default(RoutingPrior(weight=0.01, until=0.5))
CONVOLUTIONS = "**.resnets.*.{conv1,conv2}"
FIRST_HALF = {
    "untuned": Recipe(train=untrained),
    "task loss": Recipe(lambda pipe: (Denoising(),)),
    "BK-SDM's losses": Recipe(lambda pipe: (Denoising(), Output(), StageSum("stage"))),
    "ours": Recipe(),
    "ours, features at weight 1": Recipe(lambda pipe: (Output(), Features("stage"), Denoising(weight=0.01))),
    "ours, output only": Recipe(lambda pipe: (Output(), Denoising(weight=0.01))),
    "ours, random conditioning": Recipe(options={"random_conditioning": True}),
    "ours, guided": Recipe(lambda pipe: LOSSES, GUIDED),
    "ours, guided at weight 10": Recipe(with_default(Guidance(GUIDANCE, weight=10.0)), GUIDED),
    "ours, attention maps": Recipe(with_default(AttentionMaps())),
    "ours, image features": Recipe(lambda pipe: (*DEFAULT, ImageFeatures(Meaning(), pipe.vae, weight=0.1))),
    "ours, captions alone": Recipe(lambda pipe: DEFAULT[:-1], {"random_conditioning": True}, generated),
    "ours, captions of all pairs": Recipe(
        lambda pipe: DEFAULT[:-1], {"random_conditioning": True}, partial(generated, unseen=True)
    ),
    "ours, guided, more captions": Recipe(lambda pipe: LOSSES, {**GUIDED, "random_conditioning": True}, worded),
}
SECOND_HALF = {
    "incubated": Recipe(train=in_stages),
    "incubated in two processes": Recipe(train=partial(in_stages, processes=2, apart=0.85)),
    "incubated in progression": Recipe(train=partial(in_stages, progressive=True)),
    "chain": Recipe(train=in_links),
    "experts": Recipe(PRIOR, ROUTED, passes=(MECondConv(),)),
    "experts from parts": Recipe(PRIOR, ROUTED, passes=(MECondConv(donors="copies"),)),
    "experts of rank 8": Recipe(PRIOR, ROUTED, passes=(MECondConv(rank=8),)),
    "more blocks": Recipe(kept=MORE_BLOCKS),
    "folded product": Recipe(passes=(Overparameterize(CONVOLUTIONS),), finish=(Fold(),)),
    "folded branches": Recipe(passes=(Overparameterize(CONVOLUTIONS, kind="branches"),), finish=(Fold(),)),
    "shared": Recipe(passes=(ShareWeights.similar(count=2),)),
    "best together": Recipe(
        lambda pipe: LOSSES,
        GUIDED,
        passes=(Overparameterize(CONVOLUTIONS),),
        finish=(Fold(),),
        kept=MORE_BLOCKS,
    ),
    "GRI, untuned": Recipe(passes=(GRIAttention(8, pool=4),), train=untrained),
    "GRI": Recipe(passes=(GRIAttention(8, pool=4),)),
}
RECIPES = {**FIRST_HALF, **SECOND_HALF}
FULL = {"base": tuple(RECIPES), "small": ("untuned", "BK-SDM's losses", "ours")}
FULL["tiny"] = FULL["small"]
