"""`sdgraph.tuning.Prompts`: the calls of a teacher's UNet while it generates, without images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from sdgraph.errors import TuningError
from sdgraph.runtime.digest import as_number, hash_text
from sdgraph.tuning import Prompts
from sdgraph.tuning.random_numbers import generator

from ..photos import CAPTIONS
from ..pipelines import large_with_text

STEPS, CALLS = 4, 2
SIZE = {"height": 16, "width": 24}
Record = Callable[..., Prompts]


@pytest.fixture
def prompts(pipe: Any, tmp_path: Path) -> Record:
    """`prompts(cache, ...)`: the source of three prompts."""

    def source(cache: str = "cache", **options: Any) -> Prompts:
        given = {"num_inference_steps": STEPS, "calls_per_prompt": CALLS, "batch": 2, **SIZE, **options}
        return Prompts(CAPTIONS[:3], given.pop("pipe", pipe), cache=tmp_path / cache, **given)

    return source


def everything(source: Prompts) -> list[Tensor]:
    rows = list(range(len(source)))
    samples = source.samples(rows, [np.random.default_rng(0)] * len(rows))
    assert samples.noisy is not None
    assert samples.timesteps is not None
    return [samples.latents, samples.noisy, samples.timesteps, *source.conditions(rows).values()]


def generated(pipe: Any, row: int, **call: Any) -> tuple[list[Tensor], Tensor]:
    """The latents before every step, and the last, of a prompt by itself."""
    latents: list[Tensor] = []

    def note(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"])
        return values

    seed = int(generator(0, "trajectory", as_number(hash_text(CAPTIONS[row], "0"))).integers(2**62))
    shape = (1, 4, SIZE["height"] // pipe.vae_scale_factor, SIZE["width"] // pipe.vae_scale_factor)
    draw = torch.Generator().manual_seed(seed)
    first = torch.randn(shape, generator=draw)
    pipe(
        CAPTIONS[row], num_inference_steps=STEPS, latents=first, generator=draw, output_type="latent",
        callback_on_step_end=note, **SIZE, **call,
    )  # fmt: skip
    return [first * pipe.scheduler.init_noise_sigma, *latents[:-1]], latents[-1]


@pytest.mark.parametrize("guidance", [None, 1.0], ids=["guided", "plain"])
def test_rows_are_what_the_unet_was_called_with(prompts: Record, pipe: Any, guidance: float | None) -> None:
    call = {} if guidance is None else {"guidance_scale": guidance}
    source = prompts(**call)
    assert len(source) == 3 * CALLS
    latents, noisy, timesteps, embeddings = everything(source)
    for row in range(3):
        steps, final = generated(pipe, row, **call)
        schedule = pipe.scheduler.timesteps.tolist()
        (text, _) = pipe.encode_prompt(CAPTIONS[row], "cpu", 1, False)
        for part in range(CALLS):
            at = row * CALLS + part
            position = schedule.index(timesteps[at])
            assert position // (STEPS // CALLS) == part  # one of each half
            torch.testing.assert_close(noisy[at], steps[position][0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(latents[at], final[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(embeddings[at], text[0])
    (_, empty) = pipe.encode_prompt("", "cpu", 1, True)
    torch.testing.assert_close(source.conditions([None])["encoder_hidden_states"], empty)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {}),
    ],
)
def test_every_scheduler_gives_latents_as_training_has_them(
    prompts: Record, pipe: Any, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that answers "the image is 0" leaves noise alone in the latents, of the size that a timestep has."""
    config = {**pipe.scheduler.config, "prediction_type": "epsilon", **options}
    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, name).from_config(config))
    sizes = (1 - pipe.scheduler.alphas_cumprod).sqrt()
    monkeypatch.setattr(pipe.unet, "forward", lambda x, t, **_: (x / sizes[round(float(t))],))
    source = prompts(num_inference_steps=12, calls_per_prompt=6, height=128, width=128)
    _, noisy, timesteps, _ = everything(source)
    assert timesteps.dtype == torch.int64
    assert timesteps.min() < 200
    assert timesteps.max() > 800
    for x, t in zip(noisy, timesteps.tolist(), strict=True):
        below, above = sizes[max(t - 3, 0)], sizes[min(t + 3, 999)]  # timesteps are rounded
        assert 0.9 * below <= x.std() <= 1.1 * above, (t, x.std(), sizes[t])


def test_kills_and_repetitions_change_no_bit(prompts: Record, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = everything(prompts("whole"))
    calls, call = 0, pipe.unet.forward

    def stopping(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == STEPS + 2:  # within the second batch
            raise KeyboardInterrupt
        return call(*args, **options)

    monkeypatch.setattr(pipe.unet, "forward", stopping)
    with pytest.raises(KeyboardInterrupt):
        prompts("stopped")
    resumed = prompts("stopped")
    assert calls == STEPS + 2 + STEPS  # the first batch was not lost
    again = prompts("stopped")
    for source in (resumed, again):
        assert all(map(torch.equal, everything(source), whole))
    assert resumed.fingerprint() == prompts("whole").fingerprint() != prompts("other", seed=1).fingerprint()
    assert not torch.equal(everything(prompts("other", seed=1))[0], whole[0])


def test_the_pipeline_stays_as_it_was(prompts: Record, pipe: Any) -> None:
    prompts()
    assert not pipe.unet._forward_pre_hooks
    assert pipe._progress_bar_config == {"disable": True}


def test_sdxl_conditions(prompts: Record) -> None:
    pipe = large_with_text()
    pipe.set_progress_bar_config(disable=True)
    found = prompts(pipe=pipe).conditions([3, None])  # a row of the second prompt
    embeddings, _, pooled, empty = pipe.encode_prompt(CAPTIONS[1], device="cpu")
    torch.testing.assert_close(found["encoder_hidden_states"][:1], embeddings)
    torch.testing.assert_close(found["text_embeds"], torch.cat([pooled, empty]))
    assert found["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2


def test_bad_input(prompts: Record, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ([], ["a red circle", 3]):
        with pytest.raises(TuningError, match=r"there are no prompts|prompts is"):
            Prompts(bad, pipe, cache=tmp_path)
    with pytest.raises(TuningError, match="5 calls cannot be kept of 4 steps"):
        prompts(calls_per_prompt=5)
    own = pipe.scheduler
    flow = diffusers.DPMSolverMultistepScheduler.from_config(own.config, use_flow_sigmas=True)
    for scheduler, reason in ((flow, "use_flow_sigmas"), (diffusers.EDMEulerScheduler(), "no noise schedule")):
        monkeypatch.setattr(pipe, "scheduler", scheduler)
        with pytest.raises(TuningError, match=reason):
            prompts()
    monkeypatch.setattr(pipe, "scheduler", own)
    broken = pipe.unet.register_forward_hook(lambda _, __, output: (output[0] * torch.nan,))
    try:
        with pytest.raises(TuningError, match=r"not finite(.|\n)*prompt 'a red circle'"):
            prompts()
    finally:
        broken.remove()
    prompts()
    with pytest.raises(TuningError, match="another num_inference_steps: 4 then, 5 now"):
        prompts(num_inference_steps=5)
