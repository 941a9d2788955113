"""`analyse`: remove one region at a time, and measure what that changes and what it saves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..atomic import owned
from ..compiler.numerics import example
from ..errors import EditError, ShapeError, SpecError
from ..evaluation.metrics import Images, ssim
from ..graph import Graph
from ..options import Bounds, Count, Index, Seed, Text, checked
from ..plan_search.evaluator import Measurements
from ..plan_search.final_latents import Array, check_request, final_latents, relative_errors, typical
from ..progress import Bar, note
from ..runtime.apply import apply
from ..runtime.digest import hash_each, hash_model, hash_program
from ..runtime.latents import as_pipelines_run_it, unscaled
from ..runtime.recorded_calls import CallRecorder, spread, timestep_of
from ..runtime.unet import GraphUNet
from .gates import GateTraining
from .pruning_program import block_of
from .redundancy import GONE, LEVELS, JointRemoval, Redundancy, Removal, sizes_of
from .replay import Replay
from .targets import Target

LEVEL = {
    "block": re.compile(r"(down_blocks|up_blocks)\.\d+|mid_block"),
    "layer": re.compile(r".*_blocks?(\.\d+)?\.(resnets|attentions)\.\d+"),
    "unit": re.compile(r".*\.transformer_blocks\.\d+\.(attn\d|ff)"),
}
KEPT = 2**31  # bytes of values of the whole UNet that are kept by default
NOT_FINITE = "without it, numbers are not finite"


@checked(SpecError)
def analyse(
    pipe: Any,
    prompts: Sequence[str],
    *,
    levels: Annotated[Sequence[Literal["block", "layer", "unit"]], Bounds(length=1)] = LEVELS,
    target: Text | None = "eager",
    calls: Count = 8,
    latents: bool = False,
    images: bool = False,
    pairs: bool = False,
    gates: Count | None = None,
    seed: Seed = 0,
    folder: Text | Path | None = None,
    kept_bytes: Index = KEPT,
    progress: bool = True,
    **call: Any,
) -> Redundancy:
    """Measure how redundant the blocks, layers and units of a pipeline's UNet are, each removed alone.

    The output error of a region is measured on calls of real generations, which the whole UNet made: the squared
    difference of the prediction without the region, relative to the squared prediction. It is nearly additive over
    regions, so that `Redundancy.cheapest` can choose several. Only what comes after a region is computed again.

    Args:
        pipe: a diffusers pipeline; its UNet is diffusers' own or a `GraphUNet`. It is as it was afterwards.
        prompts: the prompts to measure on; 4 to 16 with different words.
        levels: the levels of regions: "block", "layer" (resnets and attentions), "unit" (attn1, attn2, ff).
        target: the target whose seconds are measured: PyTorch on the pipeline's device, "eager" or "compiled"; or ONNX
            Runtime, "onnx:" and the name of a provider, on one export of the whole UNet, from whose graph each region
            is removed. None measures no seconds.
        calls: the number of calls of a generation on which errors are measured, spread evenly.
        latents: whether the error of the final latents is measured too, which takes a generation per region.
        images: whether the structural similarity of the decoded images is measured too, which takes the same
            generation per region, and decoding.
        pairs: whether pairs of neighbouring regions of one block are removed together, for what is not additive.
        gates: the number of steps in which a gate of each region is learned; None learns none. 100 are enough for a
            ranking. The regions of one level learn together.
        seed: the seed of the first image's latents; the others count up from it.
        folder: the folder of measurements. With it, an analysis that was stopped goes on.
        kept_bytes: the limit of the memory for values of the whole UNet, in bytes, for all measured calls together.
            What does not fit is computed again for each region.
        progress: whether a bar is shown.
        call: further arguments of the pipeline, such as `num_inference_steps=20`.
    Returns:
        The redundancy, which prints as a table.
    Raises:
        SourceError: the pipeline has no UNet, or its solver adds random numbers.
        SpecError: the prompts are fewer than two or all have the same effect, there is no such target, no region of
            these levels can be removed, the images are too small to compare, or another analysis writes to the folder.
        SavedError: a file in the folder is damaged.
        ExtraError, ExportError: the provider is not installed, or the UNet cannot be exported.
    Example:
        `print(sdgraph.analyse(pipe, prompts, num_inference_steps=20))`
    Source:
        Zhang et al., "LAPTOP-Diff", 2024, whose criterion is the output error of one removal. A-SDM explores the same
        redundancy. Learned gates: FoldGPT ranks blocks by them; the penalty on soft masks is that of Lin et al., "GAL",
        2019. That it rises, and that gates are compared by how long they stay open, is our own.
    """
    check_request("analyse", pipe, prompts, call)
    _check_prompts(prompts)
    whole = apply(pipe.unet, ())
    if whole.graph.sites:
        raise SpecError(
            f"the UNet inherits or bypasses features at {next(iter(whole.graph.sites))}",
            where="pipe.unet",
            hint="analyse the UNet before these passes, and apply them to the pruned one",
        )
    levels_of, fixed = _removable(whole.graph, levels)
    if not levels_of:
        hint = f"add levels: {', '.join(level for level in LEVELS if level not in levels) or 'there are no more'}"
        raise SpecError(f"no region of {', '.join(levels)} can be removed", where="levels", hint=hint)
    couples = _neighbours(levels_of) if pairs else ()
    joint = list[JointRemoval]()
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(owned(Path(folder), SpecError, "folder"))
        timed = None if target is None else stack.enter_context(Target(target, whole, levels_of))

        def generate(unet: GraphUNet) -> Tensor:
            return final_latents(pipe, unet, prompts, seed, call)[0]

        recorder = CallRecorder(whole.graph)
        reference = generate(recorder)
        _check_variation(recorder.calls[0], len(reference))
        request = (hash_model(whole), *prompts, f"{seed} {calls}", repr(sorted(call.items())))
        key = "\n".join(request).encode() + reference.cpu().float().numpy().tobytes()
        known = Measurements(None if folder is None else Path(folder), key)
        replay = Replay(whole, spread(recorder.calls, calls), list(levels_of), kept_bytes)
        drift = _Drift(pipe, generate, reference, latents, images) if latents or images else None
        trial = _Trial(whole, replay, known, timed, drift)
        total = len(levels_of) + len(couples)
        bar = stack.enter_context(Bar(total=total, desc="analyse", unit="removal", disable=not progress))
        removals, broken = trial.removals(levels_of, bar)
        fixed |= broken
        for both in couples:
            bar.set_postfix_str(" + ".join(both))
            errors = () if broken.keys() & both else trial.output_errors(_Without(whole, both))
            if errors:
                joint.append(JointRemoval(both, errors))
            else:
                note(f"without {' and '.join(both)}, numbers are not finite: this pair is left out")
            bar.update()
        timesteps = tuple(map(timestep_of, replay.calls))
        noise = _noise(pipe.scheduler, timesteps)
        if gates is not None:
            removals = trial.gated(removals, noise, gates, progress)
    on = None if timed is None else timed.on
    return _redundancy(whole, on, len(prompts), timesteps, noise, removals, joint, fixed)


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
        nominal: whether the inputs have the model's own size instead of a small one. Calls are timed at that size only.
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
    replay = Replay(whole, inputs, list(paths), KEPT)
    timed = Target("eager", whole, paths) if nominal else None
    trial = _Trial(whole, replay, Measurements(None, b""), timed, None)
    removals, broken = trial.removals(paths)
    on = None if timed is None else timed.on
    return _redundancy(whole, on, 0, tuple(map(timestep_of, inputs)), (1.0,) * calls, removals, (), fixed | broken)


def _redundancy(
    whole: GraphUNet,
    on: str | None,
    prompts: int,
    timesteps: tuple[float, ...],
    noise: tuple[float, ...],
    removals: Sequence[Removal],
    joint: Sequence[JointRemoval],
    fixed: Mapping[str, str],
) -> Redundancy:
    """Return what was measured of a UNet, with the hashes and sizes by which it is known again.

    Raises:
        SpecError: nothing could be measured.
    """
    if not removals:
        raise SpecError(
            "every removal gives numbers that are not finite", where="pipe.unet", hint="load it in float32 or bfloat16"
        )
    return Redundancy(
        hash_model(whole), on, prompts, timesteps, noise, tuple(removals), tuple(joint), fixed,
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


class _Drift:
    """The comparison of what a UNet generates with what the whole one does.

    Args:
        pipe: the pipeline.
        generate: the function that returns the final latents of a UNet.
        reference: the final latents of the whole UNet, (images, channels, height, width).
        latents: whether latents are compared.
        images: whether decoded images are compared.
    Raises:
        SpecError: the pipeline has no VAE, or the images are too small for their structural similarity.
    """

    def __init__(
        self, pipe: Any, generate: Callable[[GraphUNet], Tensor], reference: Tensor, latents: bool, images: bool
    ) -> None:
        self._generate, self._reference, self._latents, self._images = generate, reference, latents, images
        if not images:
            return
        if getattr(pipe, "vae", None) is None:
            raise SpecError(
                f"{type(pipe).__name__} has no VAE to decode images with", where="images", hint="latents=True"
            )
        self._vae, self._quantity = as_pipelines_run_it(pipe.vae), f"images, {hash_model(pipe.vae)}"
        self._decoded = self._decode(reference)
        if min(self._decoded.shape[1:3]) < 11:
            raise SpecError("the images are smaller than 11 pixels", where="images", hint="larger height= and width=")

    def measured(self, known: Measurements, without: _Without) -> dict[str, float | None] | None:
        """Return the figures of a pruned UNet, by the name of their field; None if they are not finite."""
        found: Tensor | None = None

        def latents() -> Tensor:
            nonlocal found
            found = self._generate(without.unet) if found is None else found
            return found

        subject, figures = " + ".join(without.paths), dict[str, float | None]()
        if self._latents:

            def error() -> Array:
                return _finite([typical(relative_errors(latents(), self._reference))])

            figures["latents"] = next(iter(known.numbers("latents", subject, error).tolist()), None)
        if self._images:

            def similarity() -> Array:
                return _finite([ssim(self._decode(latents()), self._decoded)])

            figures["images"] = next(iter(known.numbers(self._quantity, subject, similarity).tolist()), None)
        return None if None in figures.values() else figures

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Images:
        """Return images (N, H, W, C) in [0, 1]. They are decoded one by one, because they are large."""
        made = []
        for one in latents:
            inputs = unscaled(self._vae.config, one[None]).to(self._vae.device, self._vae.dtype)
            image = (self._vae.decode(inputs, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
            made.append(image.permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(made)


class _Trial:
    """The measurements of removals.

    Args:
        whole: the UNet with all of its regions.
        replay: the calls on which errors are measured.
        known: what was measured before.
        target: the target that is timed; None for none.
        drift: the comparison of generations; None for none.
    """

    def __init__(
        self, whole: GraphUNet, replay: Replay, known: Measurements, target: Target | None, drift: _Drift | None
    ) -> None:
        self._whole, self._replay, self._known = whole, replay, known
        self._target, self._drift = target, drift

    def removals(self, levels_of: Mapping[str, str], bar: Any = None) -> tuple[list[Removal], dict[str, str]]:
        """Return the removals of regions, and why the others could not be measured, by path.

        Args:
            levels_of: the level of each region by path.
            bar: the bar that shows the progress; None for no bar.
        """
        found, broken = list[Removal](), dict[str, str]()
        for path, level in levels_of.items():
            if bar is not None:
                bar.set_postfix_str(path)
            removal = self._removal(path, level)
            if removal is None:
                broken[path] = NOT_FINITE
            else:
                found.append(removal)
            if bar is not None:
                bar.update()
        return found, broken

    def _removal(self, path: str, level: str) -> Removal | None:
        """Return what the removal of one region changes and saves; None if its numbers are not finite."""
        without, graph, target = _Without(self._whole, (path,)), self._whole.graph, self._target
        errors = self.output_errors(without)
        further = {} if self._drift is None or not errors else self._drift.measured(self._known, without)
        if not errors or further is None:
            return None

        def sizes() -> Array:
            left = sizes_of(without.unet.graph)
            return np.array([left["parameters"], left["macs"]], dtype=np.float64)

        def similarity() -> Array:
            return np.array([self._replay.similarities()[path]])

        def seconds(target: Target) -> float:
            def measure() -> Array:
                return np.array([target.share(path, without.unet, self._replay.calls[0])])

            return 1 - float(self._known.numbers(f"seconds, {target.on}", path, measure)[0])

        whole, (parameters, macs) = sizes_of(graph), self._known.numbers("sizes", path, sizes)
        return Removal(
            path,
            level,
            1 - parameters / whole["parameters"],
            1 - macs / whole["macs"],
            None if target is None else seconds(target),
            errors,
            float(self._known.numbers("similarity", path, similarity)[0]),
            **further,
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
                training = GateTraining(
                    self._whole, list(errors), self._replay.calls, noise, max(errors.values()), steps
                )
                learned |= zip(errors, map(float, training.run(self._known, bar)), strict=True)
        return [dataclasses.replace(one, gate=learned[one.path]) for one in removals]

    def output_errors(self, without: _Without) -> tuple[float, ...]:
        """Return the squared error of the output without some regions, relative to the squared output, by call.

        There are none if one of them is not finite.
        """

        def measure() -> Array:
            found = []
            for pruned, whole in zip(self._replay.run(without.unet), self._replay.outputs, strict=True):
                off = (pruned.double() - whole.double()).square().flatten(1).mean(1)
                found.append(float((off / whole.double().square().flatten(1).mean(1)).mean()))
            return _finite(found)

        return tuple(map(float, self._known.numbers("output", " + ".join(without.paths), measure)))


def _finite(numbers: Sequence[float]) -> Array:
    """Return numbers, or none if one is not finite: files hold finite numbers only."""
    return np.array(numbers if np.isfinite(numbers).all() else [], dtype=np.float64)


def _removable(graph: Graph, levels: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the level of each region that can be removed alone, and the reason of each that cannot."""
    removable = dict[str, str]()
    gone = {path: by for path, by in graph.removed.items() if any(LEVEL[name].fullmatch(path) for name in levels)}
    fixed = {path: f"{GONE} {by}" for path, by in gone.items()}
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


def _check_prompts(prompts: Sequence[str]) -> None:
    """Refuse prompts that cannot differ.

    Raises:
        SpecError: there is one prompt, or all are the same text.
    """
    if len(set(prompts)) < 2:
        what = "there is one prompt" if len(prompts) == 1 else "all prompts are the same"
        raise SpecError(what, where="prompts", hint="pass 4 to 16 prompts with different words")


def _check_variation(flat: Mapping[str, Tensor], images: int) -> None:
    """Refuse prompts that are all encoded alike.

    Raises:
        SpecError: they are.
    """
    texts = flat["encoder_hidden_states"][-images:]
    if bool((texts == texts[-1:]).all()):
        raise SpecError("all prompts are encoded alike", where="prompts", hint="prompts with different words")


def _noise(scheduler: Any, timesteps: Sequence[float]) -> tuple[float, ...]:
    """Return the share of noise in the samples at timesteps, by which errors are weighted; 1 if it is not known."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return (1.0,) * len(timesteps)
    return tuple(1 - float(alphas[min(round(t), len(alphas) - 1)]) for t in timesteps)
