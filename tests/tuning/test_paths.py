"""Students of a few calls: the teacher's paths, the losses on them, and what a folded student refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import sdgraph
from sdgraph.errors import CallError, TuningError
from sdgraph.passes import PruneBlocks
from sdgraph.tuning import (
    Batch,
    Batches,
    Comparison,
    Guided,
    Loss,
    MoreCaptions,
    NoiseSchedule,
    Paths,
    Phased,
    Trajectory,
)
from sdgraph.tuning.sources.paths import trailing

from ..photos import CAPTIONS
from .conftest import equal, tensors

GRID = 4
SIZE = {"height": 16, "width": 24}
Record = Callable[..., Paths]


@pytest.fixture
def paths(pipe: Any, tmp_path: Path) -> Record:
    """`paths(calls=2, ...)`: the paths of three prompts."""

    def source(cache: str = "cache", **options: Any) -> Paths:
        given = {"calls": 2, "grid": GRID, "guidance": Guided(3.0), "batch": 2, **SIZE, **options}
        return Paths(CAPTIONS[:3], given.pop("pipe", pipe), cache=tmp_path / cache, **given)

    return source


def batch_of(source: Paths, pipe: Any, **options: Any) -> Batch:
    """All rows of a source, as a batch."""
    rows = len(source)
    return Batches(source, NoiseSchedule.of(pipe.scheduler), rows, **options).batch(0, range(rows))


def path_of(source: Paths, row: int, grid: int = GRID) -> list[Tensor]:
    return list(source._kept.rows([row], "path")["path"][0])


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_paths_are_those_of_the_pipeline(
    paths: Record, pipe: Any, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = paths(guidance=Guided(scale))
    monkeypatch.setattr(pipe, "scheduler", trailing(pipe.scheduler, GRID))
    for row in range(3):
        path, seen = path_of(source, row), []

        def note(_: Any, __: int, ___: Any, values: dict[str, Any], seen: list[Tensor] = seen) -> dict[str, Any]:
            seen.append(values["latents"][0])
            return values

        pipe(
            CAPTIONS[row], num_inference_steps=GRID, latents=path[0][None], guidance_scale=scale, output_type="latent",
            callback_on_step_end=note, **SIZE,
        )  # fmt: skip
        torch.testing.assert_close(torch.stack(path[1:]), torch.stack(seen), rtol=1e-4, atol=1e-4)


def test_one_record_serves_all_numbers_of_calls(paths: Record, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher is called again")

    monkeypatch.setattr(pipe.unet, "forward", refuse)
    for calls in (1, 2, 4):
        source = paths(calls=calls)
        assert len(source) == 3 * calls
        stride = GRID // calls
        drawn = source.samples(range(len(source)), [])
        assert drawn.noisy is not None
        assert drawn.target is not None
        for row in range(len(source)):
            prompt, call = divmod(row, calls)
            path = path_of(source, prompt)
            assert torch.equal(drawn.noisy[row], path[call * stride])
            assert torch.equal(drawn.target[row], path[(call + 1) * stride])


def test_a_limited_interval_leaves_guidance_out_at_the_noisiest_calls(paths: Record) -> None:
    kinds = {"none": Guided(1.0), "late": Guided(3.0, range=(0.5, 1.0)), "all": Guided(3.0)}
    none, late, everywhere = (path_of(paths(name, guidance=guidance), 0) for name, guidance in kinds.items())
    assert all(torch.equal(none[at], late[at]) for at in range(3))
    assert not torch.equal(none[3], late[3])
    assert not torch.equal(none[1], everywhere[1])


def test_a_teacher_has_no_error_on_its_own_path_without_guidance(paths: Record, pipe: Any) -> None:
    schedule = NoiseSchedule.of(pipe.scheduler)
    errors = {}
    for scale in (1.0, 3.0):
        batch = batch_of(paths(str(scale), calls=GRID, guidance=Guided(scale)), pipe)
        with torch.no_grad():
            prediction = pipe.unet(batch.noisy, batch.timesteps, **batch.conditions).sample
        errors[scale] = float(Trajectory()(Comparison(batch, schedule, prediction, prediction.new_zeros(0)), ()))
    assert errors[1.0] < 1e-8
    assert errors[3.0] > 100 * errors[1.0]


def phased_by_hand(unet: Any, batch: Batch, scheduler: Any) -> Tensor:
    """The loss by diffusers' own DDIM, row by row."""
    terms = []
    alphas = scheduler.alphas_cumprod
    for row in range(len(batch.noisy)):

        def arrive(sample: Tensor, timestep: Tensor, end: Tensor, row: int = row) -> Tensor:
            conditions = {name: value[row : row + 1] for name, value in batch.conditions.items()}
            alpha, velocity = alphas[timestep], unet(sample[None], timestep[None], **conditions).sample[0]
            clean = alpha.sqrt() * sample - (1 - alpha).sqrt() * velocity
            noise = alpha.sqrt() * velocity + (1 - alpha).sqrt() * sample
            return end.sqrt() * clean + (1 - end).sqrt() * noise

        end = batch.target_alphas[row]
        with torch.no_grad():
            wanted = arrive(batch.following[row], batch.following_timesteps[row], end)
        if torch.equal(batch.following[row], batch.target[row]):
            wanted = batch.target[row]
        found = arrive(batch.noisy[row], batch.timesteps[row], end)
        terms.append((((found - wanted) ** 2 + 1e-6).sqrt() - 1e-3).mean())
    return torch.stack(terms).mean()


