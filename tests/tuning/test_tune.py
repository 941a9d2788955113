"""The loop: what it changes, keeps, validates, logs and refuses. `test_plain_loop` compares its weights."""

from __future__ import annotations

import copy
import io
import json
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

import sdgraph
from sdgraph import errors
from sdgraph.passes import InheritFeatures, PruneBlocks
from sdgraph.tuning import (
    DEFAULT,
    AttentionMaps,
    Denoising,
    Features,
    Guidance,
    Loss,
    Output,
    Samples,
    Similarity,
    Tensors,
    TuningReport,
    Wavelet,
)
from sdgraph.tuning.losses import Comparison
from sdgraph.tuning.validation import figures_of, record

from ..models import CROSS, build, call_of
from .conftest import Tune, equal, tensors

# -- what a run does ---------------------------------------------------------------------------------------------------


def test_the_student_alone_changes(
    tune: Tune, student: sdgraph.GraphUNet, teacher: UNet2DConditionModel, tmp_path: Path
) -> None:
    before = tensors(student), tensors(teacher)
    tuned, report = tune(max_train_steps=5)

    loss = report.column("loss")
    assert list(report.column("step")) == list(range(1, 6))
    assert report.names[5:] == ("Output", "Features", "Denoising")
    terms = [report.column(name) for name in report.names[5:]]
    assert loss == pytest.approx(terms[0] + 10 * terms[1] + 0.01 * terms[2], rel=1e-4)
    assert equal(tensors(student), before[0])
    assert equal(tensors(teacher), before[1])
    assert not equal(tensors(tuned), before[0])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock",
        "checkpoint-5",
        "loss.csv",
        "loss.svg",
        "tuning.json",
        "unet",
    }


def test_the_result_is_a_pruned_unet_like_any_other(tune: Tune, teacher: UNet2DConditionModel, tmp_path: Path) -> None:
    tuned, _ = tune()
    call = call_of(teacher)
    expected = tuned(**call).sample

    loaded = sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "unet")
    assert torch.equal(loaded(**call).sample, expected)
    plain = tuned.to_diffusers()
    plain.save_pretrained(tmp_path / "plain")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(again(**call).sample, expected, rtol=1e-4, atol=1e-5)
    inheriting = sdgraph.apply(tuned, [InheritFeatures.deep_cache(interval=2)])
    assert torch.equal(inheriting(**call).sample, expected)


@pytest.mark.slow
def test_the_result_is_exported_and_inherits_on_onnx_runtime(
    tune: Tune, teacher: UNet2DConditionModel, tmp_path: Path
) -> None:
    tuned, _ = tune()
    exported = sdgraph.apply(tuned, [InheritFeatures.deep_cache(interval=2)])
    sdgraph.exporters.onnx.export(exported, tmp_path / "ort")  # compares all outputs with PyTorch
    unet = sdgraph.exporters.ort.ORTUNet.from_pretrained(tmp_path / "ort", provider="CPUExecutionProvider")
    call = call_of(teacher)
    torch.testing.assert_close(unet(**call).sample, tuned(**call).sample, rtol=1e-3, atol=1e-4)


def test_the_average_is_what_is_returned_and_kept(tune: Tune, tmp_path: Path) -> None:
    averaged, _ = tune(use_ema=True, ema_decay=0.5, max_train_steps=6)
    folder = tmp_path / "run" / "checkpoint-6"
    kept = sdgraph.GraphUNet.from_pretrained(folder / "unet_ema")
    last = sdgraph.GraphUNet.from_pretrained(folder / "unet")
    assert equal(tensors(averaged), tensors(kept))
    assert not equal(tensors(averaged), tensors(last))


