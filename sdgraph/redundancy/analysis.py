"""`analyse`: remove one region at a time, and measure what that changes and what it saves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, fx

from ..atomic import owned
from ..compiler.numerics import example
from ..errors import EditError, ShapeError, SpecError
from ..graph import Graph
from ..ir.variants import Variant, copy_nodes
from ..options import Bounds, Count, Seed, Text, checked
from ..plan_search.evaluator import Measurements
from ..plan_search.final_latents import Array, check_request, final_latents, relative_errors, typical
from ..progress import Bar
from ..runtime.apply import apply
from ..runtime.recorded_calls import CallRecorder
from ..runtime.unet import GraphUNet
from ..tuning.digest import hash_each, hash_model, hash_program
from .gates import GateTraining
from .pruning_program import block_of
from .redundancy import LEVELS, JointRemoval, Redundancy, Removal, sizes_of

Target = Literal["eager", "compiled"]
TURNS = 7  # timed calls of a region, of which the first two warm up
LEVEL = {
    "block": re.compile(r"(down_blocks|up_blocks)\.\d+|mid_block"),
    "layer": re.compile(r".*_blocks?(\.\d+)?\.(resnets|attentions)\.\d+"),
    "unit": re.compile(r".*\.transformer_blocks\.\d+\.(attn\d|ff)"),
}


@checked(SpecError)
def analyse(
    pipe: Any,
    prompts: Sequence[str],
    *,
    levels: Annotated[Sequence[Literal["block", "layer", "unit"]], Bounds(length=1)] = LEVELS,
    target: Target = "eager",
    calls: Count = 8,
    latents: bool = False,
    pairs: bool = False,
    gates: Count | None = None,
    seed: Seed = 0,
    folder: Text | Path | None = None,
    progress: bool = True,
    **call: Any,
) -> Redundancy:
    """Measure how redundant the blocks, layers and units of a pipeline's UNet are, each removed alone.

    The output error of a region is measured on calls of real generations, which the whole UNet made: the squared
    difference of the predicted noise without the region, relative to the squared prediction. It is nearly additive over
    regions, so that `Redundancy.cheapest` can choose several.

    Args:
        pipe: a diffusers pipeline; its UNet is diffusers' own or a `GraphUNet`. It is as it was afterwards.
        prompts: the prompts to measure on; 4 to 16 with different words.
        levels: the levels of regions: "block", "layer" (resnets and attentions), "unit" (attn1, attn2, ff).
        target: what is timed: PyTorch on the pipeline's device, "eager" or "compiled".
        calls: the number of calls of a generation on which errors are measured, spread evenly.
        latents: whether the error of the final latents is measured too, which takes a generation per region.
        pairs: whether pairs of neighbouring regions of one block are removed together, for what is not additive.
        gates: the number of steps in which a gate of each region is learned; None learns none. 100 are enough for a
            ranking. The regions of one level learn together.
        seed: the seed of the first image's latents; the others count up from it.
        folder: the folder of measurements. With it, an analysis that was stopped goes on.
        progress: whether a bar is shown.
        call: further arguments of the pipeline, such as `num_inference_steps=20`.
    Returns:
        The redundancy, which prints as a table.
    Raises:
        SourceError: the pipeline has no UNet, or its solver adds random numbers.
        SpecError: there are no prompts, the prompts all have the same effect, no region of these levels can be removed,
            or another analysis writes to the folder.
    Example:
        `print(sdgraph.analyse(pipe, prompts, num_inference_steps=20))`
    Source:
        Zhang et al., "LAPTOP-Diff", 2024, whose criterion is the output error of one removal. A-SDM explores the same
        redundancy. Learned gates: FoldGPT ranks blocks by them; the penalty on soft masks is that of Lin et al., "GAL",
        2019. That it rises, and that gates are compared by how long they stay open, is our own.
    """
    check_request("analyse", pipe, prompts, call)
    whole = apply(pipe.unet, ())
    if whole.graph.sites:
        raise SpecError(
            f"the UNet inherits or bypasses features at {next(iter(whole.graph.sites))}",
            where="pipe.unet",
            hint="analyse the UNet before these passes, and apply them to the pruned one",
        )
    paths, fixed = _removable(whole.graph, levels)
    if not paths:
        hint = f"add levels: {', '.join(level for level in LEVELS if level not in levels) or 'there are no more'}"
        raise SpecError(f"no region of {', '.join(levels)} can be removed", where="levels", hint=hint)
    digest = hash_model(whole)
    request = (digest, *prompts, f"{seed} {calls} {target}", repr(sorted(call.items())))
    alone = owned(Path(folder), SpecError, "folder") if folder else contextlib.nullcontext()
    with alone:
        known = Measurements(Path(folder) if folder else None, "\n".join(request).encode())

        def generate(unet: GraphUNet) -> Tensor:
            return final_latents(pipe, unet, prompts, seed, call)[0]

        recorder = CallRecorder(whole.graph)
        reference = generate(recorder)
        _check_variation(recorder.calls[0], len(prompts))
        trial = _Trial(whole, _spread(recorder.calls, calls), known, target)
        couples = _neighbours(paths) if pairs else ()
        alike = known.numbers("similarity", " ".join(paths), lambda: trial.similarities(list(paths)))
        removals, joint = [], []
        with Bar(total=len(paths) + len(couples), desc="analyse", unit="region", disable=not progress) as bar:
            for (path, level), similarity in zip(paths.items(), alike, strict=True):
                without = _Without(whole, (path,))
                drift = trial.drift(without, generate, reference) if latents else None
                removals.append(trial.removal(path, level, without, float(similarity), drift))
                bar.update()
            for both in couples:
                joint.append(JointRemoval(both, trial.output_errors(_Without(whole, both))))
                bar.update()
        noise = _noise(pipe.scheduler, trial.timesteps)
        if gates is not None:
            removals = trial.gated(removals, noise, gates, progress)
    return Redundancy(
        digest, target, len(prompts), trial.timesteps, noise, tuple(removals), tuple(joint), fixed,
        hash_program(whole), hash_each(whole.tensors()), sizes_of(whole.graph),
    )  # fmt: skip


@checked(SpecError)
def analyse_unet(
    unet: Annotated[UNet2DConditionModel | GraphUNet | Graph, Any],
    *,
    levels: Annotated[Sequence[Literal["block", "layer", "unit"]], Bounds(length=1)] = LEVELS,
    calls: Count = 4,
    seed: Seed = 0,
    nominal: bool = False,
) -> Redundancy:
    """Measure how redundant the regions of a UNet are on random inputs, each removed alone.

    Random inputs rank regions worse than the generations of `analyse`, which sees what the UNet is used for.

    Args:
        unet: the UNet: diffusers' own or a traced one.
        levels: the levels of regions, see `analyse`.
        calls: the number of random inputs, whose timesteps are spread evenly.
        seed: the seed of the random numbers.
        nominal: whether the inputs have the model's own size, at which times are meaningful, instead of a small one.
    Returns:
        The redundancy.
    Raises:
        SourceError: it is no UNet that can be traced.
        SpecError: no region of these levels can be removed.
    Example:
        `sdgraph.analyse_unet(unet).cheapest(macs=0.7)`
    """
    whole = apply(unet, (), verify=False)
    paths, fixed = _removable(whole.graph, levels)
    if not paths:
        raise SpecError(f"no region of {', '.join(levels)} can be removed", where="levels", hint="other levels")
    sizes = {symbol.name: symbol.nominal for symbol in whole.graph.dims.symbols} if nominal else {}
    inputs = [example(whole.graph, seed + number, False, **sizes) for number in range(calls)]
    for flat, timestep in zip(inputs, np.linspace(999, 0, calls + 2)[1:-1], strict=True):
        flat["timestep"] = torch.full_like(flat["timestep"], round(timestep))
    trial = _Trial(whole, inputs, Measurements(None, b""), "eager")
    alike = trial.similarities(list(paths))
    removals = tuple(
        trial.removal(path, level, _Without(whole, (path,)), float(similarity), None)
        for (path, level), similarity in zip(paths.items(), alike, strict=True)
    )
    return Redundancy(
        hash_model(whole), "eager", 0, trial.timesteps, (1.0,) * calls, removals, (), fixed,
        hash_program(whole), hash_each(whole.tensors()), sizes_of(whole.graph),
    )  # fmt: skip


class _Without:
    """The UNet without some regions, which is made when something about it is not known yet.

    Args:
        whole: the UNet with all of its regions.
        paths: the module paths of the regions.
    """

    def __init__(self, whole: GraphUNet, paths: tuple[str, ...]) -> None:
        self.whole, self.paths = whole, paths

    @cached_property
    def unet(self) -> GraphUNet:
        """The pruned UNet."""
        return apply(self.whole, f"PruneBlocks({self.paths!r})", verify=False)


class _Trial:
    """The measurements of one removal.

    Args:
        whole: the UNet with all of its regions.
        calls: the flat inputs of the calls on which errors are measured.
        known: what was measured before.
        target: what is timed.
    """

    def __init__(
        self, whole: GraphUNet, calls: Sequence[Mapping[str, Tensor]], known: Measurements, target: Target
    ) -> None:
        self._whole, self._calls, self._known, self._target = whole, calls, known, target
        self.timesteps = tuple(float(flat["timestep"].reshape(-1)[0]) for flat in calls)
        self._timed = _ready(whole, target)
        with torch.no_grad():
            self._outputs = [whole.run(flat) for flat in calls]

    def removal(self, path: str, level: str, without: _Without, similarity: float, drift: float | None) -> Removal:
        """Return what is known of the removal of one region."""
        graph = self._whole.graph

        def sizes() -> Array:
            left = without.unet.graph
            parameters = sum(p.numel() for p in left.parameters().values())
            return np.array([parameters, left.macs], dtype=np.float64)

        parameters, macs = self._known.numbers("sizes", path, sizes)
        saved = self._known.numbers("seconds", path, lambda: self._seconds(without.unet))
        return Removal(
            path,
            level,
            1 - parameters / sum(p.numel() for p in graph.parameters().values()),
            1 - macs / graph.macs,
            1 - float(saved[0]),
            self.output_errors(without),
            similarity,
            drift,
        )

    def gated(self, removals: Sequence[Removal], noise: Sequence[float], steps: int, progress: bool) -> list[Removal]:
        """Return removals with their learned gates.

        The regions of one level learn together, because none of them lies in another.
        """
        learned, levels = dict[str, float](), dict.fromkeys(one.level for one in removals)
        with Bar(total=steps * len(levels), desc="gates", unit="step", disable=not progress) as bar:
            for level in levels:
                errors = {
                    one.path: float(np.average(one.errors, weights=noise)) for one in removals if one.level == level
                }
                training = GateTraining(self._whole, list(errors), self._calls, noise, max(errors.values()), steps)
                learned |= zip(errors, map(float, training.run(self._known, bar)), strict=True)
        return [dataclasses.replace(one, gate=learned[one.path]) for one in removals]

    def similarities(self, paths: Sequence[str]) -> Array:
        """Return the similarities of regions, the mean over the first, a middle and the last call."""
        few = _spread(self._calls, 3)
        return np.mean([_similarities(self._whole, paths, flat) for flat in few], axis=0)  # type: ignore[no-any-return]

    def drift(self, without: _Without, generate: Callable[[GraphUNet], Tensor], reference: Tensor) -> float:
        """Return the error of the final latents that a pruned UNet generates, the geometric mean over the prompts."""

        def measure() -> Array:
            return np.array([typical(relative_errors(generate(without.unet), reference))])

        return float(self._known.numbers("latents", " + ".join(without.paths), measure)[0])

    def output_errors(self, without: _Without) -> tuple[float, ...]:
        """Return the squared error of the output without some regions, relative to the squared output, by call."""

        @torch.no_grad()
        def measure() -> Array:
            found = []
            for flat, output in zip(self._calls, self._outputs, strict=True):
                off = (without.unet.run(flat).double() - output.double()).square().flatten(1).mean(1)
                found.append(float((off / output.double().square().flatten(1).mean(1)).mean()))
            return np.array(found)

        return tuple(map(float, self._known.numbers("output", " + ".join(without.paths), measure)))

    def _seconds(self, without: GraphUNet) -> Array:
        """Return the time of a call without a region relative to that of the whole UNet, in turns."""
        timed, flat = _ready(without, self._target), self._calls[0]
        ratios = [_timed(timed, flat) / _timed(self._timed, flat) for _ in range(TURNS)]
        return np.array([statistics.median(ratios[2:])])


@torch.no_grad()
def _similarities(whole: GraphUNet, paths: Sequence[str], flat: Mapping[str, Tensor]) -> Array:
    """Return the cosine similarity of each region's outputs and of the values that would replace them, at a call."""
    graph = whole.graph
    regions = [graph.region(path) for path in paths]
    pairs = [[region.stand_in(output) for output in region.outputs] for region in regions]
    nodes = copy_nodes(graph.fx)
    copies = {node.name: node for node in nodes.nodes}
    read = [copies[node.name] for pair in itertools.chain.from_iterable(pairs) for node in pair]
    output = nodes.output_node()
    output.args = ((output.args[0], *read),)
    given = [i.name for i in graph.inputs if i.name in flat]
    variant = Variant.split(nodes, missing={i.name for i in graph.inputs}.difference(given))
    values = iter(fx.GraphModule(whole, variant.nodes)(*(flat[name] for name in given))[1:])
    found = []
    for pair in pairs:
        both = [(next(values).double().flatten(), next(values).double().flatten()) for _ in pair]
        found.append(statistics.mean(float(F.cosine_similarity(kept, instead, dim=0)) for kept, instead in both))
    return np.array(found)


