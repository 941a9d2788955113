"""Batches follow from the seed and the step; captions are dropped and swapped as often as asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from sdgraph import errors
from sdgraph.tuning import Batches, NoiseSchedule, Samples, Tensors
from sdgraph.tuning.random_numbers import generator

from ..models import CROSS

NOISING = NoiseSchedule.of(DDPMScheduler())


def rows(count: int) -> Tensors:
    """Rows whose captions are their numbers."""
    captions = torch.arange(count).float()[:, None, None].expand(count, 1, 1)
    latents = torch.arange(count).float()[:, None, None, None].expand(count, 4, 2, 2)
    return Tensors(latents, {"encoder_hidden_states": captions}, {"encoder_hidden_states": torch.full((1, 1), -1.0)})


@pytest.mark.law("The random numbers of a step depend on the seed and the number of the step alone.")
def test_numbers_follow_from_their_counters_alone() -> None:
    draw = generator(1, "noise", 3, 2).standard_normal(4)
    generator(1, "noise", 3, 1).standard_normal(1000)
    assert np.array_equal(draw, generator(1, "noise", 3, 2).standard_normal(4))
    others = [(2, "noise", 3, 2), (1, "caption", 3, 2), (1, "noise", 2, 3), (1, "noise", 3, 2, 1)]
    assert all(not np.array_equal(draw, generator(*other).standard_normal(4)) for other in others)


def test_a_row_does_not_depend_on_who_else_is_asked_for() -> None:
    batches = Batches(rows(10), NOISING, 8, seed=5, random_conditioning=True)
    whole, part = batches.batch(7, range(8)), batches.batch(7, [5, 6])
    for name in ("clean", "noise", "noisy", "timesteps"):
        assert torch.equal(getattr(whole, name)[5:7], getattr(part, name))
    assert torch.equal(whole.conditions["encoder_hidden_states"][5:7], part.conditions["encoder_hidden_states"])


def test_every_epoch_reads_every_row_once_in_its_own_order() -> None:
    batches = Batches(rows(12), NOISING, 4)
    read = [int(row) for step in range(6) for row in batches.batch(step, range(4)).clean[:, 0, 0, 0]]
    assert sorted(read[:12]) == sorted(read[12:]) == list(range(12))
    assert read[:12] != read[12:]


def test_timesteps_are_stratified() -> None:
    batches = Batches(rows(10), NOISING, 10)
    for step in range(5):
        timesteps = batches.batch(step, range(10)).timesteps
        assert sorted(int(t) // 100 for t in timesteps) == list(range(10))


def test_batches_take_turns_with_intervals_of_the_schedule() -> None:
    batches = Batches(rows(10), NOISING, 5, timestep_intervals=4)
    drawn = [batches.batch(step, range(5)).timesteps for step in range(8)]
    assert all(len({int(t) // 250 for t in timesteps}) == 1 for timesteps in drawn)
    for turn in (drawn[:4], drawn[4:]):
        assert sorted(int(t) // 50 for timesteps in turn for t in timesteps) == list(range(20))


def test_guidance_pairs_differ_in_the_caption_alone() -> None:
    batches = Batches(rows(10), NOISING, 8, guidance_pairs=True)
    batch = batches.batch(3, range(8))
    for name in ("clean", "noise", "noisy", "timesteps"):
        value = getattr(batch, name)
        assert torch.equal(value[0::2], value[1::2])
    captions = batch.conditions["encoder_hidden_states"].flatten()
    assert torch.equal(captions[0::2], batch.clean[0::2, 0, 0, 0])
    assert (captions[1::2] == -1).all()
    assert batch.pairs
    assert torch.equal(batches.batch(3, [4, 5]).noisy, batch.noisy[4:6])
    assert sorted(int(t) // 250 for t in batch.timesteps[0::2]) == [0, 1, 2, 3]
    read = [int(row) for step in range(5) for row in batches.batch(step, range(8)).clean[0::2, 0, 0, 0]]
    assert sorted(read) == sorted([*range(10)] * 2)


def test_noisy_latents_have_one_layout_in_memory() -> None:
    latents = torch.randn(4, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    batch = Batches(Tensors(latents, {}), NOISING, 4).batch(0, range(4))
    assert batch.noisy.stride() == (256, 64, 8, 1)


def test_captions_are_dropped_by_proportion_and_swapped_by_noise() -> None:
    batches = Batches(rows(50), NOISING, 500, proportion_empty_prompts=0.2, random_conditioning=True)
    batch = batches.batch(0, range(500))
    captions, images = batch.conditions["encoder_hidden_states"].flatten(), batch.clean[:, 0, 0, 0]
    empty = captions == -1
    swapped = (captions != images) & ~empty
    early, late = batch.timesteps < 500, batch.timesteps > 900

    assert 0.15 < empty.float().mean() < 0.25
    assert swapped[early & ~empty].float().mean() < 0.06
    assert swapped[late & ~empty].float().mean() > 0.65
    assert batch.own is not None
    assert torch.equal(batch.own, ~swapped)


def test_data_that_cannot_be_used_are_refused() -> None:
    captions = {"encoder_hidden_states": torch.zeros(3, 1, 1)}
    with pytest.raises(errors.TuningError, match="at least one row"):
        Tensors(torch.zeros(0, 4, 2, 2), {})
    with pytest.raises(errors.TuningError, match="3 rows and latents has 2"):
        Tensors(torch.zeros(2, 4, 2, 2), captions)
    broken = torch.zeros(3, 4, 2, 2)
    broken[1, 0, 0, 0] = torch.nan
    with pytest.raises(errors.TuningError, match="row 1 of latents"):
        Tensors(broken, captions)
    with pytest.raises(errors.TuningError, match="same names"):
        Tensors.of([{"latents": torch.zeros(4, 2, 2)}, {"pixels": torch.zeros(4, 2, 2)}])
    with pytest.raises(errors.TuningError, match="different shapes"):
        Tensors.of([{"latents": torch.zeros(4, 2, 2)}, {"latents": torch.zeros(4, 4, 2)}])
    with pytest.raises(errors.TuningError, match="empty caption"):
        Tensors(torch.zeros(3, 4, 2, 2), captions).conditions([None])
    with pytest.raises(errors.TuningError, match="alphas_cumprod"):
        NoiseSchedule.of(FlowMatchEulerDiscreteScheduler())


class Own:
    """A source whose rows are changed in one place."""

    def __init__(self, **changed: Any) -> None:
        self.changed = changed

    def __len__(self) -> int:
        return int(self.changed.get("rows", 3))

    def samples(self, rows: Sequence[int], generators: Sequence[np.random.Generator]) -> Samples:
        count = len(rows)
        usual = {"latents": torch.zeros(count, 4, 8, 8), "noisy": torch.zeros(count, 4, 8, 8)}
        usual |= {"timesteps": torch.full((count,), 5)}
        made = {name: self.changed.get(name, tensor) for name, tensor in usual.items()}
        return self.changed.get("samples", Samples(**made))

    def conditions(self, rows: Sequence[int | None]) -> dict[str, torch.Tensor]:
        return {"encoder_hidden_states": torch.zeros(len(rows), 5, CROSS), **self.changed.get("conditions", {})}

    def fingerprint(self) -> str:
        return "own"


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": 0},
        {"samples": torch.zeros(2, 4, 8, 8)},
        {"latents": torch.zeros(1, 4, 8, 8)},
        {"latents": torch.full((2, 4, 8, 8), math.nan)},
        {"latents": None},
        {"noisy": torch.zeros(1, 4, 8, 8)},
        {"noisy": torch.zeros(2, 4, 8, 1)},
        {"noisy": torch.full((2, 4, 8, 8), math.inf)},
        {"timesteps": torch.tensor([5])},
        {"timesteps": torch.tensor([5, -1])},
        {"timesteps": torch.tensor([5, 1000])},
        {"timesteps": [5, 5]},
        {"conditions": {"sample": torch.zeros(2, 4, 8, 8)}},
        {"conditions": {"timestep": torch.zeros(2)}},
        {"conditions": {"text_embeds": torch.zeros(1, 3)}},
        {"conditions": {"text_embeds": [0.0, 0.0]}},
        {"conditions": {"encoder_hidden_states": torch.full((2, 5, CROSS), math.nan)}},
    ],
    ids=str,
)
def test_sources_of_others_are_checked(changed: dict[str, Any]) -> None:
    noise_schedule = NoiseSchedule.of(DDPMScheduler())
    assert len(Batches(Own(), noise_schedule, 2).batch(0, [0, 1]).timesteps) == 2
    with pytest.raises(errors.TuningError):
        Batches(Own(**changed), noise_schedule, 2).batch(0, [0, 1])


@pytest.mark.parametrize(
    "empty",
    [
        {"text": torch.zeros(5, CROSS)},
        {"encoder_hidden_states": torch.zeros(7, CROSS)},
        {"encoder_hidden_states": torch.zeros(1, 5, CROSS)},
        {"encoder_hidden_states": torch.full((5, CROSS), math.nan)},
    ],
    ids=["name", "shape", "batch", "numbers"],
)
def test_an_empty_caption_that_fits_no_row_is_refused(empty: dict[str, torch.Tensor]) -> None:
    text = {"encoder_hidden_states": torch.zeros(2, 5, CROSS)}
    with pytest.raises(errors.TuningError) as refused:
        Tensors(torch.zeros(2, 4, 8, 8), text, empty)
    assert refused.value.where == "empty"
    for latents in (torch.zeros(2, 4, 8, 8).to_sparse(), torch.zeros(2, 4, 8, 8, dtype=torch.complex64)):
        with pytest.raises(errors.TuningError, match=r"sparse|complex"):
            Tensors(latents, text)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_schedule_may_end_without_signal(prediction: str) -> None:
    noise_schedule = NoiseSchedule.of(DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction))
    steps = torch.arange(len(noise_schedule))
    weights = noise_schedule.min_snr(steps, 5.0)
    assert noise_schedule.alphas[-1] == 0
    assert torch.isfinite(weights).all()
    ratio = noise_schedule.alphas / (1 - noise_schedule.alphas)
    divisors = {"epsilon": ratio, "v_prediction": ratio + 1, "sample": torch.ones_like(ratio)}
    inner = (ratio.clamp(max=5.0) / divisors[prediction])[:-1]
    torch.testing.assert_close(weights[:-1], inner)
    assert torch.isfinite(noise_schedule.clean(torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), steps[-1:])).all()
