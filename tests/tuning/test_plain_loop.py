"""`tune` equals a plain PyTorch loop: the same rows and losses, AdamW and clipped gradients give the same weights."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

import sdgraph
from sdgraph.passes import MECondConv, PruneBlocks
from sdgraph.tuning import (
    DEFAULT,
    AttentionMaps,
    Batch,
    Batches,
    Comparison,
    FeatureExtractor,
    Features,
    Guidance,
    Loss,
    NoiseSchedule,
    Output,
    RoutingPrior,
    Similarity,
    Tensors,
    Wavelet,
)

from ..models import build, call_of
from .conftest import Tune, tensors

RATE, SIZE = 2e-3, 4
STAGES = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")


def assert_equal(found: nn.Module, expected: nn.Module, start: nn.Module) -> None:
    """All weights are equal but for rounding, relative to the distance that training has covered."""
    weights, wanted, before = tensors(found), tensors(expected), tensors(start)
    moved = torch.cat([(wanted[name] - before[name]).flatten() for name in weights]).norm()
    off = torch.cat([(weights[name] - wanted[name]).flatten() for name in weights]).norm()
    assert moved > 0.01
    assert off < 1e-3 * moved


@contextmanager
def outputs_of(unet: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Return a context with the outputs of modules of a UNet in its last call, of down blocks the hidden states."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda _, __, output: seen.__setitem__(path, output[0] if isinstance(output, tuple) else output)

    hooks = [unet.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    yield seen
    for hook in hooks:
        hook.remove()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error, relative to the teacher's squares, without values beyond two standard deviations."""
    kept = torch.ones_like(teacher)
    for values in (student.detach(), teacher):
        rows = values.flatten(1)
        away = (rows - rows.mean(1, keepdim=True)).abs() / rows.std(1, correction=0, keepdim=True)
        kept = kept * (away <= 2).reshape(values.shape)
    errors, squares = (kept * (student - teacher) ** 2).flatten(1).sum(1), (kept * teacher**2).flatten(1).sum(1)
    return (errors / squares).mean()


@pytest.mark.law("A tuned student equals that of a plain PyTorch loop.")
def test_the_default_losses_on_models_of_diffusers(
    tune: Tune, student: sdgraph.GraphUNet, teacher: UNet2DConditionModel, data: Tensors
) -> None:
    unet, noise = student.to_diffusers().train(), DDPMScheduler()
    batches = Batches(data, NoiseSchedule.of(noise), SIZE, proportion_empty_prompts=0.1)
    optimizer, history = torch.optim.AdamW(unet.parameters(), RATE), []
    with outputs_of(unet, STAGES) as seen, outputs_of(teacher, STAGES) as wanted:
        for step in range(4):
            batch = batches.batch(step, range(SIZE))
            assert batch.noise is not None
            noisy = noise.add_noise(batch.clean, batch.noise, batch.timesteps)
            call = noisy, batch.timesteps, batch.conditions["encoder_hidden_states"]
            prediction = unet(*call).sample
            with torch.no_grad():
                expected = teacher(*call).sample
            features = sum(relative_error(seen[path], wanted[path]) for path in STAGES) / len(STAGES)
            loss = mse_loss(prediction, expected) + 10 * features + 0.01 * mse_loss(prediction, batch.noise)
            loss.backward()
            clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
    tuned, report = tune(max_train_steps=4)
    assert report.column("loss") == pytest.approx(history, rel=1e-4)
    assert_equal(tuned.to_diffusers(), unet, student.to_diffusers())


