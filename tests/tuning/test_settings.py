"""Settings: every one does what its users mean, or is refused before anything is written."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import sdgraph
from sdgraph.cli.configuration import Configuration, known, read
from sdgraph.errors import ExtraError, SpecError, TuningError
from sdgraph.passes import Bypass, CleanUp, HoistInvariants, InheritFeatures, MECondConv, PruneBlocks
from sdgraph.schedules import Uniform
from sdgraph.tuning import (
    Batches,
    Denoising,
    Features,
    Guidance,
    NoiseSchedule,
    Output,
    Samples,
    Settings,
    Tensors,
    chain,
    incubate,
)
from sdgraph.tuning.noise_schedule import PREDICTIONS
from sdgraph.tuning.train_state import TrainState

from ..models import CROSS
from .conftest import Tune, equal, tensors

ANYTHING = (
    None, True, False, -1, 0, 1, 2, 3, 2**20, -1.0, -1e-9, 0.0, 0.1, 0.5, 1.0, 2.5, math.nan, math.inf, -math.inf, "",
    "1", "1e-4", "no", "none", "cosine", "cosines", "fp16", "fp8", "tensorbord", "wandb", (), [1], {"a": 1}, {"a": -1},
    object(), b"x", 1j, np.array([1, 2]), torch.zeros(2),
)  # fmt: skip


def count(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def decay(value: Any) -> bool:
    return number(value) and 0 <= value < 1


def switch(value: Any) -> bool:
    return type(value) is bool


def positive(value: Any) -> bool:
    return number(value) and value > 0


def not_negative(value: Any) -> bool:
    return number(value) and value >= 0


def factors(value: Any) -> bool:
    return isinstance(value, dict) and all(map(positive, value.values()))


# What is right on a CPU, by field, independent of the code.
RIGHT: dict[str, Callable[[Any], bool]] = {
    "max_train_steps": count,
    "num_train_epochs": lambda v: v is None or count(v),
    "train_batch_size": count,
    "gradient_accumulation_steps": count,
    "gradient_checkpointing": switch,
    "learning_rate": positive,
    "learning_rates": lambda v: v is None or factors(v),
    "lr_scheduler": lambda v: v == "cosine" if isinstance(v, str) else False,
    "lr_warmup_steps": lambda v: count(v, 0),
    "lr_num_cycles": count,
    "lr_power": positive,
    "step_rules": lambda v: isinstance(v, str) and v in ("1", "1e-4"),  # one factor to the end
    "adam_beta1": decay,
    "adam_beta2": decay,
    "adam_weight_decay": not_negative,
    "adam_epsilon": positive,
    "use_8bit_adam": lambda v: v is False,  # without CUDA
    "max_grad_norm": not_negative,
    "mixed_precision": lambda v: v is None or (isinstance(v, str) and v == "no"),
    "use_ema": switch,
    "ema_decay": decay,
    "proportion_empty_prompts": lambda v: v is None or decay(v),
    "snr_gamma": lambda v: v is None or positive(v),
    "noise_offset": not_negative,
    "random_conditioning": switch,
    "timestep_intervals": count,
    "guidance_pairs": switch,
    "seed": lambda v: count(v, 0) and v < 2**63,
    "checkpointing_steps": count,
    "checkpoints_total_limit": lambda v: v is None or count(v),
    "validation_steps": lambda v: v is None or count(v),
    "report_to": lambda v: isinstance(v, str) and v == "none",
}
READER = {
    "lr_warmup_steps": "linear",
    "lr_num_cycles": "cosine_with_restarts",
    "lr_power": "polynomial",
    "step_rules": "piecewise_constant",
}


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_values_of_any_kind_are_right_or_refused_by_the_name_of_the_setting(name: str) -> None:
    for value in ANYTHING:
        length = {} if name == "num_train_epochs" and count(value) else {"max_train_steps": 2**65}
        options = {**length, "report_to": "none", name: value}
        if name in READER:
            options["lr_scheduler"] = READER[name]
        if RIGHT[name](value):
            assert getattr(Settings.of(options), name) == value
            continue
        with pytest.raises(TuningError) as error:
            Settings.of(options)
        assert error.value.where == name, value
        assert error.value.hint


def test_numbers_of_numpy_and_pytorch_are_numbers() -> None:
    settings = Settings.of({
        "max_train_steps": np.int64(3), "learning_rate": torch.tensor(0.5), "seed": np.array(4),
        "use_ema": np.bool_(True), "ema_decay": np.float32(0.5), "report_to": np.str_("none"),
    })  # fmt: skip
    assert repr(settings) == repr(
        Settings(max_train_steps=3, learning_rate=0.5, seed=4, use_ema=True, ema_decay=0.5, report_to="none")
    )


@given(st.data())
@hypothesis_settings(derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_wrong_setting_is_refused_before_anything_is_written(tune: Tune, tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(RIGHT.keys() - {"max_train_steps"})))
    value = data.draw(st.sampled_from([v for v in ANYTHING if not RIGHT[name](v)]))
    with pytest.raises(TuningError):
        tune(**{"output_dir": tmp_path / "wrong", "lr_scheduler": READER.get(name, "constant"), name: value})
    with pytest.raises(TuningError):
        tune(
            output_dir=tmp_path / "wrong",
            max_train_steps=data.draw(st.sampled_from([v for v in ANYTHING if not count(v)])),
        )
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
@given(st.data())
@hypothesis_settings(
    derandomize=True, max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_right_settings_run(tune: Tune, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rates = data.draw(st.sampled_from(["constant", "constant_with_warmup", "linear", "cosine", "polynomial"]))
    draws = {
        "train_batch_size": st.integers(1, 3),
        "gradient_accumulation_steps": st.integers(1, 2),
        "gradient_checkpointing": st.booleans(),
        "learning_rate": st.floats(1e-6, 1e-2),
        "learning_rates": st.sampled_from([None, {"mid_block.**": 0.5}]),
        "lr_warmup_steps": st.just(0) if rates == "constant" else st.integers(0, 1),
        "adam_beta1": st.floats(0, 0.99),
        "adam_beta2": st.floats(0, 0.999),
        "adam_weight_decay": st.floats(0, 0.1),
        "adam_epsilon": st.floats(1e-9, 1e-3),
        "max_grad_norm": st.sampled_from([0, 0.5, 10.0]),
        "use_ema": st.booleans(),
        "ema_decay": st.floats(0, 0.999),
        "proportion_empty_prompts": st.none() | st.floats(0, 0.99),
        "snr_gamma": st.none() | st.floats(0.1, 20),
        "noise_offset": st.floats(0, 0.2),
        "random_conditioning": st.booleans(),
        "timestep_intervals": st.integers(1, 4),
        "seed": st.integers(0, 2**63 - 1),
        "checkpointing_steps": st.integers(1, 3),
        "checkpoints_total_limit": st.none() | st.integers(1, 3),
        "validation_steps": st.none() | st.integers(1, 3),
    }
    settings = {name: data.draw(draw) for name, draw in draws.items()}
    _, report = tune(
        max_train_steps=2, lr_scheduler=rates, output_dir=tmp_path_factory.mktemp("run") / "run", **settings
    )
    assert len(report.rows) == 2


# -- the learning rate -------------------------------------------------------------------------------------------------

SCHEDULES: tuple[dict[str, Any], ...] = (
    {"lr_scheduler": "constant"},
    {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3},
    {"lr_scheduler": "linear", "lr_warmup_steps": 2},
    {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
    {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2, "lr_warmup_steps": 1},
    {"lr_scheduler": "polynomial", "lr_power": 2.0, "lr_warmup_steps": 1},
    {"lr_scheduler": "piecewise_constant", "step_rules": "1:2,0.1:4,0.01"},
)


def rates_of_diffusers(steps: int, rate: float, lr_scheduler: str, **options: Any) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    names = {"lr_warmup_steps": "num_warmup_steps", "lr_num_cycles": "num_cycles", "lr_power": "power"}
    given = {"num_warmup_steps": 0} | {names.get(name, name): value for name, value in options.items()}
    schedule, rates = get_scheduler(lr_scheduler, optimizer, num_training_steps=steps, **given), []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["lr_scheduler"])
def test_the_learning_rate_is_that_of_diffusers_at_every_step(
    schedule: dict[str, Any], tune: Tune, tmp_path: Path
) -> None:
    """With gradients that are accumulated, and resumed in the middle, which continues the schedule."""
    expected = rates_of_diffusers(6, 2e-3, **schedule)
    options = {"learning_rate": 2e-3, "train_batch_size": 1, "losses": (Output(),), **schedule}
    options |= {"gradient_accumulation_steps": 2, "checkpointing_steps": 3}

    def stop(unet: sdgraph.GraphUNet, step: int) -> dict[str, Any]:
        if step == 3 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        tune(max_train_steps=6, output_dir=tmp_path / "run", validate=stop, **options)
    _, report = tune(max_train_steps=6, output_dir=tmp_path / "run", **options)
    assert list(report.column("learning_rate")) == pytest.approx(expected, abs=1e-9)


def test_factors_of_the_learning_rate_follow_the_polynomial_too(tune: Tune) -> None:
    _, report = tune(
        max_train_steps=4, learning_rates={"mid_block.**": 10}, lr_scheduler="polynomial", learning_rate=1e-5
    )
    expected = rates_of_diffusers(4, 1e-5, "polynomial")
    assert list(report.column("learning_rate")) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"lr_warmup_steps": 5}, "lr_warmup_steps"),  # "constant" has no warm-up
        ({"lr_scheduler": "piecewise_constant", "step_rules": "1", "lr_warmup_steps": 5}, "lr_warmup_steps"),
        ({"lr_num_cycles": 2, "lr_scheduler": "cosine"}, "lr_num_cycles"),
        ({"lr_power": 2, "lr_scheduler": "linear"}, "lr_power"),
        ({"step_rules": "1:2,0.1"}, "step_rules"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules"),
        ({"lr_scheduler": "polynomial", "learning_rate": 5e-8}, "learning_rate"),
        ({"lr_scheduler": "polynomial", "lr_warmup_steps": 9}, "lr_warmup_steps"),
        *(
            ({"lr_scheduler": "piecewise_constant", "step_rules": rules}, "step_rules")
            for rules in (
                "1:2",
                "1:2,",
                "2:1:1,1",
                "1:4,0.1:2,1",
                "1:2,0.1:2,1",
                "-1:2,1",
                "1:2.5,1",
                "nan",
                "1:0,1",
                "a",
            )
        ),
    ],
)
def test_schedules_that_would_leave_something_unread_are_refused(options: dict[str, Any], where: str) -> None:
    with pytest.raises(TuningError) as error:
        Settings(9, **options)
    assert error.value.where == where


# -- the length of a run -----------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_epochs_are_the_steps_that_diffusers_scripts_count(
    rows: int, batch: int, processes: int, parts: int, epochs: int
) -> None:
    of_a_process = math.ceil(math.ceil(rows / batch) / processes)  # as train_text_to_image.py has it
    expected = epochs * math.ceil(of_a_process / parts)
    settings = Settings(num_train_epochs=epochs)
    assert settings.counted(rows, batch * processes * parts).max_train_steps == expected
    assert Settings(expected).counted(rows, 1) == Settings(expected)


def test_epochs_read_all_rows_and_go_on_as_steps(tune: Tune, data: Tensors) -> None:
    read: list[int] = []

    class Counted(Tensors):
        def samples(self, rows: Any, generators: Any) -> Any:
            read.extend(rows)
            return super().samples(rows, generators)

    counted = Counted(data._latents, data._conditions, data._empty)
    _, report = tune(data=counted, max_train_steps=None, num_train_epochs=2, losses=(Output(),))
    assert len(report.rows) == 2 * 3  # of ten rows, four at a time
    assert set(read) == set(range(10))
    assert len(tune(data=counted, max_train_steps=7, losses=(Output(),))[1].rows) == 7
    _, pairs = tune(
        max_train_steps=None,
        num_train_epochs=1,
        guidance_pairs=True,
        losses=(Output(),),
        output_dir=report.output_dir / "pairs",
    )
    assert len(pairs.rows) == 5  # two of ten rows at a time


def test_a_run_has_one_length() -> None:
    for options in ({}, {"max_train_steps": 3, "num_train_epochs": 1}):
        with pytest.raises(TuningError) as error:
            Settings(**options)
        assert error.value.where == ("num_train_epochs" if options else "max_train_steps")
    with pytest.raises(TuningError, match="leaves 'polynomial' no step"):
        Settings(num_train_epochs=1, lr_scheduler="polynomial", lr_warmup_steps=3).counted(9, 3)


# -- what single settings mean -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_timesteps_as_diffusers_scripts_do(prediction: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction)
    timesteps = torch.tensor([0, 10, 300, 700, 999])
    snr = compute_snr(scheduler, timesteps)
    limited = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    expected = limited / snr if prediction == "epsilon" else limited / (snr + 1)
    torch.testing.assert_close(NoiseSchedule.of(scheduler).min_snr(timesteps, 5.0), expected, rtol=1e-4, atol=0)


def test_min_snr_is_finite_where_there_is_no_signal() -> None:
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    for prediction in PREDICTIONS:
        noise_schedule = NoiseSchedule(torch.cat([scheduler.alphas_cumprod[:-1], torch.zeros(1)]), prediction)
        assert torch.isfinite(noise_schedule.min_snr(torch.arange(1000), 5.0)).all()


def test_snr_gamma_is_that_of_all_losses_that_leave_it_out(tune: Tune, tmp_path: Path) -> None:
    runs = [
        tune(max_train_steps=2, output_dir=tmp_path / str(number), losses=losses, snr_gamma=gamma)[1]
        for number, (losses, gamma) in enumerate([
            ((Output(), Denoising(snr_gamma=2)), 5),
            ((Output(snr_gamma=5), Denoising(snr_gamma=2)), None),
            ((Output(), Denoising(snr_gamma=2)), None),
        ])
    ]  # fmt: skip
    found = [list(run.column("loss")) for run in runs]
    assert found[0] == found[1] != found[2]
    assert "Output(snr_gamma=5" in json.loads((tmp_path / "0" / "tuning.json").read_text())["losses"]
    with pytest.raises(TuningError, match="no loss takes it") as error:
        tune(losses=(Features("stage"), Output(snr_gamma=5)), snr_gamma=5, output_dir=tmp_path / "none")
    assert error.value.where == "snr_gamma"
    assert not (tmp_path / "none").exists()


def test_the_offset_of_the_noise_is_one_number_per_sample_and_channel(data: Tensors) -> None:
    noise_schedule, rows = NoiseSchedule.of(DDPMScheduler()), range(8)
    plain, offset = (Batches(data, noise_schedule, 8, noise_offset=o).batch(3, rows) for o in (0.0, 0.1))
    assert plain.noise is not None
    assert offset.noise is not None
    added = (offset.noise - plain.noise) / 0.1
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=0, atol=1e-5)
    assert 0.5 < float(added[:, :, 0, 0].std()) < 1.5
    assert len(added[:, :, 0, 0].unique()) == 32
    torch.testing.assert_close(offset.noisy, noise_schedule.noised(offset.clean, offset.noise, offset.timesteps))
    assert torch.equal(Batches(data, noise_schedule, 8, noise_offset=0.1).batch(3, [5]).noisy[0], offset.noisy[5])


def test_trajectories_have_no_noise_that_could_have_an_offset(tune: Tune, data: Tensors, tmp_path: Path) -> None:
    class Trajectories(Tensors):
        def samples(self, rows: Any, generators: Any) -> Samples:
            latents = super().samples(rows, generators).latents
            return Samples(latents, latents, torch.zeros(len(rows), dtype=torch.int64))

    with pytest.raises(TuningError, match="no noise is added") as error:
        tune(
            data=Trajectories(data._latents, data._conditions, data._empty),
            noise_offset=0.1,
            output_dir=tmp_path / "none",
        )
    assert error.value.where == "noise_offset"
    assert not (tmp_path / "none").exists()


class EightBit(torch.optim.AdamW):
    """AdamW as bitsandbytes has it: its state in further dicts, and with numbers of 8 bits."""

    def __init__(self, params: Any, lr: float, betas: Any, weight_decay: float, eps: float) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for parameter, entry in self.state.items():
            entry["state1"] = (entry["exp_avg"] * 100).to(torch.uint8).reshape(parameter.shape)
        return result

    def state_dict(self) -> dict[str, Any]:
        kept = super().state_dict()
        state = {
            number: {"step": entry["step"], "wrapped": {name: entry[name] for name in entry if name != "step"}}
            for number, entry in kept["state"].items()
        }
        return kept | {"state": state}


def test_the_optimizer_in_8_bits_is_that_of_bitsandbytes_and_resumes(
    tune: Tune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(TuningError, match="use_8bit_adam needs CUDA"):
        tune(use_8bit_adam=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ExtraError, match="8bit"):
        Settings.of({"max_train_steps": 1, "report_to": "none", "use_8bit_adam": True})
    monkeypatch.undo()
    package = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=EightBit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setattr("sdgraph.tuning.settings._check_8bit", lambda: None)
    settings = {"use_8bit_adam": True, "losses": (Output(),), "adam_beta1": 0.5}
    whole, _ = tune(max_train_steps=4, output_dir=tmp_path / "whole", **settings)
    tune(max_train_steps=2, output_dir=tmp_path / "parts", **settings)
    assert equal(tensors(whole), tensors(tune(max_train_steps=4, output_dir=tmp_path / "parts", **settings)[0]))
    kept = safetensors.torch.load_file(tmp_path / "parts" / "checkpoint-4" / "optimizer.safetensors")
    assert kept["0.state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["push_to_hub", "hub_token", "hub_model_id"])
def test_nothing_is_published_by_a_setting(name: str) -> None:
    with pytest.raises(TuningError, match=f"no option '{name}'(.|\n)*hf upload"):
        Settings.of({"max_train_steps": 1, name: True})


def test_every_setting_has_values_a_default_and_a_meaning() -> None:
    settings = {setting.name: setting for setting in known()}
    assert settings.keys() == {field.name for owner in (Configuration, Settings) for field in fields(owner)}
    assert all(setting.values and setting.meaning.endswith(".") for setting in settings.values())
    assert settings["learning_rate"][1:3] == ("a finite number above 0", "1e-05")
    assert [name for name in settings if not settings[name].default] == ["pretrained_model_name_or_path", "output_dir"]


def test_a_norm_of_zero_clips_nothing(tune: Tune, tmp_path: Path) -> None:
    found = [
        tensors(tune(max_train_steps=2, max_grad_norm=norm, output_dir=tmp_path / str(norm), losses=(Output(),))[0])
        for norm in (0, 1e9, 0.1)
    ]
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_no_limit_keeps_all_checkpoints(tune: Tune, tmp_path: Path) -> None:
    tune(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=None)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 4


def test_captions_are_left_out_by_default_where_they_can_be(tune: Tune, tmp_path: Path) -> None:
    latents, text = torch.randn(5, 4, 8, 8), {"encoder_hidden_states": torch.randn(5, 5, CROSS)}
    with_empty = Tensors(latents, text, {"encoder_hidden_states": torch.zeros(5, CROSS)})
    for number, (options, expected) in enumerate([
        ({"data": with_empty}, 0.1),
        ({"data": with_empty, "proportion_empty_prompts": 0}, 0),
        ({"data": with_empty, "guidance_pairs": True}, 0),
        ({"data": Tensors(latents, text)}, 0),
    ]):  # fmt: skip
        out = tmp_path / str(number)
        tune(max_train_steps=1, output_dir=out, train_batch_size=2, losses=(Output(),), **options)
        assert json.loads((out / "tuning.json").read_text())["settings"]["proportion_empty_prompts"] == expected


@pytest.mark.parametrize("precision", ["fp16", "fp8", "float16"])
def test_a_precision_that_the_machine_does_not_have_is_refused(
    precision: str, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TuningError, match="mixed_precision"):
        tune(mixed_precision=precision)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(TuningError, match="mixed_precision"):
        tune()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tracker", "reason"),
    [("wandb", "not installed"), ("tensorbord", "did you mean 'tensorboard'"), ("print", "one of")],
)
def test_a_tracker_that_is_not_there_is_refused(tracker: str, reason: str, tune: Tune, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=reason):
        tune(report_to=tracker)
    assert not (tmp_path / "run").exists()


# -- students ----------------------------------------------------------------------------------------------------------

SAME = (
    (CleanUp(),),
    (HoistInvariants(),),
    (InheritFeatures.deep_cache(2),),
    (Bypass("mid_block", Uniform(2)),),
    (CleanUp(), HoistInvariants(), InheritFeatures.deep_cache(3)),
    (),
)


@pytest.mark.parametrize("passes", SAME, ids=str)
def test_a_student_that_computes_what_its_teacher_computes_is_refused(
    passes: tuple[sdgraph.Pass, ...], tune: Tune, teacher: UNet2DConditionModel, tmp_path: Path
) -> None:
    with pytest.raises(TuningError, match="nothing to learn"):
        tune(student=sdgraph.apply(teacher, passes))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_new_parameters_and_other_weights_are_something_to_learn(
    tune: Tune, teacher: UNet2DConditionModel, tmp_path: Path
) -> None:
    experts = sdgraph.apply(teacher, [MECondConv("mid_block.resnets.0.conv1", donors="copies")])
    pruned = sdgraph.apply(teacher, [PruneBlocks("mid_block"), InheritFeatures.deep_cache(2)])
    for number, unet in enumerate((experts, pruned)):
        tuned, _ = tune(student=unet, max_train_steps=1, output_dir=tmp_path / str(number))
        assert not equal(tensors(tuned), tensors(unet))


# -- other arguments, and files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("student", "unet"), ("teacher", 3), ("losses", Output()), ("losses", ["Output"]), ("losses", 3),
        ("train", "mid_block"), ("train", [3]), ("validate", "images"), ("resume_from_checkpoint", True),
        ("output_dir", None),
        ("max_train_steps", 1.5), ("losses", []), ("train", []), ("output_dir", ""), ("data", "rows"), ("data", [1]),
    ],
)  # fmt: skip
def test_arguments_of_wrong_types_are_refused(argument: str, value: Any, tune: Tune, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=argument):
        tune(**{argument: value})
    assert not (tmp_path / "run").exists()


def test_losses_that_the_data_cannot_be_computed_with_are_refused_at_once(tune: Tune, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="no pairs of rows"):
        tune(losses=[Guidance()])
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_waits_where_fp16_leaves_a_step_out() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    state = TrainState(torch.nn.Module(), torch.nn.Module(), optimizer, rate, None)  # type: ignore[arg-type]
    for skipped, expected in ((False, 1 / 2), (True, 1 / 2), (False, 1 / 3)):
        optimizer.step_was_skipped = skipped  # type: ignore[attr-defined]  # as accelerate's optimizer says
        state.advance()
        assert rate.get_last_lr() == [expected]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("learning_rate = '1e-4'", "learning_rate is '1e-4'"),
        ("learning_rate = nan", "learning_rate is nan"),
        ("learning_rate = -1e-4", "learning_rate is -0.0001"),
        ("train_batch_size = 2.5", "train_batch_size is 2.5"),
        ("max_grad_norm = -1.0", "max_grad_norm is -1.0"),
        ("use_ema = 1", "use_ema is 1"),
        ("lr_scheduler = 'cosines'", "did you mean 'cosine'"),
        ("lr_schedular = 'cosine'", "did you mean 'lr_scheduler'"),
        ("report_to = 'wandb'", "not installed"),
        ("mixed_precision = 'fp16'", "does not train in"),
        ("snr_gamma = 0.0", r"snr_gamma is 0\.0"),
        ("push_to_hub = true", "hf upload"),
        ("center_crop = true", "center_crop is about images"),
        ("num_train_epochs = 2", "leave one of them out"),
        ("resolution = 0", "resolution is 0"),
        ("passes = [3]", r"passes is \[3\]"),
        ("guidance_scale = -1.0", "guidance_scale is -1.0"),
    ],
)
def test_a_file_and_the_command_line_are_read_as_strictly(line: str, reason: str, tmp_path: Path) -> None:
    run = "pretrained_model_name_or_path = 'm'\noutput_dir = 'o'\nmax_train_steps = 3\nprompts = 'p'\n"
    file = tmp_path / "tuning.toml"
    if "report_to" not in line:
        run += "report_to = 'none'\n"
    file.write_text(run + line)
    with pytest.raises((TuningError, SpecError), match=reason):
        read(file)
    file.write_text(run)
    with pytest.raises((TuningError, SpecError), match=reason):
        read(file, [line.replace(" ", "", 2)])


def test_images_without_guidance_need_no_empty_captions(tmp_path: Path) -> None:
    run = "pretrained_model_name_or_path = 'm'\noutput_dir = 'o'\nmax_train_steps = 3\nprompts = 'p'\n"
    run += "report_to = 'none'\n"
    for line, expected in (("", None), ("guidance_scale = 7.5", None), ("guidance_scale = 1.0", 0.0)):
        (tmp_path / "tuning.toml").write_text(run + line)
        assert read(tmp_path / "tuning.toml")[1].proportion_empty_prompts == expected


@pytest.mark.parametrize(
    ("wrong", "meant"), [("steps", "max_train_steps"), ("out", "output_dir"), ("learning_rat", "learning_rate")]
)
def test_an_unknown_name_is_refused_before_a_missing_argument(
    wrong: str, meant: str, student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet, data: Tensors
) -> None:
    for run in (sdgraph.tune, chain, incubate):
        with pytest.raises(TuningError, match=f"there is no option '{wrong}' of a training run") as error:
            run(student, teaching, data, **{wrong: 1})
        assert f"did you mean '{meant}'" in error.value.hint