def test_parameters_may_have_learning_rates_of_their_own(
    tune: Tune, student: sdgraph.GraphUNet, tmp_path: Path
) -> None:
    rates = {"mid_block.resnets.0.conv1.weight": 10, "mid_block.**": 1e-9}  # the first that matches counts
    tuned, report = tune(max_train_steps=1, learning_rates=rates, output_dir=tmp_path / "rates", adam_weight_decay=0)
    plain, _ = tune(max_train_steps=1, output_dir=tmp_path / "plain", adam_weight_decay=0)
    assert list(report.column("learning_rate")) == [2e-3]
    before, after, usual = tensors(student), tensors(tuned), tensors(plain)
    for name, factor in (("mid_block.resnets.0.conv1.weight", 10), ("mid_block.resnets.0.conv2.weight", 0)):
        step = usual[name] - before[name]
        torch.testing.assert_close(after[name] - before[name], factor * step, rtol=1e-3, atol=1e-6)
    assert torch.equal(after["conv_in.weight"], usual["conv_in.weight"])
    for wrong, complaint in (
        ({"**.rooting.*": 2}, "no parameter is named"),
        ({"conv_in.weigh": 2}, r"(?s)no parameter is named 'conv_in.weigh'.*did you mean 'conv_in.weight'"),
        ({"conv_in.weight": 0}, "learning_rates is {'conv_in.weight': 0}"),
    ):
        with pytest.raises(errors.TuningError, match=complaint):
            tune(output_dir=tmp_path / "wrong", learning_rates=wrong)


def test_pairs_are_half_without_captions(tune: Tune, tmp_path: Path) -> None:
    options = {"losses": (Output(), Guidance(3.0)), "guidance_pairs": True, "proportion_empty_prompts": 0.0}
    for wrong in ({"train_batch_size": 3}, {"proportion_empty_prompts": 0.1}):
        with pytest.raises(errors.TuningError, match="every second row is without its caption"):
            tune(output_dir=tmp_path / "wrong", **{**options, **wrong})


@pytest.mark.slow
def test_gradient_checkpointing_and_accumulation_change_nothing_that_matters(tune: Tune, tmp_path: Path) -> None:
    plain, _ = tune(output_dir=tmp_path / "plain")
    recomputed, _ = tune(output_dir=tmp_path / "recomputed", gradient_checkpointing=True)
    for name, weight in tensors(
        plain
    ).items():  # values that are used twice have their gradients added in another order
        torch.testing.assert_close(tensors(recomputed)[name], weight, rtol=1e-3, atol=1e-5)
    _, whole = tune(output_dir=tmp_path / "whole", max_train_steps=1)
    _, parts = tune(
        output_dir=tmp_path / "parts",
        max_train_steps=1,
        train_batch_size=2,
        gradient_accumulation_steps=2,
        losses=(Output(),),
    )
    _, once = tune(output_dir=tmp_path / "once", max_train_steps=1, losses=(Output(),))
    assert whole.column("Output")[0] == once.column("Output")[0]
    for name in ("Output", "gradient_norm"):
        assert parts.column(name)[0] == pytest.approx(once.column(name)[0], rel=1e-4)


def test_first_weights_of_adapters_follow_from_the_seed(
    teacher: UNet2DConditionModel, data: Tensors, tmp_path: Path
) -> None:
    narrow = sdgraph.apply(build("sd15", block_out_channels=(8, 16), norm_num_groups=4), [])
    curves = []
    for number in range(2):
        torch.rand(number)  # whatever was drawn before
        _, report = sdgraph.tune(
            narrow, teacher, data, scheduler=DDPMScheduler(), max_train_steps=1, output_dir=tmp_path / str(number),
            losses=(Features(("mid_block",)),), report_to="none", train_batch_size=4,
        )  # fmt: skip
        curves.append(list(report.column("loss")))
    assert curves[0] == curves[1]


def test_default_losses_leave_out_what_trajectories_do_not_have(tune: Tune, tmp_path: Path) -> None:
    class Trajectories(Tensors):
        def samples(self, rows: Any, generators: Any) -> Samples:
            latents = super().samples(rows, generators).latents
            return Samples(latents, 2 * latents, torch.full((len(rows),), 500))

    captions = {"encoder_hidden_states": torch.randn(3, 5, CROSS)}
    _, report = tune(data=Trajectories(torch.randn(3, 4, 8, 8), captions), max_train_steps=1)
    assert report.names[5:] == ("Output", "Features")
    with pytest.raises(errors.TuningError, match="no noise was added"):
        tune(data=Trajectories(torch.randn(3, 4, 8, 8), captions), losses=(Denoising(),), output_dir=tmp_path / "other")


