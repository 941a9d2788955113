"""A run goes on only as the run that it was: whatever decides its result is refused by name if it has changed."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor

import sdgraph
from sdgraph.errors import SavedError, TuningError
from sdgraph.passes import PruneBlocks
from sdgraph.tuning import Images, Loss, NoiseSchedule, Output, Prompts, Tensors, chain, incubate
from sdgraph.tuning.identity import Identity

from ..models import CROSS, build
from ..photos import write_photos
from .conftest import Tune


def tensors(**changes: Tensor) -> Tensors:
    draw = torch.Generator().manual_seed(0)
    found = {"latents": torch.randn(4, 4, 8, 8, generator=draw), "text": torch.randn(4, 5, CROSS, generator=draw)}
    found = {**found, "empty": torch.zeros(5, CROSS), **changes}
    conditions, empty = ({"encoder_hidden_states": found[name]} for name in ("text", "empty"))
    return Tensors(found["latents"], conditions, empty)


def edited(tensor: Tensor, place: int = -1) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[place] += 1e-3
    return tensor


@dataclass(frozen=True)
class Held(Loss):
    """A loss with a tensor and a module."""

    target: Tensor
    layer: torch.nn.Module

    def __call__(self, comparison: Any, values: Any) -> Tensor:
        return (self.layer(comparison.student) - comparison.teacher).square().mean() + self.target.mean()


def held(target: float = 0.0, scale: float = 1.0) -> list[Loss]:
    layer = torch.nn.Conv2d(4, 4, 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(scale)
    return [Held(torch.full((3,), target), layer)]


def scaled_last_weight(unet: Any) -> Any:
    other = copy.deepcopy(unet)
    with torch.no_grad():
        other.conv_out.weight.view(-1)[-1] += 1e-3
    return other


def student(change: Callable[[Any], Any] = lambda unet: unet, passes: str = "PruneBlocks('bk-sdm-base')") -> Any:
    return change(sdgraph.apply(build("sd15", layers_per_block=2), passes, verify=False))


def teacher(passes: str = "") -> Any:
    return sdgraph.apply(build("sd15", layers_per_block=2), passes, verify=False)


FIRST = tensors()
CHANGES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "one number of one embedding": (
        lambda: {"data": tensors(text=edited(FIRST._conditions["encoder_hidden_states"]))},
        "another data: 1 of its 4 rows are gone or changed, and 1 are new",
    ),
    "one number of the latents": (lambda: {"data": tensors(latents=edited(FIRST._latents, 300))}, "another data: 1 of"),
    "the order of the rows": (lambda: {"data": tensors(latents=FIRST._latents.flip(0))}, "another data: 4 of"),
    "the empty caption": (lambda: {"data": tensors(empty=torch.ones(5, CROSS))}, "another empty caption of the data"),
    "the prediction type": (
        lambda: {"scheduler": DDPMScheduler(prediction_type="v_prediction")},
        "another prediction type: 'epsilon' then, 'v_prediction' now",
    ),
    "the betas": (lambda: {"scheduler": DDPMScheduler(beta_end=0.012)}, "another noise schedule"),
    "zero terminal SNR": (lambda: {"scheduler": DDPMScheduler(rescale_betas_zero_snr=True)}, "another noise schedule"),
    "the number of timesteps": (lambda: {"scheduler": DDPMScheduler(999)}, "another noise schedule"),
    "the student's last weight": (lambda: {"student": student(scaled_last_weight)}, "another student$"),
    "the student's passes": (
        lambda: {"student": student(passes="PruneBlocks('mid_block')")},
        r"another student's passes: \"PruneBlocks\('bk-sdm-base'\)\" then",
    ),
    "the teacher's last weight": (lambda: {"teacher": scaled_last_weight(teacher())}, "another teacher$"),
    "the teacher's passes": (
        lambda: {"teacher": teacher("PruneBlocks('up_blocks.1.resnets.2')")},
        "another teacher's passes: 'none' then",
    ),
    "a loss": (lambda: {"losses": [Output()]}, "another losses: 'Held"),
    "the weight of a loss": (
        lambda: {"losses": [Held(held()[0].target, held()[0].layer, weight=2.0)]},
        "another losses",
    ),
    "a tensor of a loss": (lambda: {"losses": held(target=1.0)}, "another losses"),
    "a module of a loss": (lambda: {"losses": held(scale=2.0)}, "another losses"),
    "what is trained": (lambda: {"train": ["conv_out"]}, r"another train: 'all' then, 'conv_out' now"),
    "the batch": (lambda: {"batch": 1}, "another batch: '2' then, '1' now"),
    "the precision": (lambda: {"precision": "bf16"}, "another mixed precision: 'no' then, 'bf16' now"),
    "the dtype": (lambda: {"student": models()[0].half()}, "another dtype: 'student float32, .* now"),
}
SAME: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "another class of the same schedule": lambda: {"scheduler": DDIMScheduler()},
    "a copy of the student": lambda: {"student": student(copy.deepcopy)},
    "diffusers' own teacher": lambda: {"teacher": sdgraph.apply(build("sd15", layers_per_block=2), (), verify=False)},
}


def models() -> tuple[Any, Any]:
    return student(), teacher()


@functools.cache
def first() -> tuple[Any, Any]:
    return models()


def identity(**changes: Any) -> Identity:
    given = {"student": first()[0], "teacher": first()[1], "data": tensors(), "losses": held(), **changes}
    rest = {"scheduler": DDPMScheduler(), "train": None, "batch": 2, "precision": "no", **given}
    noise_schedule = NoiseSchedule.of(rest["scheduler"])
    names = ("losses", "train", "batch", "precision")
    return Identity.of(rest["student"], rest["teacher"], rest["data"], noise_schedule, *(rest[name] for name in names))


@pytest.mark.law("A run is not resumed with a setting that changes its result.")
@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_the_result_is_refused_by_name(name: str) -> None:
    changed, reason = CHANGES[name]
    with pytest.raises(TuningError, match=f"(?m){reason}"):
        identity(**changed()).check(identity(), Path("checkpoint-1"))


@pytest.mark.parametrize("name", SAME)
def test_the_same_run_goes_on(name: str) -> None:
    assert identity(**SAME[name]()).check(identity(), Path("checkpoint-1")) == {}


@pytest.mark.slow
def test_a_run_goes_on_with_other_settings_that_decide_nothing_and_tells_of_versions(
    tune: Tune, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tune(max_train_steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for changes in (
        {"scheduler": DDPMScheduler(beta_end=0.012)},
        {"scheduler": DDPMScheduler(prediction_type="sample")},
        {"seed": 1},
    ):
        with pytest.raises(TuningError, match="the checkpoint"):
            tune(max_train_steps=3, **changes)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    record = tmp_path / "run" / "checkpoint-2" / "state.json"
    record.write_text(record.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.0"'))
    with caplog.at_level(logging.WARNING, "sdgraph"):
        tune(
            max_train_steps=3,
            checkpointing_steps=1,
            checkpoints_total_limit=1,
            validation_steps=1,
            mixed_precision="no",
        )
    assert f"torch 2.0 then, {torch.__version__} now" in caplog.text


# -- data that are repaired -------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", 5)


@pytest.fixture
def on_photos(pipe: Any, photos: Path, tmp_path: Path) -> Callable[..., Any]:
    """Tune on the photos, with a cache."""
    pruned = sdgraph.apply(pipe.unet, [PruneBlocks("bk-sdm-base")], verify=False)

    def start(steps: int, **options: Any) -> Any:
        data = Images(photos, pipe, resolution=16, cache=tmp_path / "cache", **options)
        given = {"losses": (Output(),), "train_batch_size": 1, "report_to": "none"}
        return sdgraph.tune(
            pruned,
            pipe.unet,
            data,
            scheduler=pipe.scheduler,
            max_train_steps=steps,
            output_dir=tmp_path / "run",
            **given,
        )

    return start


def remove(photos: Path) -> None:
    lines = (photos / "metadata.jsonl").read_text().splitlines(keepends=True)
    (photos / "metadata.jsonl").write_text("".join(lines[:2] + lines[3:]))
    (photos / "2.png").unlink()


def repair(photos: Path) -> None:
    content = bytearray((photos / "3.png").read_bytes())
    shutil.copy(photos / "4.png", photos / "3.png")
    assert (photos / "3.png").read_bytes() != content


def add(photos: Path) -> None:
    shutil.copy(photos / "3.png", photos / "7.png")
    with (photos / "metadata.jsonl").open("a") as lines:
        lines.write('{"file_name": "7.png", "text": "a new circle"}\n')


def caption(photos: Path) -> None:
    (photos / "metadata.jsonl").write_text((photos / "metadata.jsonl").read_text().replace("red", "rad"))


@pytest.mark.parametrize(("change", "encoded"), [(remove, 0), (repair, 1), (add, 1), (caption, 2)])
def test_changed_images_alone_are_encoded_anew(
    change: Callable[[Path], None],
    encoded: int,
    photos: Path,
    pipe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def images() -> Images:
        return Images(photos, pipe, resolution=16, cache=tmp_path / "cache")

    before = images()
    change(photos)
    seen: list[int] = []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: (seen.append(len(x)), encode(x))[1])
    after = images()
    assert sum(seen) == encoded
    assert after.fingerprint() != before.fingerprint()
    monkeypatch.undo()
    places = {key: row for row, key in enumerate(before.contents.rows)}
    for row, key in enumerate(after.contents.rows):
        if key in places:
            assert torch.equal(after._kept.rows([row])["latents"], before._kept.rows([places[key]])["latents"])


@pytest.mark.slow
def test_a_run_goes_on_with_all_other_images(
    photos: Path, on_photos: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    on_photos(2)
    for change in (repair, remove, add):
        change(photos)
    for steps, told in ((4, "since step 2: of 5 rows 2 are gone or changed, and 2 are new"), (5, "")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "sdgraph"):
            _, report = on_photos(steps)
        assert told in caplog.text
        assert bool(told) == ("rows" in caplog.text)  # the next checkpoint knows the new ones
        assert len(report.rows) == steps
    assert json.loads((report.output_dir / "tuning.json").read_text())["changes of the data"] == [
        {"step": 2, "gone": 2, "new": 2}
    ]


def test_the_order_of_rows_is_told_and_most_rows_have_to_be_those_of_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved = Identity({}, tuple("abcde"))
    with caplog.at_level(logging.WARNING, "sdgraph"):
        assert Identity({}, tuple("edcba")).check(saved, Path("checkpoint-7")) == {"gone": 0, "new": 0}
        assert Identity({}, tuple("abcxyz")).check(saved, Path("checkpoint-7")) == {"gone": 2, "new": 3}
        assert Identity({}, tuple("abcdee")).check(saved, Path("checkpoint-7")) == {"gone": 0, "new": 1}  # twice now
    assert "since step 7: of 5 rows 0 are gone or changed, and 0 are new; their order is another" in caplog.text
    with pytest.raises(TuningError, match="3 of its 5 rows are gone"):
        Identity({}, tuple("abxyz")).check(saved, Path("checkpoint-7"))


def test_prompts_come_and_go_and_keep_their_trajectories(pipe: Any, tmp_path: Path) -> None:
    def source(*prompts: str) -> Prompts:
        call = {"num_inference_steps": 2, "calls_per_prompt": 1, "height": 16, "width": 16}
        return Prompts(prompts, pipe, cache=tmp_path / "cache", **call)

    first = source("a red circle", "a blue square", "a red circle")
    second = source("a green star", "a red circle", "a blue square")
    rows = [one.samples(range(3), [None] * 3).latents for one in (first, second)]  # type: ignore[list-item]
    assert torch.equal(rows[0][0], rows[1][1])
    assert torch.equal(rows[0][1], rows[1][2])
    assert not torch.equal(rows[0][0], rows[0][2])  # a prompt that occurs twice has two trajectories
    own = pipe.unet
    pipe.unet = sdgraph.apply(own, "InheritFeatures.deep_cache(2)", verify=False)
    try:
        with pytest.raises(TuningError, match="another teacher"):
            source("a red circle")
    finally:
        pipe.unet = own


# -- steps before an error --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("error", [TuningError("unreadable"), KeyboardInterrupt()])
def test_steps_before_an_error_are_kept(tune: Tune, data: Tensors, tmp_path: Path, error: BaseException) -> None:
    whole, _ = tune(output_dir=tmp_path / "whole", max_train_steps=6)

    class Failing(Tensors):
        reads = 0

        def samples(self, rows: Any, generators: Any) -> Any:
            self.reads += 1
            if self.reads > 4:  # the first is a look at the data
                raise error
            return super().samples(rows, generators)

    failing = Failing(data._latents, data._conditions, data._empty)
    with pytest.raises(type(error)):
        tune(data=failing, max_train_steps=6)
    steps = (tmp_path / "run" / "loss.csv").read_text().count("\n") - 1
    assert steps > 0
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    resumed, _ = tune(max_train_steps=6)
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))


def test_half_a_step_is_not_kept(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.AdamW.step

    def failing(self: Any, *args: Any, **options: Any) -> Any:
        step(self, *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        tune()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


# -- the folder of a run ----------------------------------------------------------------------------------------------


REFUSED = r"(is|lies within|contains) the (model|folder of|cache)"


def test_a_run_does_not_write_to_what_it_reads(
    pipe: Any, photos: Path, tmp_path: Path, teaching: sdgraph.GraphUNet, data: Tensors
) -> None:
    cached = Images(photos, pipe, resolution=16, cache=tmp_path / "cache")
    build("sd15", layers_per_block=2).save_pretrained(tmp_path / "model" / "unet")
    teaching.save_pretrained(tmp_path / "traced")
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "model", subfolder="unet")
    traced = sdgraph.GraphUNet.from_pretrained(tmp_path / "traced")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for unet, source, place in (
        (pipe.unet, cached, "photos"),
        (pipe.unet, cached, "photos/run"),
        (pipe.unet, cached, "cache"),
        (pipe.unet, cached, "cache/run"),
        (pipe.unet, cached, "."),
        (plain, data, "model"),
        (plain, data, "model/unet"),
        (traced, data, "traced"),
        (traced, data, "traced/run"),
    ):
        options: dict[str, Any] = {"scheduler": DDPMScheduler(), "max_train_steps": 1, "output_dir": tmp_path / place}
        with pytest.raises(TuningError, match=REFUSED):
            sdgraph.tune(first()[0], unet, source, **options)
    with pytest.raises(TuningError, match=REFUSED):
        chain(traced, ["CleanUp"], data, **options)
    with pytest.raises(TuningError, match=REFUSED):
        incubate(traced, ["PruneBlocks('mid_block')"], data, stage_steps=1, **options)
    with pytest.raises(SavedError, match="a model that sdgraph has not saved"):
        first()[0].save_pretrained(tmp_path / "model" / "unet")
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    with pytest.raises(TuningError, match="holds a model that no run"):
        sdgraph.tune(first()[0], traced, data, **{**options, "output_dir": tmp_path / "other"})
    shutil.rmtree(tmp_path / "other")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(tune: Tune) -> None:
    refused: list[str] = []

    def second(*_: Any) -> dict[str, float]:
        with ThreadPoolExecutor(1) as other, pytest.raises(TuningError, match="is writing to") as found:
            other.submit(tune, max_train_steps=9).result()
        refused.append(str(found.value))
        return {}

    tune(validate=second)
    assert len(refused) == 1
    assert f"process {os.getpid()} on" in refused[0]
    tune(max_train_steps=5)


# -- other processes --------------------------------------------------------------------------------------------------

TELL = """
from dataclasses import dataclass
import torch
import sdgraph
from diffusers import DDIMScheduler
from sdgraph.tuning import Loss, NoiseSchedule, Tensors
from sdgraph.tuning.identity import Identity
from tests.models import CROSS, build


@dataclass(frozen=True)
class Chosen(Loss):
    names: frozenset = frozenset({"a", "b", "c", "d"})
    more: dict = None
    call: object = None

    def __call__(self, comparison, values):
        return comparison.student.mean()


unet = build("sd15", layers_per_block=2)
passes = ["PruneBlocks('bk-sdm-base')", "InheritFeatures.deep_cache(2)", "HoistInvariants"]
student = sdgraph.apply(unet, passes, verify=False)
source = Tensors(torch.ones(4, 4, 8, 8), {"encoder_hidden_states": torch.ones(4, 5, CROSS)})
losses = [Chosen(frozenset("abcdefgh"), more={"x": {"e", "f", "g"}}, call=object())]
teacher = sdgraph.apply(unet, verify=False)
found = Identity.of(student, teacher, source, NoiseSchedule.of(DDIMScheduler()), losses, None, 1, "no")
print(found.parts, found.rows)
"""


def test_a_run_is_the_same_in_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    """Sets of texts have another order in every process, and objects have another place."""
    exec(compile(TELL, "<tell>", "exec"), {"__name__": "__main__"})
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    other = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TELL],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
    )  # fmt: skip
    assert other.stdout == capsys.readouterr().out