def _removable(graph: Graph, levels: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the level of each region that can be removed alone, and the reason of each that cannot."""
    removable, fixed = dict[str, str](), dict[str, str]()
    for path in graph.paths():
        level = next((name for name in levels if LEVEL[name].fullmatch(path)), None)
        if level is None:
            continue
        region = graph.region(path)
        try:
            shapes = [[node.meta["val"].shape for node in region.stand_in(output)] for output in region.outputs]
        except (EditError, ShapeError) as error:
            fixed[path] = error.what
            continue
        if all(kept == instead for kept, instead in shapes):
            removable[path] = level
        else:
            fixed[path] = "its output has another size than its input"
    return removable, fixed


def _neighbours(paths: Sequence[str] | Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the pairs of regions that follow each other in a block and of which none lies in the other."""
    ordered = list(paths)
    return tuple(
        (first, second)
        for first, second in itertools.pairwise(ordered)
        if block_of(first) == block_of(second) and not second.startswith(f"{first}.")
    )


def _spread(calls: Sequence[Mapping[str, Tensor]], number: int) -> list[Mapping[str, Tensor]]:
    """Return calls that are spread evenly over a generation, the first and the last among them."""
    places = np.linspace(0, len(calls) - 1, min(number, len(calls))).round().astype(int)
    return [calls[place] for place in places]


def _check_variation(flat: Mapping[str, Tensor], prompts: int) -> None:
    """Refuse prompts that are all encoded alike.

    Raises:
        SpecError: they are.
    """
    texts = flat["encoder_hidden_states"]
    if prompts > 1 and bool((texts[-prompts:] == texts[-1:]).all()):
        raise SpecError("all prompts are encoded alike", where="prompts", hint="prompts with different words")


def _noise(scheduler: Any, timesteps: Sequence[float]) -> tuple[float, ...]:
    """Return the share of noise in the samples at timesteps, by which errors are weighted; 1 if it is not known."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return (1.0,) * len(timesteps)
    return tuple(1 - float(alphas[round(t)]) for t in timesteps)


def _ready(unet: GraphUNet, target: Target) -> GraphUNet:
    if target == "eager":
        return unet
    compiled = apply(unet, (), verify=False)
    compiled.compile()
    return compiled


@torch.no_grad()
def _timed(unet: GraphUNet, flat: Mapping[str, Tensor]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    unet.run(flat)
    if flat["sample"].is_cuda:
        torch.cuda.synchronize(flat["sample"].device)
    return time.perf_counter() - start