def test_validation_sees_the_averaged_student_also_at_the_end(tune: Tune, tmp_path: Path) -> None:
    from PIL import Image

    seen: dict[int, dict[str, Tensor]] = {}

    def validate(unet: sdgraph.GraphUNet, step: int) -> dict[str, Any]:
        assert not unet.training
        seen[step] = tensors(unet)
        return {"error": 0.5, "sheet": Image.new("RGB", (4, 4))}

    tuned, _ = tune(max_train_steps=3, validate=validate, validation_steps=2, use_ema=True, ema_decay=0.9)
    assert list(seen) == [2, 3]
    assert equal(seen[3], tensors(tuned))
    assert [p.name for p in sorted((tmp_path / "run" / "validation").iterdir())] == [
        "sheet-000002.png",
        "sheet-000003.png",
    ]


@pytest.mark.parametrize(
    "results", [None, [1.0], {"a": "x"}, {"a": torch.zeros(2)}, {3: 1.0}, {"a/b": 1.0}, {"": 1.0}, {"x" * 300: 1.0}]
)
def test_results_of_a_validation_that_cannot_be_kept_are_refused(results: object) -> None:
    with pytest.raises(errors.TuningError, match="validate returns"):
        figures_of(results)


def test_all_numbers_of_a_validation_are_logged() -> None:
    figures = {"a": 1, "b": 2.5, "c": torch.tensor(3.0), "d": np.float32(4), "e": np.int64(5), "f": torch.tensor([6])}
    assert figures_of(figures) == {"a": 1, "b": 2.5, "c": 3, "d": 4, "e": 5, "f": 6}


def test_a_validation_does_not_change_what_is_trained(tune: Tune) -> None:
    def freeze(unet: sdgraph.GraphUNet, step: int) -> dict[str, float]:
        unet.requires_grad_(False)
        return {}

    with pytest.raises(errors.TuningError, match="has changed which weights"):
        tune(validate=freeze, validation_steps=1)


@dataclass(frozen=True)
class Returning(Loss):
    """A loss that returns what it should not."""

    kind: str = "nothing"

    def __call__(self, comparison: Comparison, values: Any) -> Any:
        error = (comparison.student - comparison.teacher).square().mean((1, 2, 3))
        wrong = {
            "nothing": None,
            "rows": error,
            "one row": error[:1],
            "number": 1.0,
            "no gradient": error.detach().mean(),
        }
        return wrong[self.kind]


def test_accumulation_by_accelerate_is_refused_before_a_folder_is_made(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(errors.TuningError, match="accelerate launch accumulates gradients"):
        tune()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["nothing", "rows", "one row", "number", "no gradient"])
def test_losses_that_return_no_term_are_refused(tune: Tune, kind: str) -> None:
    with pytest.raises(errors.TuningError, match=r"the loss returns|have no gradient"):
        tune(losses=[Returning(kind)])
    with pytest.raises(errors.TuningError, match="computes nothing"):
        tune(losses=[Loss()])


