"""Gates mix regions with what replaces them, are learned as in a plain loop, and find what is not needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import sdgraph
from sdgraph.errors import SpecError
from sdgraph.plan_search.evaluator import Measurements
from sdgraph.progress import Bar
from sdgraph.redundancy import analysis, gates
from sdgraph.redundancy.analysis import analyse
from sdgraph.redundancy.gates import GateTraining
from sdgraph.tuning import FeatureExtractor

from ..models import build, call_of

LEVELS = ("block", "layer", "unit")
MID = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")


def flat_call(unet: Any, seed: int = 0, timestep: int = 7) -> dict[str, Tensor]:
    call = call_of(unet, H=8, W=8, timestep=torch.tensor([timestep, timestep]), seed=seed)
    return {name: call[name] for name in ("sample", "timestep", "encoder_hidden_states")}


@pytest.fixture(scope="module")
def whole() -> sdgraph.GraphUNet:
    """A tiny UNet. Leave it as it is."""
    return sdgraph.GraphUNet(sdgraph.trace(build("sd15", layers_per_block=2)))


@pytest.mark.law("With all gates at 1 a UNet is whole, and with some at 0 it equals the pruned one, bit for bit.")
@pytest.mark.parametrize("levels", [("block",), ("layer",), ("unit",), LEVELS])
def test_gates_at_their_ends_are_the_whole_and_the_pruned_unet(
    whole: sdgraph.GraphUNet, levels: tuple[str, ...]
) -> None:
    paths, _ = analysis._removable(whole.graph, levels)
    names, flat = list(paths), flat_call(whole)
    unet = FeatureExtractor(whole, (), frozenset(flat), gradient_checkpointing=True, gated=names)
    inner = [name for name in names if name.startswith("up_blocks.1.attentions.0.")]
    with torch.no_grad():
        assert torch.equal(unet(flat, torch.ones(len(names)))[0], whole.run(flat))
        outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        for chosen in ([names[0]], names[1::3], inner, outermost):
            kept = torch.tensor([float(name not in chosen) for name in names])
            pruned = sdgraph.apply(whole, f"PruneBlocks({tuple(chosen)!r})", verify=False) if chosen else whole
            assert torch.equal(unet(flat, kept)[0], pruned.run(flat)), chosen


def training(whole: sdgraph.GraphUNet, paths: tuple[str, ...] = MID, steps: int = 12) -> GateTraining:
    calls = [flat_call(whole, seed, timestep) for seed, timestep in ((0, 900), (1, 500), (2, 100))]
    return GateTraining(whole, paths, calls, (0.9, 0.5, 0.1), 0.02, steps)


def objective(unet: Any, regions: Mapping[str, Tensor], step: int, expected: list[Tensor], steps: int) -> Tensor:
    """The objective of a step of a model of diffusers, whose modules are mixed with their inputs by hooks."""

    def mix(gate: Tensor) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                return (args[0] + gate * (output[0] - args[0]), *output[1:])
            return args[0] + gate * (output - args[0])

        return hook

    hooks = [unet.get_submodule(path).register_forward_hook(mix(gate)) for path, gate in regions.items()]
    seed, timestep, weight = ((0, 900, 0.9), (1, 500, 0.5), (2, 100, 0.1))[step % 3]
    found: Tensor = unet(**flat_call(unet, seed, timestep)).sample
    for hook in hooks:
        hook.remove()
    if not regions:
        return found
    off = ((found - expected[step % 3]) ** 2).flatten(1).mean(1) / (expected[step % 3] ** 2).flatten(1).mean(1)
    penalty = 1e-4 * 4e4 ** (step / (steps - 1)) * torch.stack(list(regions.values())).sum()
    total: Tensor = weight / 0.5 * off.mean() / 0.02 + penalty
    return total


def test_gates_are_those_of_a_plain_loop(whole: sdgraph.GraphUNet) -> None:
    unet, steps = build("sd15", layers_per_block=2), 12
    with torch.no_grad():
        expected = [objective(unet, {}, step, [], steps) for step in range(3)]
    values = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer, total = torch.optim.Adam([values], 0.05, betas=(0.9, 0.99)), torch.zeros(3, dtype=torch.float64)
    for step in range(steps):
        single = values.detach().float().requires_grad_(True)
        (slope,) = torch.autograd.grad(
            objective(unet, dict(zip(MID, single, strict=True)), step, expected, steps), single
        )
        values.grad = slope.double()
        optimizer.step()
        with torch.no_grad():
            values.clamp_(0, 1)
            total += values
    found = training(whole).run(Measurements(None, b""), Bar(disable=True))
    assert 0.5 < float(total.min() / steps) < float(total.max() / steps) < 1
    assert found == pytest.approx((total / steps).numpy(), abs=1e-4)


def test_gradients_are_finite_differences(whole: sdgraph.GraphUNet) -> None:
    double = sdgraph.GraphUNet(whole.graph.copy()).double()
    calls = [{n: t.double() if t.is_floating_point() else t for n, t in flat_call(whole).items()}]
    one = GateTraining(double, MID, calls, (1.0,), 0.02, 5)
    at, unet = torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64), one._unet

    def value(gates: Tensor) -> float:
        off, size = (
            x.square().flatten(1).mean(1) for x in (unet(calls[0], gates)[0] - one._outputs[0], one._outputs[0])
        )
        return float((off / size).mean() / 0.02 + one.penalty(3) * gates.sum())

    with torch.no_grad():
        steps = 1e-5 * torch.eye(3, dtype=torch.float64)
        slopes = [(value(at + step) - value(at - step)) / 2e-5 for step in steps]
    assert one.gradient(at, 3).tolist() == pytest.approx(slopes, rel=1e-4)


def test_a_stopped_training_goes_on_bit_for_bit(
    whole: sdgraph.GraphUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "KEPT", 5)
    expected = training(whole).run(Measurements(None, b""), Bar(disable=True))
    gradient, steps = GateTraining.gradient, list[int]()

    def counted(self: GateTraining, at: Tensor, step: int) -> Tensor:
        steps.append(step)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return gradient(self, at, step)

    monkeypatch.setattr(GateTraining, "gradient", counted)
    with pytest.raises(KeyboardInterrupt):
        training(whole).run(Measurements(tmp_path, b""), Bar(disable=True))
    found = training(whole).run(Measurements(tmp_path, b""), Bar(disable=True))
    assert np.array_equal(found, expected)
    assert steps[8:] == list(range(5, 12))


@pytest.mark.slow
def test_a_region_that_does_nothing_has_the_lowest_gate(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(analysis.LEVEL, "layer", re.compile(r"(mid_block|down_blocks\.1)\.resnets\.\d"))
    useless = pipe.unet.down_blocks[1].resnets[1].conv2
    kept = [parameter.detach().clone() for parameter in (useless.weight, useless.bias)]
    try:
        for parameter in (useless.weight, useless.bias):
            torch.nn.init.zeros_(parameter)
        options: dict[str, Any] = {"num_inference_steps": 3, "calls": 2, "progress": False, "levels": ("layer",)}
        options |= {"target": None}
        found = analyse(pipe, ("a red circle", "a blue square"), gates=30, **options)
    finally:
        with torch.no_grad():
            for parameter, before in zip((useless.weight, useless.bias), kept, strict=True):
                parameter.copy_(before)
    learned = {one.path: one.gate for one in found.removals}
    assert all(gate is not None and 0 <= gate <= 1 for gate in learned.values())
    ranked = sorted(learned, key=lambda path: learned[path] or 0)
    assert ranked[0] == "down_blocks.1.resnets.1"
    assert (learned[ranked[0]] or 0) < (learned[ranked[1]] or 0)
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
    largest = max(found.removals, key=found.error)
    assert learned[largest.path] == max(gate or 0 for gate in learned.values())
    choice = found.cheapest(parameters=0.999, criterion="gate")
    assert choice.paths == ("down_blocks.1.resnets.1",)
    assert choice.error == pytest.approx(0, abs=1e-9)
    assert "gate" in str(found)


def test_an_analysis_without_gates_does_not_choose_by_them() -> None:
    removal = sdgraph.Removal("mid_block", "block", 0.1, 0.1, 0.1, errors=(1.0,), similarity=0.0)
    found = sdgraph.Redundancy("0" * 32, "eager", 2, (900.0,), (1.0,), (removal,))
    with pytest.raises(SpecError, match="no gate of mid_block"):
        found.cheapest(time=0.95, criterion="gate")
    with pytest.raises(SpecError):
        found.cheapest(time=0.95, criterion="gates")  # type: ignore[arg-type]
