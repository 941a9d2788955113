"""Learned routing: masks by timestep keep a budget, steps are those of a plain loop, and the result is a switch."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

import sdgraph
from sdgraph import Redundancy, Removal, errors
from sdgraph.passes import InheritFeatures, PruneBlocks
from sdgraph.schedules import Uniform
from sdgraph.tuning import Batches, FeatureExtractor, LearnedPruning, LearnedRouting, NoiseSchedule, Output, Tensors
from sdgraph.tuning.learned_routing import RoutingMasks
from sdgraph.tuning.random_numbers import generator

from ..models import CROSS, ONE_LEVEL, build
from .conftest import equal, tensors
from .test_processes import assert_close, launched

Learn = Callable[..., tuple[sdgraph.GraphUNet, sdgraph.tuning.TuningReport]]
SPEC = LearnedRouting(4, masks=2, intervals=4, macs=0.9, gate_learning_rate=0.3)
RATE = 2e-3


@pytest.fixture(scope="module")
def whole() -> sdgraph.GraphUNet:
    """A small UNet. Leave it as it is."""
    return sdgraph.apply(build(**ONE_LEVEL, layers_per_block=1), (), verify=False)


def rows() -> Tensors:
    draw = torch.Generator().manual_seed(0)
    captions = {"encoder_hidden_states": torch.randn(6, 5, CROSS, generator=draw)}
    return Tensors(torch.randn(6, 4, 8, 8, generator=draw), captions)


@pytest.fixture
def learn(whole: sdgraph.GraphUNet, tmp_path: Path) -> Learn:
    """`sdgraph.tune` of the UNet by itself, with 4 steps of search and 2 after it; other arguments replace these."""

    def run(spec: LearnedRouting = SPEC, **changed: Any) -> Any:
        fixed: dict[str, Any] = {
            "student": whole, "teacher": whole, "data": rows(), "scheduler": DDPMScheduler(), "max_train_steps": 6,
            "output_dir": tmp_path / "run", "losses": (Output(),), "train_batch_size": 3, "report_to": "none",
            "learning_rate": RATE, "learn_routing": spec,
        }  # fmt: skip
        return sdgraph.tune(**{**fixed, **changed})

    return run


def masks(savings: list[float], spec: LearnedRouting, last_step: int = 10) -> RoutingMasks:
    removals = tuple(
        Removal(f"down_blocks.0.resnets.{n}", "layer", saved, saved, saved, (1.0,), 0.5)
        for n, saved in enumerate(savings)
    )
    return RoutingMasks(Redundancy("0" * 32, "eager", 0, (1.0,), (1.0,), removals), spec, 0.05, last_step, 1000)


def test_masks_begin_with_everything_and_keep_a_falling_budget() -> None:
    spec, savings = LearnedRouting(8, masks=3, intervals=6, macs=0.7), [0.1, 0.2, 0.15, 0.25]
    drawn = masks(savings, spec)
    timesteps = torch.arange(0, 1000, 10)  # as many in each interval, within rounding
    for step in range(10):
        noise = drawn.noise(generator(0, "mask", step), step / 10)
        gates = drawn(noise, timesteps).detach()
        assert gates.shape == (4, 100)
        assert set(gates.flatten().tolist()) <= {0.0, 1.0}
        over = min(1.0, step / 8)
        assert float(noise[-1]) == pytest.approx(over)
        saved = (
            sum(
                len(drawn.removed(noise)[mask]) and sum(savings[n] for n in drawn.removed(noise)[mask])
                for mask in drawn.routes
            )
            / spec.intervals
        )
        assert saved >= 0.3 * min(1.0, 2 * over) - 1e-6
        if step == 0:
            assert gates.all()
    assert len({tuple(column) for column in gates.T.tolist()}) <= 3
    assert gates.mean() < 1


def routed(
    scores: Tensor, router: Tensor, noise: Tensor, timesteps: Tensor, savings: Tensor, spec: LearnedRouting
) -> Tensor:
    """The gates of a plain loop, (regions, B), in which all sets of removals are tried."""
    count, regions = scores.shape
    over = float(noise[-1])
    first = torch.tensor([[2.0 * (m == n * count // spec.intervals) for m in range(count)] for n in range(4)])
    usage = [sum(int(row.argmax()) == m for row in first + router.detach()) / 4 for m in range(count)]
    values = scores.detach().flatten() + noise[: count * regions]
    costs = (0.01 + torch.log1p(values.exp())).numpy()
    weighed = torch.cat([share * savings for share in usage])
    needed = (1 - spec.budgets["macs"]) * min(1.0, 2 * over)
    best = min(
        (
            chosen
            for chosen in itertools.product((0, 1), repeat=count * regions)
            if np.dot(chosen, weighed.numpy()) >= needed - 1e-9
        ),
        key=lambda chosen: float(np.dot(chosen, costs)),
    )
    mask = 1 - torch.tensor(best, dtype=torch.float32)
    along = weighed.float() / weighed.float().square().sum()
    closed = (1 - mask) * (scores.flatten() - weighed.float() * (along @ scores.flatten())) * float(over < 1)
    mask = (mask + closed - closed.detach()).view(count, regions)
    gumbel = noise[count * regions : -1].view(-1, count)
    columns = []
    for timestep in timesteps.tolist():
        interval = timestep * spec.intervals // 1000
        logits = first[interval] + router[interval] + gumbel[interval]
        row, soft = mask[int(logits.argmax())], logits.softmax(0)
        single = savings.float()
        apart = mask.detach() - torch.outer(mask.detach() @ single, single) / single.square().sum()
        columns.append(row + float(over < 1) * ((soft - soft.detach()) @ apart) * (1 - row.detach()))
    return torch.stack(columns, 1)


@pytest.mark.slow
def test_a_run_is_that_of_a_plain_loop(learn: Learn, whole: sdgraph.GraphUNet) -> None:
    teacher = sdgraph.apply(build(**ONE_LEVEL, layers_per_block=1, seed=1), (), verify=False)
    tuned, report = learn(teacher=teacher, adam_weight_decay=0.01)
    found = sdgraph.analyse_unet(whole, levels=("layer",), calls=1)
    paths, savings = [one.path for one in found.removals], torch.tensor([one.macs for one in found.removals]).double()
    batches = Batches(rows(), NoiseSchedule.of(DDPMScheduler()), 3, seed=0)
    trained = copy.deepcopy(whole)
    student = FeatureExtractor(trained, (), frozenset(batches.batch(0, [0]).inputs), gated=paths)
    scores, router = torch.zeros(2, len(paths)), torch.zeros(4, 2)
    parameters = [*trained.parameters(), scores.requires_grad_(), router.requires_grad_()]
    scale = SPEC.gate_learning_rate / RATE
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.01)
    history = []
    for step in range(6):
        batch, draw = batches.batch(step, range(3)), generator(0, "mask", step, 0)
        over = min(1.0, step / 4)
        noise = np.concatenate([draw.logistic(size=scores.numel()), draw.gumbel(size=router.numel())])
        drawn = torch.from_numpy(np.append((1 - over) * noise, over)).float()
        gates = routed(scale * scores, scale * router, drawn, batch.timesteps, savings, SPEC)
        with torch.no_grad():
            expected = teacher(batch.noisy, batch.timesteps, batch.conditions["encoder_hidden_states"]).sample
        loss = (student(batch.inputs, gates)[0] - expected).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert report.column("loss") == pytest.approx(history, rel=1e-3)
    assert_close(tuned, trained, whole)


@pytest.mark.slow
def test_the_result_is_a_switch_of_the_masks_that_were_trained(learn: Learn, tmp_path: Path) -> None:
    tuned, report = learn()
    assert report.routing is not None
    assert tuned.graph.removed == {}
    saved = json.loads((tmp_path / "run" / "routing.json").read_text())
    assert saved["masks"] == str(report.routing)
    assert f"learned: {report.routing}" in str(report)
    switched = report.routing.switch(tuned)
    assert set(switched.members) == set(report.routing.masks)
    assert any(report.routing.masks.values())
    data = Batches(rows(), NoiseSchedule.of(DDPMScheduler()), 1, seed=0).batch(0, [0])
    paths = sorted({path for each in report.routing.masks.values() for path in each})
    gated = FeatureExtractor(tuned, (), frozenset(data.inputs), gated=paths)
    for timestep in (10, 260, 510, 990):
        name = report.routing.schedule.member(0, timestep, sdgraph.schedules.SamplingRun())
        gates = torch.tensor([float(path not in report.routing.masks[name]) for path in paths])[:, None]
        inputs = {**data.inputs, "timestep": torch.tensor([timestep])}
        with torch.no_grad():
            expected = gated(inputs, gates)[0]
            found = switched(data.noisy, timestep, data.conditions["encoder_hidden_states"]).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.law("A learned routing that was stopped goes on bit for bit.")
@pytest.mark.parametrize("stop", [3, 11])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(learn: Learn, stop: int, tmp_path: Path) -> None:
    class Interrupted(Output):
        calls = 0

        def __call__(self, *args: Any) -> Tensor:
            Interrupted.calls += 1
            if Interrupted.calls == stop:
                raise KeyboardInterrupt
            return super().__call__(*args)

    options: dict[str, Any] = {"use_ema": True, "gradient_accumulation_steps": 2, "losses": (Interrupted(),)}
    with pytest.raises(KeyboardInterrupt):
        learn(**options)
    resumed, report = learn(**options)
    uninterrupted, other = learn(output_dir=tmp_path / "whole", **options)
    assert equal(tensors(resumed), tensors(uninterrupted))
    assert report.routing == other.routing
    for name in ("loss", "gradient_norm", *report.gates):
        assert list(report.column(name)) == list(other.column(name)), name


SCRIPT = """
import sys, torch, sdgraph
from diffusers import DDPMScheduler
from sdgraph.tuning import LearnedRouting, Output, Tensors
torch.set_num_threads(1)
folder = sys.argv[1]
whole, kept = sdgraph.GraphUNet.from_pretrained(f"{folder}/whole"), torch.load(f"{folder}/data.pt")
sdgraph.tune(
    whole, whole, Tensors(kept["latents"], {"encoder_hidden_states": kept["captions"]}), scheduler=DDPMScheduler(),
    max_train_steps=6, output_dir=f"{folder}/run", losses=(Output(),), train_batch_size=3, report_to="none",
    learning_rate=2e-3,
    learn_routing=LearnedRouting(4, masks=2, intervals=4, macs=0.9, gate_learning_rate=0.3),
)
"""


@pytest.mark.long
def test_two_processes_learn_as_one_with_two_accumulated_batches(
    learn: Learn, whole: sdgraph.GraphUNet, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)
    captions = torch.randn(6, 5, CROSS, generator=draw)
    torch.save({"latents": torch.randn(6, 4, 8, 8, generator=draw), "captions": captions}, tmp_path / "data.pt")
    whole.save_pretrained(tmp_path / "whole")
    (tmp_path / "script.py").write_text(SCRIPT)
    launched(tmp_path)
    one, report = learn(output_dir=tmp_path / "one", gradient_accumulation_steps=2)
    two = sdgraph.tuning.TuningReport.of(tmp_path / "run")
    assert two.routing == report.routing
    for name in ("loss", *report.gates):
        assert two.column(name) == pytest.approx(report.column(name), rel=1e-3, abs=1e-9)
    assert_close(sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "unet"), one, whole)


def test_what_cannot_be_routed_is_refused(learn: Learn, whole: sdgraph.GraphUNet, tmp_path: Path) -> None:
    for wrong in ({}, {"macs": 0.0}, {"macs": 1.5}, {"macs": 0.9, "masks": 0}, {"macs": 0.9, "masks": 11}):
        with pytest.raises(errors.TuningError):
            LearnedRouting(3, **wrong)
    with pytest.raises(errors.TuningError, match="6 of 6 steps, and none is left"):
        learn(LearnedRouting(6, macs=0.9))
    with pytest.raises(errors.TuningError, match="1001 intervals of a schedule of 1000 timesteps"):
        learn(LearnedRouting(3, macs=0.9, intervals=1001))
    with pytest.raises(errors.TuningError, match="meets the budget as it is"):
        learn(LearnedRouting(3, macs=1.0))
    with pytest.raises(errors.TuningError, match="no masks meet the budget") as refused:
        learn(LearnedRouting(3, macs=0.01))
    assert "least possible" in str(refused.value)
    fixed = sdgraph.apply(whole, [PruneBlocks(("down_blocks.0", "up_blocks.0"))], verify=False)
    with pytest.raises(errors.TuningError, match="no region of layer can be removed"):
        learn(student=fixed)
    inheriting = sdgraph.apply(whole, [InheritFeatures("up_blocks.0.resnets.0", Uniform(2))], verify=False)
    with pytest.raises(errors.TuningError, match="inherits or bypasses features"):
        learn(student=inheriting)
    switched = sdgraph.MasksByCall.in_equal_intervals(()).switch(whole)
    with pytest.raises(errors.TuningError, match="SwitchUNet"):
        learn(student=switched)
    with pytest.raises(errors.TuningError, match="leave one of them out"):
        learn(learn_pruning=LearnedPruning(3, macs=0.9))
    assert not list((tmp_path / "run").glob("**/checkpoint-*"))