def trained(pipe: Any, source: Any, folder: Path, loss: Loss, steps: int, **more: Any) -> Any:
    teacher = sdgraph.GraphUNet(sdgraph.trace(pipe.unet))
    options = {"scheduler": pipe.scheduler, "report_to": "none", "learning_rate": 2e-3, "train_batch_size": 4, **more}
    unet, _ = sdgraph.tune(
        options.pop("student", teacher), teacher, source, output_dir=folder, losses=[loss], max_train_steps=steps,
        **options,
    )  # fmt: skip
    return unet


@pytest.mark.long
@pytest.mark.law("A student that learns from paths equals that of a plain PyTorch loop.")
def test_phased_equals_a_plain_loop(paths: Record, pipe: Any, tmp_path: Path) -> None:
    source = paths(calls=1, points="grid")
    found = trained(pipe, source, tmp_path / "run", Phased(), 2)
    plain = copy.deepcopy(pipe.unet).train()
    optimizer = torch.optim.AdamW(plain.parameters(), 2e-3, weight_decay=1e-2)
    batches = Batches(source, NoiseSchedule.of(pipe.scheduler), 4)
    for step in range(2):
        phased_by_hand(plain, batches.batch(step, range(4)), source.scheduler).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    mine, its, before = tensors(found), tensors(plain), tensors(pipe.unet)
    moved = torch.cat([(its[name] - before[name]).flatten() for name in its]).norm()
    off = torch.cat([(its[name] - mine[name]).flatten() for name in its]).norm()
    assert moved > 0.01
    assert off < 0.01 * moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "points"), [(Trajectory(), "edges"), (Phased(), "grid")], ids=["trajectory", "phased"]
)
@pytest.mark.law("A run on paths that was stopped goes on bit for bit.")
def test_resume(paths: Record, pipe: Any, tmp_path: Path, loss: Loss, points: str) -> None:
    source, settings = paths(points=points), {"use_ema": True, "train_batch_size": 2}
    whole = trained(pipe, source, tmp_path / "whole", loss, 3, **settings)
    trained(pipe, source, tmp_path / "parts", loss, 2, **settings)
    assert equal(tensors(whole), tensors(trained(pipe, source, tmp_path / "parts", loss, 3, **settings)))