def plain_loop(
    student: sdgraph.GraphUNet, teacher: sdgraph.GraphUNet, batches: Batches, losses: Sequence[Loss], steps: int,
    train: tuple[str, ...] = ("",), factors: Mapping[str, float] | None = None,
) -> tuple[sdgraph.GraphUNet, list[float]]:  # fmt: skip
    """Return a student that was trained in a plain loop, and its loss at every step.

    Args:
        student: the student, which stays as it is.
        teacher: the teacher.
        batches: the batches.
        losses: the losses, whose formulas have separate tests.
        steps: the number of steps.
        train: the beginnings of the names of the parameters that are trained.
        factors: the factors of the learning rate, by parts of the names of parameters.
    """
    unet, pairs = copy.deepcopy(student).train(), [list(loss.taps(student.graph, teacher.graph)) for loss in losses]
    names, wanted = frozenset(batches.batch(0, [0]).inputs), [tap for taps in pairs for _, tap in taps]
    run = FeatureExtractor(unet, [tap for taps in pairs for tap, _ in taps], names)
    run_teacher = FeatureExtractor(teacher, [tap for tap in wanted if tap], names)
    named = [(name, parameter) for name, parameter in unet.named_parameters() if name.startswith(train)]
    trained = [parameter for _, parameter in named]
    rates = [RATE * math.prod(f for part, f in (factors or {}).items() if part in name) for name, _ in named]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(trained, rates, strict=True)]
    optimizer, history = torch.optim.AdamW(groups), []
    for step in range(steps):
        batch = batches.batch(step, range(batches.size))
        prediction, *values = run(batch.inputs)
        with torch.no_grad():
            expected, *teacher_values = run_teacher(batch.inputs)
        given = iter(teacher_values)
        both = iter([(value, next(given) if tap else None) for value, tap in zip(values, wanted, strict=True)])
        it = Comparison(batch, batches.noise_schedule, prediction, expected)
        loss = sum(
            (
                one.weight
                * max(0.0, 1 - (step / steps) / (one.until or math.inf))
                * one(it, [next(both) for _ in taps])
                for one, taps in zip(losses, pairs, strict=True)
            ),
            torch.zeros(()),
        )
        loss.backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return unet, history


def test_a_part_of_the_student(
    tune: Tune, student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet, data: Tensors
) -> None:
    blocks, losses = ("down_blocks.0", "up_blocks.1"), (Output(), Features(("down_blocks.0", "up_blocks.1")))
    tuned, report = tune(losses=losses, train=blocks, proportion_empty_prompts=0.0)
    batches = Batches(data, NoiseSchedule.of(DDPMScheduler()), SIZE)
    expected, history = plain_loop(student, teaching, batches, losses, 4, blocks)
    assert report.column("loss") == pytest.approx(history, rel=1e-4)
    assert_equal(tuned, expected, student)
    fixed = {name for name in tensors(tuned) if not name.startswith(blocks)}
    assert all(torch.equal(tensors(tuned)[name], tensors(student)[name]) for name in fixed)


def test_pairs_with_and_without_a_caption(
    tune: Tune, student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet, data: Tensors
) -> None:
    losses = (Output(), Guidance(3.0))
    tuned, report = tune(losses=losses, guidance_pairs=True)
    batches = Batches(data, NoiseSchedule.of(DDPMScheduler()), SIZE, guidance_pairs=True)
    expected, history = plain_loop(student, teaching, batches, losses, 4)
    assert report.column("loss") == pytest.approx(history, rel=1e-4)
    assert_equal(tuned, expected, student)


