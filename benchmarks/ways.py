"""The ways of generating images that `frontier.py` compares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomesd
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from scenes.quality import held_out_captions
from torch import Tensor

import sdgraph
from sdgraph.passes import GRIAttention, InheritFeatures
from sdgraph.passes.gri_attention import self_attentions
from sdgraph.schedules import DenseCenter, DenseEarly, DenseLate, Uniform

CONVERGED = 100  # steps of DPM-Solver++ 2M Karras
STEPS, FEWER = 50, (30, 25, 20, 17, 14, 12, 10)
INTERVALS, BRANCHES = (2, 3, 5), (0, 1, 2)
EVERYWHERE = "{down_blocks.*,mid_block,up_blocks.*}"
CALIBRATION = 32  # number of prompts of a search


@dataclass(frozen=True)
class Way:
    """A way of generating images.

    Args:
        kind: the series of the plot that it belongs to.
        unet: the UNet that replaces the pipeline's.
        steps: the number of inference steps.
        macs: the multiply-accumulates of the UNet per image, as a share of those of all steps; None if unknown.
        passes: the passes of the UNet, as text.
        scheduler: the scheduler of the pipeline; by default the one that it has.
    """

    kind: str
    unet: Any
    steps: int
    macs: float | None
    passes: str = ""
    scheduler: Any = None


class Ways(dict[str, Way]):
    """Ways by name. The first is the reference: all steps, without passes.

    Args:
        pipe: the pipeline, to whose UNet passes are applied.
        steps: the number of inference steps of the reference.
    """

    def __init__(self, pipe: Any, steps: int) -> None:
        self.source = sdgraph.apply(pipe.unet, ())
        self.steps = steps
        pipe.scheduler.set_timesteps(steps)
        self.timesteps = pipe.scheduler.timesteps.tolist()
        super().__init__({"all steps": Way("fewer steps", self.source, steps, 1.0)})

    def fewer(self, *numbers: int) -> None:
        """Add the source with fewer inference steps."""
        for steps in numbers:
            self[f"{steps} steps"] = Way("fewer steps", self.source, steps, steps / self.steps)

    def add(self, kind: str, name: str, passes: Any, steps: int | None = None) -> None:
        """Add the source with passes; by default with all steps."""
        unet, steps = sdgraph.apply(self.source, passes, verify=False), steps or self.steps
        timesteps = self.timesteps if steps == self.steps else steps
        macs = unet.graph.timetable(timesteps).macs / (self.steps * self.source.graph.macs)
        self[name] = Way(kind, unet, steps, macs, ", ".join(map(str, unet.graph.passes)))


def inheritance(pipe: Any, quick: bool, folder: Path) -> Ways:
    """Feature inheritance: DeepCache and other published methods, forecasts, and searched schedules."""
    ways = Ways(pipe, 6 if quick else STEPS)
    ways.fewer(*((3,) if quick else FEWER))
    intervals = (2,) if quick else INTERVALS
    for interval in intervals:
        for branch in (0,) if quick else BRANCHES:
            ways.add(
                "DeepCache", f"DeepCache {interval}, branch {branch}", InheritFeatures.deep_cache(interval, branch)
            )
    deep = InheritFeatures.deep_cache()
    if not quick:
        for schedule in (DenseEarly(5), DenseLate(5), DenseCenter(5)):
            ways.add("DeepCache", f"DeepCache {schedule}, branch 0", replace(deep, schedule=schedule))
        ways.add("published", "Faster Diffusion", InheritFeatures.faster_diffusion())
        ways.add("published", "T-GATE", InheritFeatures.t_gate(20))
        ways.add("published", "attention broadcast", InheritFeatures.attention_broadcast())
        ways.add("published", "all layers, every 2nd", InheritFeatures.at_level("layer", within=EVERYWHERE))
    _, prompts = held_out_captions(2000)
    prompts = prompts[-3:] if quick else prompts[-CALIBRATION:]
    for forecast in (0, 1):
        candidate = replace(deep, forecast=forecast)
        for interval in intervals:
            if forecast:
                ways.add("forecast", f"DeepCache {interval}, forecast", replace(candidate, schedule=Uniform(interval)))
            budget = ways[f"DeepCache {interval}, branch 0"].macs
            assert budget is not None
            result = sdgraph.search(
                pipe, [candidate], prompts, budget=budget, cost="macs", folder=folder, trials=1 if quick else 60,
                reference_steps=ways.steps, num_inference_steps=ways.steps,
            )  # fmt: skip
            kind = "searched, forecast" if forecast else "searched"
            ways.add(kind, f"as much as DeepCache {interval}, {kind}", result.passes)
    return ways


def plans(pipe: Any, quick: bool, folder: Path) -> Ways:
    """Forecasts at the steps people use, on DPM-Solver++ 2M Karras, beside fewer steps of it and of DDIM.

    All steps are so many that the image does not change with more of them.
    """
    ddim = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(ddim.config, use_karras_sigmas=True)
    ways = Ways(pipe, 8 if quick else CONVERGED)
    ways.fewer(*((4,) if quick else (6, 8, 10, 12, 15, 20, 25, 30)))
    for steps in (4,) if quick else (10, 20, 30, 50):
        ways[f"DDIM, {steps} steps"] = Way("DDIM", ways.source, steps, steps / ways.steps, scheduler=ddim)
    _, prompts = held_out_captions(2000)
    prompts = prompts[-2:] if quick else prompts[-16:]
    for steps, interval in ((5, 2),) if quick else ((20, 2), (25, 2), (30, 3), (20, 3), (40, 4)):
        setting = f"{steps} steps, every {interval}."
        one = InheritFeatures.damped(interval)
        ways.add("DeepCache", f"{setting}, repeated", InheritFeatures.deep_cache(interval), steps)
        ways.add("line", f"{setting}, line", replace(one, forecast=1), steps)
        ways.add("damped", f"{setting}, damped by half", one, steps)
        fit = sdgraph.fit_forecast(pipe, one, prompts, reference_steps=ways.steps, rounds=1, num_inference_steps=steps)
        ways.add("fitted", f"{setting}, fitted", fit.fitted, steps)
    return ways


@dataclass(frozen=True)
class PooledKeys(sdgraph.Pass):
    """Replace the keys and values of self-attentions by their means over cells of the map.

    Args:
        pool: the side of a cell.
        levels: the levels of the UNet to change, 0 for the resolution of the latents.
    Source:
        Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images", 2024.
    """

    pool: int = 2
    levels: tuple[int, ...] = (0,)

    def run(self, graph: sdgraph.Graph) -> None:
        def pooled(x: Tensor, height: Any, width: Any) -> Tensor:
            B, heads, _, d = x.shape
            x = x.transpose(2, 3).reshape(B * heads, d, height, width)
            return F.avg_pool2d(x, self.pool).reshape(B, heads, d, -1).transpose(2, 3)

        def code(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
            height, width = tokens.shape[2], tokens.shape[3]
            return F.scaled_dot_product_attention(q, pooled(k, height, width), pooled(v, height, width))

        for node, tokens, level in self_attentions(graph):
            if level in self.levels:
                path = list(node.meta["nn_module_stack"])[-1]
                output = graph.insert(code, *node.args[:3], tokens, before=node, path=path)
                graph.rewire(node, output)
        graph.eliminate_dead_code()


def attention(pipe: Any, quick: bool, folder: Path) -> Ways:
    """Global-regional attention, pooled keys and token merging, without training."""
    ways = Ways(pipe, 2 if quick else STEPS)
    for window, pool in ((8, 4),) if quick else ((8, 2), (8, 4), (4, 2), (4, 4), (2, 2)):
        ways.add("GRI", f"GRI, window {window}, pool {pool}", GRIAttention(window, pool))
    if not quick:
        ways.add("GRI", "GRI, window 8, pool 4, shift 4", GRIAttention(8, 4, shift=4))
        ways.add("GRI, two levels", "GRI, window 4, pool 2, two levels", GRIAttention(4, 2, (0, 1)))
        ways.add("GRI, two levels", "GRI, window 2, pool 2, two levels", GRIAttention(2, 2, (0, 1)))
    for pool in (2,) if quick else (2, 4):
        ways.add("pooled keys", f"pooled keys, pool {pool}", PooledKeys(pool))
    for ratio in (0.5,) if quick else (0.25, 0.5, 0.75):
        merging = tomesd.apply_patch(copy.deepcopy(pipe.unet), ratio=ratio)
        ways[f"tomesd, ratio {ratio}"] = Way("token merging", merging, ways.steps, None)
    return ways


KINDS: Mapping[str, Callable[[Any, bool, Path], Ways]] = {
    "inheritance": inheritance,
    "plans": plans,
    "attention": attention,
}