@pytest.mark.slow
def test_a_folded_student_says_so_and_refuses_guidance(paths: Record, pipe: Any, tmp_path: Path) -> None:
    pruned = sdgraph.apply(pipe.unet, [PruneBlocks("**.resnets.1")])
    tuned = trained(pipe, paths(), tmp_path / "run", Trajectory(), 1, student=pruned)
    loaded = sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "run" / "scheduler")
    whole = copy.copy(pipe)
    whole.scheduler = scheduler
    for unet in (tuned, loaded, sdgraph.apply(loaded, [])):
        assert unet.config["guidance_folded"] == {"scale": 3.0, "range": [0.0, 1.0]}
        assert unet.config["few_step_calls"] == 2
        whole.unet = unet
        call = {"num_inference_steps": 2, "output_type": "latent", **SIZE}
        whole(CAPTIONS[0], guidance_scale=1, **call)
        with pytest.raises(CallError, match="folded into its weights"):
            whole(CAPTIONS[0], guidance_scale=3, **call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calls": 3}, "3 calls do not divide the 4"),
        ({"calls": 8}, "8 calls do not divide the 4"),
        ({"points": "edge"}, "no points 'edge'"),
        ({"calls": 2000, "grid": 2000}, "more than the 1000 timesteps"),
    ],
)
def test_calls_that_are_refused(paths: Record, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TuningError, match=message):
        paths(**options)


def test_another_guidance_or_teacher_is_refused_and_nothing_is_lost(paths: Record, pipe: Any) -> None:
    before = path_of(paths(), 0)
    with pytest.raises(TuningError, match="another guidance"):
        paths(guidance=Guided(4.0))
    other = copy.copy(pipe)
    other.unet = copy.deepcopy(pipe.unet)
    other.unet.conv_out.bias.data += 1
    with pytest.raises(TuningError, match="another teacher"):
        paths(pipe=other)
    assert torch.equal(path_of(paths(), 0)[-1], before[-1])


def test_another_prediction_than_that_of_the_paths_is_refused(paths: Record, pipe: Any, tmp_path: Path) -> None:
    other = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    with pytest.raises(TuningError, match="paths are of a teacher with v_prediction"):
        trained(pipe, paths(), tmp_path / "run", Trajectory(), 1, scheduler=other)
    other = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, beta_end=0.02)
    with pytest.raises(TuningError, match="noise schedule is not that of the paths"):
        trained(pipe, paths(), tmp_path / "run", Trajectory(), 1, scheduler=other)


def test_teachers_without_a_path_are_refused(paths: Record, pipe: Any) -> None:
    other = copy.copy(pipe)
    other.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TuningError, match="no noise schedule"):
        paths(pipe=other)
    other.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, prediction_type="epsilon"
    )
    with pytest.raises(TuningError, match="last timestep has no signal"):
        paths(pipe=other)


def test_a_path_that_is_not_finite_is_refused(paths: Record, pipe: Any) -> None:
    other = copy.copy(pipe)
    other.unet = copy.deepcopy(pipe.unet)
    other.unet.conv_out.bias.data += torch.nan
    with pytest.raises(TuningError, match="path is not finite"):
        paths(pipe=other)


def test_captions_of_other_rows_are_refused(paths: Record, pipe: Any, data: Any) -> None:
    source = paths()
    with pytest.raises(TuningError, match="none is left out"):
        source.conditions([None])
    batch = batch_of(MoreCaptions(source, ["a cat"], pipe), pipe, random_conditioning=True)
    assert batch.own is not None
    assert not batch.own.all()
    with pytest.raises(TuningError, match="rows have other captions"):
        Trajectory().check(batch)
    plain = Batches(data, NoiseSchedule.of(pipe.scheduler), 2).batch(0, [0])
    for loss in (Trajectory(), Phased()):
        with pytest.raises(TuningError, match="no paths of a teacher"):
            loss.check(plain)


@pytest.mark.parametrize("options", [{"scale": -1.0}, {"scale": 3.0, "range": (0.5, 0.5)}, {"scale": float("nan")}])
def test_guidance_that_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TuningError):
        Guided(**options)