def test_widths_that_differ_are_mapped(teacher: UNet2DConditionModel, data: Tensors, tmp_path: Path) -> None:
    """A convolution for each pair of features is trained along, whose first weights follow from the seed."""
    narrow = sdgraph.apply(build("sd15", block_out_channels=(8, 16), norm_num_groups=4), [])
    paths = ("mid_block", "up_blocks.1.attentions.0")
    tuned, report = sdgraph.tune(
        narrow, teacher, data, scheduler=DDPMScheduler(), max_train_steps=4, output_dir=tmp_path / "run",
        losses=(Features(paths),), learning_rate=RATE, report_to="none", train_batch_size=SIZE, seed=7,
        proportion_empty_prompts=0.0,
    )  # fmt: skip
    batches = Batches(data, NoiseSchedule.of(DDPMScheduler()), SIZE, seed=7)
    unet, history = narrow.to_diffusers().train(), []
    call = call_of(teacher)
    with outputs_of(unet, paths) as seen, outputs_of(teacher, paths) as wanted:
        unet(**call), teacher(**call)
        torch.manual_seed(7)
        adapters = nn.ModuleDict(
            {str(i): nn.Conv2d(seen[path].shape[1], wanted[path].shape[1], 1) for i, path in enumerate(paths)}
        )
        trained = [*unet.parameters(), *adapters.parameters()]
        optimizer = torch.optim.AdamW(trained, RATE)
        for step in range(4):
            inputs = _call(batches.batch(step, range(SIZE)))
            unet(*inputs)
            with torch.no_grad():
                teacher(*inputs)
            errors = [relative_error(adapters[str(i)](seen[path]), wanted[path]) for i, path in enumerate(paths)]
            loss = sum(errors, torch.zeros(())) / 2
            loss.backward()
            clip_grad_norm_([p for p in trained if p.grad is not None], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
    assert report.column("loss") == pytest.approx(history, rel=1e-4)
    assert_equal(tuned, unet, narrow)
    assert not any("adapter" in name for name in tuned.state_dict())


@pytest.mark.slow
def test_experts_are_led_by_a_prior_that_ends(teacher: UNet2DConditionModel, data: Tensors, tmp_path: Path) -> None:
    experts = [PruneBlocks("bk-sdm-base"), MECondConv(experts=2, donors="copies")]
    student, teaching = sdgraph.apply(teacher, experts, verify=False), sdgraph.apply(teacher, [])
    losses = (Output(), RoutingPrior(until=0.5))
    tuned, report = sdgraph.tune(
        student, teacher, data, scheduler=DDPMScheduler(), max_train_steps=4, output_dir=tmp_path / "run",
        losses=losses, train_batch_size=SIZE, learning_rate=RATE, learning_rates={"**.routing.*": 10},
        timestep_intervals=2, proportion_empty_prompts=0.0, report_to="none",
    )  # fmt: skip
    batches = Batches(data, NoiseSchedule.of(DDPMScheduler()), SIZE, timestep_intervals=2)
    expected, history = plain_loop(student, teaching, batches, losses, 4, factors={".routing.": 10})
    assert report.column("loss") == pytest.approx(history, rel=1e-4)
    assert report.column("RoutingPrior")[0] == pytest.approx(math.log(2), rel=1e-4)  # nothing is preferred at first
    assert_equal(tuned, expected, student)
    weights, before = tensors(tuned), tensors(student)
    assert any(not torch.equal(value, before[name]) for name, value in weights.items() if ".mix." in name)


def _call(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.noisy, batch.timesteps, batch.conditions["encoder_hidden_states"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_every_architecture_and_every_loss(name: str, tmp_path: Path) -> None:
    teacher = build(name, layers_per_block=2)
    call = call_of(teacher, B=8, H=8, W=8)
    conditions = {"encoder_hidden_states": call["encoder_hidden_states"], **call.get("added_cond_kwargs", {})}
    data, scheduler = Tensors(call["sample"], conditions), DDPMScheduler(prediction_type="v_prediction")
    losses = (*DEFAULT, AttentionMaps(), Similarity(), Wavelet())
    student, teaching = sdgraph.apply(teacher, [PruneBlocks("bk-sdm-base")]), sdgraph.apply(teacher, [])
    tuned, report = sdgraph.tune(
        student, teacher, data, scheduler=scheduler, max_train_steps=4, output_dir=tmp_path / "run", losses=losses,
        train_batch_size=8, learning_rate=RATE, report_to="none",
    )  # fmt: skip
    expected, history = plain_loop(student, teaching, Batches(data, NoiseSchedule.of(scheduler), 8), losses, 4)
    assert report.column("loss") == pytest.approx(history, rel=1e-4)
    assert_equal(tuned, expected, student)
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "unet")
    torch.testing.assert_close(plain(**call).sample, tuned(**call).sample, rtol=1e-3, atol=1e-4)
    recipe = json.loads((tmp_path / "run" / "tuning.json").read_text())
    assert recipe["passes"] == ["PruneBlocks('bk-sdm-base')"]
    assert "down_blocks.0.resnets.1" in recipe["removed"]
    assert recipe["losses"].startswith("Output(), Features(weight=10.0)")
