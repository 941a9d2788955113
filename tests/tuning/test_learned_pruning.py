"""Learned pruning: masks keep the budget, steps are those of a plain loop, and the result is a plain PruneBlocks."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import strategies as st
from torch import Tensor

import sdgraph
from sdgraph import Redundancy, Removal, errors
from sdgraph.passes import Fold, InheritFeatures, PruneBlocks
from sdgraph.schedules import Uniform
from sdgraph.tuning import Batches, FeatureExtractor, Features, LearnedPruning, NoiseSchedule, Output, Tensors
from sdgraph.tuning.learned_pruning import PruningMasks
from sdgraph.tuning.random_numbers import generator

from ..models import CROSS, ONE_LEVEL, answer, build, call_of
from .conftest import equal, tensors
from .test_processes import assert_close, launched

Learn = Callable[..., tuple[sdgraph.GraphUNet, sdgraph.tuning.TuningReport]]
USELESS = "up_blocks.0.resnets.1"


@pytest.fixture(scope="module")
def whole() -> sdgraph.GraphUNet:
    """A UNet with one resnet that does nothing. Leave it as it is."""
    unet = build(**ONE_LEVEL, layers_per_block=1)
    for parameter in unet.get_submodule(f"{USELESS}.conv2").parameters():
        torch.nn.init.zeros_(parameter)
    shortcut = unet.get_submodule(f"{USELESS}.conv_shortcut")
    with torch.no_grad():  # the identity of the main flow, without the skip connection
        shortcut.bias.zero_()
        shortcut.weight.copy_(torch.eye(16, 32)[:, :, None, None])
    return sdgraph.apply(unet, (), verify=False)


@pytest.fixture
def learn(whole: sdgraph.GraphUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Learn:
    """`sdgraph.tune` of the UNet by itself, with 3 steps of search and 1 after it; other arguments replace these."""
    draw = torch.Generator().manual_seed(0)
    captions = {"encoder_hidden_states": torch.randn(6, 5, CROSS, generator=draw)}
    data = Tensors(torch.randn(6, 4, 8, 8, generator=draw), captions)

    def run(spec: LearnedPruning | None = None, **changed: Any) -> Any:
        fixed: dict[str, Any] = {
            "student": whole, "teacher": whole, "data": data, "scheduler": DDPMScheduler(), "max_train_steps": 4,
            "output_dir": tmp_path / "run", "losses": (Output(),), "train_batch_size": 2, "report_to": "none",
            "learn_pruning": spec or LearnedPruning(3, parameters=0.93, learning_rate=2e-3),
        }  # fmt: skip
        return sdgraph.tune(**{**fixed, **changed})

    return run


def masks(savings: list[float], spec: LearnedPruning) -> PruningMasks:
    removals = tuple(
        Removal(f"down_blocks.0.resnets.{n}", "layer", saved, saved, saved, (1.0,), 0.5)
        for n, saved in enumerate(savings)
    )
    return PruningMasks(Redundancy("0" * 32, "eager", 0, (1.0,), (1.0,), removals), spec)


def cheapest(costs: list[float], savings: list[float], share: float, of: tuple[int, int] | None) -> list[int]:
    """The cheapest removals that meet a budget and a limit for neighbours, by trying all sets."""
    best, least = list[int](), math.inf
    for chosen in itertools.product((0, 1), repeat=len(costs)):
        windows = [] if of is None else [chosen[n : n + of[1]] for n in range(max(1, len(chosen) - of[1] + 1))]
        met = sum(s for s, one in zip(savings, chosen, strict=True) if one) >= 1 - share - 1e-9
        if met and all(sum(window) <= of[0] for window in windows if of):
            cost = sum(c for c, one in zip(costs, chosen, strict=True) if one)
            if cost < least - 1e-9:
                best, least = [n for n, one in enumerate(chosen) if one], cost
    return best


@hypothesis.given(st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=5, max_size=7), st.integers(0, 1000))
def test_every_mask_is_the_cheapest_that_keeps_the_budget(savings: list[float], seed: int) -> None:
    drawn = masks(savings, LearnedPruning(10, macs=0.75, neighbours=(2, 3)))
    with torch.no_grad():
        drawn.scores.copy_(0.01 * torch.randn(len(savings), generator=torch.Generator().manual_seed(seed)))
    noise = drawn.noise(generator(seed, "mask"), 0.25)
    mask = drawn(noise).detach()
    scores = drawn.scores.detach() * (0.05 / 1e-4) + noise
    costs = [0.01 + math.log1p(math.exp(score)) for score in scores.tolist()]
    removed = [n for n, kept in enumerate(mask.tolist()) if not kept]
    expected = cheapest(costs, savings, 0.75, (2, 3))
    assert set(mask.tolist()) <= {0.0, 1.0}
    assert sum(costs[n] for n in removed) == pytest.approx(sum(costs[n] for n in expected))
    assert sum(savings[n] for n in removed) >= 0.25 - 1e-9


def test_gradients_pass_through_but_for_what_all_budgets_fix() -> None:
    drawn = masks([0.1, 0.2, 0.3, 0.2], LearnedPruning(10, macs=0.85, gate_learning_rate=1e-3, learning_rate=1e-3))
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0])
    saving = torch.tensor([0.1, 0.2, 0.3, 0.2])
    closed = upstream * torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert drawn(torch.tensor([3.0, -9.0, 3.0, 3.0])).tolist() == [1.0, 0.0, 1.0, 1.0]
    (slope,) = torch.autograd.grad((drawn(torch.tensor([3.0, -9.0, 3.0, 3.0])) * upstream).sum(), drawn.scores)
    torch.testing.assert_close(slope, closed - saving * (closed @ saving) / (saving @ saving))
    assert abs(float(slope @ saving)) < 1e-6
    noises = torch.stack([drawn.noise(generator(0, "mask", n), 0.5) for n in range(500)])
    assert float(noises.std()) == pytest.approx(0.5 * math.pi / math.sqrt(3), rel=0.1)
    assert not drawn.noise(generator(0, "mask"), 1.0).any()


def mixing(seed: int, step: int, scores: Tensor, savings: list[float], progress: float, rates: float) -> Tensor:
    """A mask of a plain loop, in which all sets are tried."""
    noise = (1 - progress) * generator(seed, "mask", step, 0).logistic(size=len(savings))
    values = rates * scores
    costs = np.log1p(np.exp((values.detach() + torch.from_numpy(noise).float()).numpy())) + 0.01
    mask = torch.ones(len(savings))
    mask[cheapest(costs.tolist(), savings, 0.93, (2, 3))] = 0
    saving = torch.tensor(savings, dtype=torch.float32)
    through = (1 - mask) * (values - saving * (values @ saving) / (saving @ saving))
    return mask + (through - through.detach())


@pytest.mark.slow
def test_a_search_is_that_of_a_plain_loop(learn: Learn, whole: sdgraph.GraphUNet, tmp_path: Path) -> None:
    rate, gate_rate, steps = 2e-3, 0.05, 3
    _, report = learn(gradient_checkpointing=True)
    assert report.search is not None
    found = sdgraph.analyse_unet(whole, levels=("layer",), calls=1)
    paths, savings = [one.path for one in found.removals], [one.parameters for one in found.removals]
    unet = sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "pruning" / "unet")  # for its layers; begins anew
    start = tensors(whole)
    layers = sorted(name.removesuffix(".up") for name in unet.state_dict() if name.endswith(".up"))
    assert {layer.rpartition(".")[2] for layer in layers} >= {"conv1", "conv2", "to_q", "proj_in", "conv_shortcut"}
    assert all(layer.startswith(tuple(paths)) for layer in layers)
    wide = sdgraph.apply(whole, f"Overparameterize({tuple(layers)!r}, kind='low-rank', rank=8)", verify=False)
    wide.requires_grad_(False)
    trained = [
        wide.get_parameter(f"{layer}.{part}").requires_grad_(True) for layer in layers for part in ("down", "up")
    ]
    scores = torch.zeros(len(paths), requires_grad=True)
    optimizer = torch.optim.AdamW([scores, *trained], rate)
    draw = torch.Generator().manual_seed(0)
    captions = {"encoder_hidden_states": torch.randn(6, 5, CROSS, generator=draw)}
    data = Tensors(torch.randn(6, 4, 8, 8, generator=draw), captions)
    batches = Batches(data, NoiseSchedule.of(DDPMScheduler()), 2, seed=1)
    student = FeatureExtractor(wide, (), frozenset(batches.batch(0, [0]).inputs), gated=paths)
    history, gates = [], []
    for step in range(steps):
        batch = batches.batch(step, range(2))
        mask = mixing(1, step, scores, savings, step / steps, gate_rate / rate)
        with torch.no_grad():
            expected = whole(batch.noisy, batch.timesteps, batch.conditions["encoder_hidden_states"]).sample
        loss = (student(batch.inputs, mask)[0] - expected).square().mean()
        gates.append(torch.sigmoid(gate_rate / rate * scores.detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([scores, *trained], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert report.search.column("loss") == pytest.approx(history, rel=1e-4)
    for number, path in enumerate(paths):
        column = report.search.column(f"gate {path}")
        assert column == pytest.approx([float(values[number]) for values in gates], rel=1e-3)
    kept, wanted = tensors(unet), tensors(wide)
    moved = torch.cat([wanted[f"{layer}.up"].flatten() for layer in layers]).norm()
    off = torch.cat([(wanted[f"{layer}.up"] - kept[f"{layer}.up"]).flatten() for layer in layers]).norm()
    assert off < 1e-3 * moved
    assert all(torch.equal(kept[name], start[name]) for name in start)


@pytest.mark.slow
def test_the_result_is_a_plain_pruned_unet_with_the_learned_weights(
    learn: Learn, whole: sdgraph.GraphUNet, tmp_path: Path
) -> None:
    tuned, report = learn(learning_rate=1e-12, adam_weight_decay=0.0)
    (applied,) = tuned.graph.passes
    assert isinstance(applied.one, PruneBlocks)
    choice = json.loads((tmp_path / "run" / "pruning" / "pruning.json").read_text())
    assert choice["passes"] == [str(applied.one)]
    count = {unet: sum(p.numel() for p in unet.parameters()) for unet in (tuned, whole)}
    assert count[tuned] / count[whole] == pytest.approx(choice["left"]["parameters"])
    assert count[tuned] / count[whole] <= 0.93
    learned = sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "pruning" / "unet")
    pruned = sdgraph.apply(learned, [Fold(), applied.one], verify=False)
    torch.testing.assert_close(answer(tuned, call_of(whole)), answer(pruned, call_of(whole)), rtol=1e-4, atol=1e-5)
    plain = sdgraph.apply(whole, [applied.one], verify=False)
    assert not torch.allclose(answer(tuned, call_of(whole)), answer(plain, call_of(whole)), rtol=1e-3)
    saved = sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "unet")
    assert torch.equal(answer(saved, call_of(whole)), answer(tuned, call_of(whole)))
    recipe = json.loads((tmp_path / "run" / "tuning.json").read_text())
    assert recipe["passes"] == choice["passes"]
    assert f"chosen: {applied.one}" in str(report)
    assert report.search is not None
    assert len(report.search.gates) == len(choice["gates"])


@pytest.mark.slow
@pytest.mark.law("A learned pruning that was stopped goes on bit for bit.")
@pytest.mark.parametrize("stop", [2, 4, 9])
def test_a_search_that_was_stopped_goes_on_bit_for_bit(learn: Learn, stop: int, tmp_path: Path) -> None:
    class Interrupted(Output):
        calls = 0

        def __call__(self, *args: Any) -> Tensor:
            Interrupted.calls += 1
            if Interrupted.calls == stop:
                raise KeyboardInterrupt
            return super().__call__(*args)

    options: dict[str, Any] = {"use_ema": True, "gradient_accumulation_steps": 2, "checkpointing_steps": 1}
    options |= {"max_train_steps": 5, "losses": (Interrupted(),)}
    with pytest.raises(KeyboardInterrupt):
        learn(**options)
    resumed, report = learn(**options)
    whole, other = learn(output_dir=tmp_path / "whole", **options)
    assert equal(tensors(resumed), tensors(whole))
    assert report.search is not None
    assert other.search is not None
    for name in ("loss", "gradient_norm", *report.search.gates):
        assert list(report.search.column(name)) == list(other.search.column(name)), name
    assert list(report.column("loss")) == list(other.column("loss"))


@pytest.mark.long
def test_a_useless_region_is_found(learn: Learn) -> None:
    tuned, report = learn(LearnedPruning(60, parameters=0.93, learning_rate=1e-3), max_train_steps=61)
    assert report.search is not None
    ranked = sorted(report.search.gates, key=lambda name: report.search.column(name)[-1])  # type: ignore[union-attr]
    assert ranked[0] == f"gate {USELESS}"
    assert USELESS in tuned.graph.removed


SCRIPT = """
import sys, torch, sdgraph
from diffusers import DDPMScheduler
from sdgraph.tuning import LearnedPruning, Output, Tensors
torch.set_num_threads(1)
folder = sys.argv[1]
whole, kept = sdgraph.GraphUNet.from_pretrained(f"{folder}/whole"), torch.load(f"{folder}/data.pt")
sdgraph.tune(
    whole, whole, Tensors(kept["latents"], {"encoder_hidden_states": kept["captions"]}), scheduler=DDPMScheduler(),
    max_train_steps=4, output_dir=f"{folder}/run", losses=(Output(),), train_batch_size=2, report_to="none",
    learn_pruning=LearnedPruning(3, parameters=0.93, learning_rate=2e-3),
)
"""


@pytest.mark.long
def test_two_processes_search_as_one_with_two_accumulated_batches(
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
    assert two.search is not None
    assert report.search is not None
    for name in ("loss", *report.search.gates):
        assert two.search.column(name) == pytest.approx(report.search.column(name), rel=1e-3)
    written = sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "unet")
    assert written.graph.removed.keys() == one.graph.removed.keys()
    assert_close(written, one, sdgraph.apply(whole, [one.graph.passes[0].one], verify=False))


def test_what_cannot_be_learned_is_refused(learn: Learn, whole: sdgraph.GraphUNet, tmp_path: Path) -> None:
    for wrong in ({}, {"macs": 0.0}, {"macs": 0.9, "neighbours": (3, 2)}, {"macs": 0.9, "levels": ()}):
        with pytest.raises(errors.TuningError):
            LearnedPruning(3, **wrong)
    with pytest.raises(errors.TuningError, match="3 of 3 steps, and none is left"):
        learn(max_train_steps=3)
    fixed = sdgraph.apply(whole, [PruneBlocks(("down_blocks.0", "up_blocks.0"))], verify=False)
    with pytest.raises(errors.TuningError, match="no region of layer can be removed"):
        learn(student=fixed)
    with pytest.raises(errors.TuningError, match="no removals meet the budget") as refused:
        learn(LearnedPruning(3, parameters=0.05))
    assert "least possible" in str(refused.value)
    with pytest.raises(errors.TuningError, match="meets the budget as it is"):
        learn(LearnedPruning(3, parameters=1.0))
    with pytest.raises(errors.TuningError, match="the losses name every region"):
        learn(losses=(Features(tuple(one.path for one in sdgraph.analyse_unet(whole, levels=("layer",)).removals)),))
    inheriting = sdgraph.apply(whole, [InheritFeatures("up_blocks.0.resnets.0", Uniform(2))], verify=False)
    with pytest.raises(errors.TuningError, match="inherits or bypasses features"):
        learn(student=inheriting)
    assert not list((tmp_path / "run").glob("**/checkpoint-*"))


@pytest.mark.slow
def test_regions_that_losses_name_stay_and_what_is_trained_is_kept_to(learn: Learn, whole: sdgraph.GraphUNet) -> None:
    named = "up_blocks.0.resnets.1"
    tuned, report = learn(losses=(Output(), Features((named,))), train=("up_blocks.0",))
    assert report.search is not None
    assert f"gate {named}" not in report.search.names
    assert named not in tuned.graph.removed
    fixed = [name for name in tensors(tuned) if not name.startswith("up_blocks.0")]
    assert all(torch.equal(tensors(tuned)[name], tensors(whole)[name]) for name in fixed)