def test_figures_reach_tensorboard(tune: Tune, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, report = tune(report_to="tensorboard")
    (events,) = {path.parent for path in (tmp_path / "run" / "logs").rglob("events.out.*")}
    read = EventAccumulator(str(events)).Reload()
    assert [e.value for e in read.Scalars("loss")] == pytest.approx(list(report.column("loss")), rel=1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_images_of_a_validation_reach_tensorboard(tune: Tune, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))
    found = {"sheet": image, "grey": image.convert("L"), "psnr": 3.0}
    tune(report_to="tensorboard", max_train_steps=2, validation_steps=1, validate=lambda unet, step: found)
    (folder,) = {path.parent for path in (tmp_path / "run" / "logs").rglob("events*") if path.parent.name == "logs"}
    events = EventAccumulator(str(folder), {"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {"sheet", "grey"}
    seen = events.Images("sheet")
    assert [one.step for one in seen] == [1, 2]
    shown = Image.open(io.BytesIO(seen[0].encoded_image_string))
    assert np.array_equal(np.asarray(shown), np.asarray(image))


@pytest.mark.parametrize(("name", "listed"), [("wandb", True), ("swanlab", True), ("aim", False), ("clearml", False)])
def test_images_reach_trackers_in_the_form_that_accelerate_takes(name: str, listed: bool, tmp_path: Path) -> None:
    class Tracker:
        seen: dict[str, Any] | None = None

        def log_images(self, images: dict[str, Any], step: int) -> None:
            self.seen = images

    image, tracker, plain = Image.new("RGB", (2, 2)), Tracker(), types.SimpleNamespace(name="trackio")
    tracker.name = name  # type: ignore[attr-defined]
    accelerator = types.SimpleNamespace(trackers=[tracker, plain], log=lambda *_: None, wait_for_everyone=lambda: None)
    record({"sheet": image}, 3, tmp_path, accelerator)
    assert tracker.seen == {"sheet": [image] if listed else image}


@pytest.mark.parametrize(("count", "expected"), [(1, "3"), (4, "2.5"), (99, "1.02"), (100, "2 -> 1"), (300, "2 -> 1")])
def test_a_report_has_two_means_only_of_steps_that_differ(count: int, expected: str) -> None:
    losses = [3.0, 3.0, 2.0, 2.0][:count] if count < 5 else [2.0] * 50 + [1.0] * (count - 50)
    if count == 99:
        losses = [2.0, 2.0] + [1.0] * 97
    rows = tuple((float(i + 1), float(i), 0.1, 1.0, loss) for i, loss in enumerate(losses))
    text = str(TuningReport(Path("run"), ("step", "seconds", "learning_rate", "gradient_norm", "loss"), rows))
    assert text.splitlines()[-1].split("loss")[1].strip() == expected
    means = "means of its first and last 50 steps" if count >= 100 else "mean of all steps"
    assert text.splitlines()[1].strip() == f"{means}:"
    assert text.startswith(f"{count} step{'s' * (count > 1)} in")


def test_models_that_do_not_fit_are_refused(
    student: sdgraph.GraphUNet, teacher: UNet2DConditionModel, data: Tensors, tmp_path: Path
) -> None:
    def tune(student: sdgraph.GraphUNet, teacher: Any) -> None:
        sdgraph.tune(
            student,
            teacher,
            data,
            scheduler=DDPMScheduler(),
            max_train_steps=1,
            output_dir=tmp_path / "run",
            report_to="none",
        )

    with pytest.raises(errors.TuningError, match="nothing to learn"):
        tune(student, student)
    with pytest.raises(errors.TuningError, match="nothing to learn"):
        tune(sdgraph.apply(teacher, []), teacher)
    with pytest.raises(errors.TuningError, match="encoder_hidden_states has shape"):
        tune(student, build("sd15", cross_attention_dim=32))
    with pytest.raises(errors.TuningError, match="sample has shape"):
        tune(student, build("sd15", in_channels=9))
    with pytest.raises(errors.TuningError, match="the student predicts"):
        tune(student, build("sd15", out_channels=8))
    assert not (tmp_path / "run").exists()


def test_data_that_do_not_fit_are_refused(tune: Tune, tmp_path: Path) -> None:
    wrong = Tensors(torch.zeros(3, 4, 8, 8), {"encoder_hidden_states": torch.zeros(3, 5, CROSS + 1)})
    with pytest.raises(errors.CallError, match="encoder_hidden_states has shape"):
        tune(data=wrong)
    unread = {"encoder_hidden_states": torch.zeros(3, 5, CROSS), "text_embed": torch.zeros(3, 5)}
    with pytest.raises(errors.TuningError, match="no input 'text_embed'"):
        tune(data=Tensors(torch.zeros(3, 4, 8, 8), unread))
    with pytest.raises(errors.TuningError, match="data of type int are neither a source nor an iterable"):
        tune(data=3)
    with pytest.raises(errors.TuningError, match="did you mean 'learning_rate'"):
        tune(learning_rat=1e-3)
    assert not (tmp_path / "run" / "unet").exists()


class Exploding(Loss):
    """A loss that is not a number from the third step on."""

    calls = 0

    def __call__(self, comparison: Comparison, values: Any) -> Tensor:
        type(self).calls += 1
        error = (comparison.student - comparison.teacher).square().mean()
        return error * (torch.nan if type(self).calls > 2 else 1.0)


def test_a_loss_that_is_no_number_stops_with_the_last_good_state(tune: Tune, tmp_path: Path) -> None:
    Exploding.calls = 0
    with pytest.raises(errors.TuningError, match="Exploding of step 2 is not finite") as error:
        tune(losses=(Output(), Exploding(weight=0.5)))
    kept = sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "checkpoint-2" / "unet")
    assert all(torch.isfinite(value).all() for value in kept.state_dict().values())
    assert "checkpoint-2" in error.value.where
    assert json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())["step"] == 2


def test_a_student_that_could_not_be_saved_is_refused_before_it_learns(
    teacher: UNet2DConditionModel, data: Tensors, tmp_path: Path
) -> None:
    graph = sdgraph.trace(teacher)
    graph.bypass("mid_block")
    with pytest.raises(errors.ModeError, match="cannot be rebuilt"):
        sdgraph.tune(sdgraph.GraphUNet(graph), teacher, data, scheduler=DDPMScheduler(), max_train_steps=1,
                     output_dir=tmp_path / "run", report_to="none")  # fmt: skip
    assert not (tmp_path / "run" / "loss.csv").exists()


def test_another_precision_in_the_same_process_is_refused(tune: Tune) -> None:
    tune(max_train_steps=1)
    with pytest.raises(errors.TuningError, match="accelerate refuses: AcceleratorState has already"):
        tune(mixed_precision="bf16")


@pytest.mark.slow
def test_chained_students_and_several_passes(teacher: UNet2DConditionModel, data: Tensors, tmp_path: Path) -> None:
    """A student that was tuned is the teacher of a smaller one."""
    options: dict[str, Any] = {
        "scheduler": DDPMScheduler(),
        "max_train_steps": 2,
        "report_to": "none",
        "train_batch_size": 4,
    }
    small = sdgraph.apply(teacher, [PruneBlocks("bk-sdm-base")])
    first, _ = sdgraph.tune(small, teacher, data, output_dir=tmp_path / "first", **options)
    smaller = sdgraph.apply(first, [PruneBlocks("mid_block")])
    second, report = sdgraph.tune(
        smaller, first, data, output_dir=tmp_path / "second", losses=(Output(), Denoising()), **options
    )
    assert len(report.rows) == 2
    assert "mid_block" in second.graph.removed


def test_a_part_is_trained_in_any_layout(teacher: UNet2DConditionModel, data: Tensors, tmp_path: Path) -> None:
    """Torch's group norm would crash in the backward pass of the first resnet that is trained."""
    source = copy.deepcopy(teacher)
    source.to(memory_format=torch.channels_last)
    student = sdgraph.apply(source, [PruneBlocks("bk-sdm-base")])
    results = [
        sdgraph.tune(
            unet, source, data, scheduler=DDPMScheduler(), max_train_steps=2, output_dir=tmp_path / name,
            train=["down_blocks.0"],
            train_batch_size=4, report_to="none",
        )[0]
        for name, unet in (("last", student), ("first", sdgraph.apply(teacher, [PruneBlocks("bk-sdm-base")])))
    ]  # fmt: skip
    for (name, one), other in zip(results[0].named_parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
        assert one.stride() == other.stride(), name  # also of 1x1 kernels, which count as contiguous in both layouts


def test_accumulated_batches_are_one_large_batch(tune: Tune, student: sdgraph.GraphUNet, tmp_path: Path) -> None:
    losses = (*DEFAULT, AttentionMaps(), Similarity(group=2), Wavelet(), Guidance(3.0))
    options = {"losses": losses, "max_train_steps": 3, "guidance_pairs": True}
    whole, first = tune(output_dir=tmp_path / "whole", train_batch_size=8, **options)
    parts, second = tune(output_dir=tmp_path / "parts", train_batch_size=2, gradient_accumulation_steps=4, **options)
    for name in first.names[3:]:
        assert second.column(name) == pytest.approx(first.column(name), rel=1e-3), name
    far = torch.cat([(value - tensors(student)[n]).flatten() for n, value in tensors(whole).items()]).norm()
    off = torch.cat([(value - tensors(parts)[n]).flatten() for n, value in tensors(whole).items()]).norm()
    assert off < 0.01 * far


@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_models_in_half_precision_are_trained_in_float32(
    of_student: torch.dtype, of_teacher: torch.dtype, student: sdgraph.GraphUNet, teacher: UNet2DConditionModel,
    data: Tensors, tmp_path: Path,
) -> None:  # fmt: skip
    seen = []
    options = {
        "scheduler": DDPMScheduler(), "max_train_steps": 2, "output_dir": tmp_path / "run", "report_to": "none",
        "train_batch_size": 2,
        "checkpointing_steps": 1, "validate": lambda unet, _: seen.append(unet.dtype) or {}, "learning_rate": 1e-6,
    }  # fmt: skip
    cast = copy.deepcopy(student).to(of_student), copy.deepcopy(teacher).to(of_teacher)
    tuned, report = sdgraph.tune(*cast, data, **options)
    exact, expected = sdgraph.tune(student, teacher, data, **{**options, "output_dir": tmp_path / "exact"})
    assert report.column("loss") == pytest.approx(expected.column("loss"), rel=0.05)
    assert tuned.dtype == of_student
    assert seen == [of_student] * 2 + [torch.float32] * 2
    kept = sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "checkpoint-2" / "unet")
    moved = [tensors(kept)[name] - value.float() for name, value in tensors(cast[0]).items()]
    assert kept.dtype == torch.float32
    assert all(step.abs().sum() > 0 for step in moved)  # steps that half precision would round to nothing
    written = sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "unet", torch_dtype=of_student)
    assert equal(tensors(written), tensors(tuned))
    assert exact.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_data_of_any_precision_are_read(dtype: torch.dtype, tune: Tune, data: Tensors) -> None:
    cast = Tensors(data._latents.to(dtype), {n: c.to(dtype) for n, c in data._conditions.items()}, dict(data._empty))
    _, report = tune(data=cast, max_train_steps=1, proportion_empty_prompts=0.5)
    _, expected = tune(
        data=data, max_train_steps=1, proportion_empty_prompts=0.5, output_dir=report.output_dir.parent / "exact"
    )
    assert report.column("loss") == pytest.approx(expected.column("loss"), rel=0.02)


def test_members_of_a_switch_that_share_weights(
    student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet, tune: Tune
) -> None:
    """Tuning one leaves the other as it was, and the switch too; the switch itself is neither student nor teacher."""
    both = sdgraph.switch({"large": teaching, "small": student}, boundary_ratio=0.5, verify=False)
    large, small = both.members["large"], both.members["small"]
    assert small.conv_in.weight.data_ptr() == large.conv_in.weight.data_ptr()
    before = tensors(both)
    tuned, _ = tune(student=small, teacher=large, max_train_steps=1)
    assert equal(tensors(both), before)
    assert not equal(tensors(tuned), tensors(small))
    again = sdgraph.switch({"large": large, "small": tuned}, boundary_ratio=0.5, verify=False)
    assert not torch.equal(again.members["small"].conv_in.weight, again.members["large"].conv_in.weight)
    for role in ("student", "teacher"):
        with pytest.raises(errors.SdgraphError) as refused:
            tune(**{role: both}, max_train_steps=1)
        assert "SwitchUNet" in str(refused.value)
