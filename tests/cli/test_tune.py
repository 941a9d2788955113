"""`sdgraph tune`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from scenes import models
from scenes.pipeline import MODEL

import sdgraph
from sdgraph.atomic import owned
from sdgraph.cli import main, tune
from sdgraph.cli.configuration import read
from sdgraph.cli.sources import load_pipeline, load_unet
from sdgraph.cli.terminal import quiet_libraries
from sdgraph.errors import SpecError, TuningError

from ..models import answer, build, call_of
from ..photos import write_photos

PASSES = ["PruneBlocks('bk-sdm-base')"]
RUN: dict[str, Any] = {
    "pretrained_model_name_or_path": "model",
    "passes": PASSES,
    "train_data_dir": "photos",
    "resolution": 16,
    "output_dir": "tuned",
    "max_train_steps": 2,
    "train_batch_size": 2,
    "num_inference_steps": 2,
    "report_to": "none",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where the run is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(path: str = "tuning.json", without: str = "", **changes: Any) -> Path:
    """A configuration as a file."""
    run = {name: value for name, value in {**RUN, **changes}.items() if name != without}
    Path(path).write_text(json.dumps(run))
    return Path(path)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_toml_and_json_say_the_same_and_settings_can_be_changed() -> None:
    Path("tuning.toml").write_text(
        'pretrained_model_name_or_path = "model"\noutput_dir = "out"\nmax_train_steps = 10\nlearning_rate = 1\n'
        'passes = ["CleanUp", "PruneBlocks(\'mid_block\')"]\nprompts = "prompts.txt"\nuse_ema = true\n'
    )
    config, settings = read(Path("tuning.toml"), ["learning_rate=1e-4", "output_dir=other", "passes=['CleanUp']"])
    assert (settings.max_train_steps, settings.learning_rate, settings.use_ema) == (10, 1e-4, True)
    assert (config.output_dir, config.passes, config.prompts) == ("other", ("CleanUp",), "prompts.txt")
    assert read(written())[0].passes == tuple(PASSES)
    budget = "PruneToBudget(macs=0.7, analysis='analysis.json')"
    assert read(written(passes=[budget]))[0].passes == (budget,)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"learning_rat": 1e-4}, "no setting 'learning_rat'(.|\n)*did you mean 'learning_rate'"),
        ({"without": "output_dir"}, "output_dir is missing"),
        ({"student_calls": 2}, "the data are images, which have no paths"),
        ({"without": "train_data_dir", "prompts": "prompts.txt", "student_calls": 2}, "guidance_scale is missing"),
        ({"guidance_range": [0.2, 1.0]}, "guidance_range is read with student_calls only"),
        ({"without": "max_train_steps"}, "max_train_steps is missing"),
        ({"resolution": "large"}, "resolution is 'large'"),
        ({"prompts": "prompts.txt"}, "two kinds of data"),
        ({"without": "train_data_dir"}, "there is no data"),
        ({"max_train_steps": 0}, "max_train_steps is 0"),
        ({"stage_steps": 1, "pretrained_teacher_model": "other"}, "pretrained_teacher_model does not go with stage_st"),
        ({"stage_steps": 1, "resume_from_checkpoint": "checkpoint-1"}, "resume_from_checkpoint does not go with"),
        ({"progressive": True}, "no stages are trained"),
        ({"stage_processes": 2}, "no stages are trained"),
    ],
)
def test_wrong_configurations_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises((SpecError, TuningError), match=reason):
        read(written(**changes))


def test_files_that_are_no_configurations() -> None:
    Path("tuning.toml").write_text("a = [")
    Path("list.json").write_text("[]")
    for path, reason in (
        ("none.toml", "no file none.toml"),
        ("tuning.toml", "cannot be read"),
        ("list.json", "no object"),
    ):
        with pytest.raises(SpecError, match=reason.replace("no object", "not an object")):
            read(Path(path))
    with pytest.raises(SpecError, match=r"'learning_rate' is no change(.|\n)*NAME=VALUE"):
        read(written(), ["learning_rate"])


@pytest.mark.usefixtures("nothing_loads")
def test_passes_and_losses_are_read_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(written(passes=["PruneBlock('mid_block')"]))]) == 2
    assert "did you mean 'PruneBlocks'" in capsys.readouterr().err
    assert main(["tune", str(written(losses=["Outputs"]))]) == 2
    assert "did you mean 'Output'" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("model", "is pretrained_model_name_or_path, model"),
        ("model/unet", "lies within pretrained_model_name_or_path, model"),
        ("link/tuned", "lies within pretrained_model_name_or_path, model"),
        (".", r"\. contains pretrained_model_name_or_path, model"),
        ("teacher/new", "lies within pretrained_teacher_model, teacher"),
        ("photos", "is train_data_dir, photos"),
        ("photos/tuned", "lies within train_data_dir, photos"),
        ("data", "contains train_data_dir, data/photos"),
        ("encoded", "is data_cache, encoded"),
        ("encoded/tuned", "lies within data_cache, encoded"),
        ("other", "other holds a pipeline that no run has written"),
        ("settings", "settings contains settings/tuning.json, which the run would replace"),
    ],
)
def test_a_run_does_not_write_to_what_it_reads(out: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("model/unet", "teacher", "photos", "data/photos", "encoded", "other", "settings"):
        Path(folder).mkdir(parents=True)
        Path(folder, "model_index.json").write_text("{}")
    Path("link").symlink_to("model")
    changes: dict[str, Any] = {"output_dir": out, "data_cache": "encoded"}
    changes |= {"pretrained_teacher_model": "teacher"} if "teacher" in reason else {}
    changes |= {"train_data_dir": "data/photos"} if "data/photos" in reason else {}
    config = written("settings/tuning.json" if "settings" in out else "tuning.json", **changes)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert main(["tune", str(config)]) == 2
    assert re.search(reason, capsys.readouterr().err)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_one_command_at_a_time_writes_to_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(1) as other, owned(Path("tuned"), TuningError, "out"):
        assert other.submit(main, ["tune", str(written())]).result() == 2
    assert f"process {os.getpid()} on" in capsys.readouterr().err


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a pipeline with a tiny UNet."""
    folder, words = tmp_path_factory.mktemp("model"), models.tokenizer()
    unet = build("sd15", layers_per_block=2, cross_attention_dim=models.TEXT_WIDTH)
    models.pipeline(words, models.text_encoder(words), models.vae(), unet).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_dataset_is_read_with_broken_images_left_out_and_goes_on(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    contents = [path.read_bytes() for path in sorted(write_photos(Path("photos")).glob("*.png"))]
    columns = {"picture": [{"bytes": one, "path": None} for one in (*contents, b"nothing")], "text": ["a circle"] * 6}
    kinds = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, kinds).save_to_disk("saved")
    config = written(
        without="train_data_dir", pretrained_model_name_or_path=str(model), dataset_name="saved",
        image_column="picture", caption_column="text", skip_broken=True, losses=["Output"],
    )  # fmt: skip
    text = json.loads(config.read_text())
    del text["max_train_steps"]
    config.write_text(json.dumps(text))
    assert main(["tune", str(config), "--set", "num_train_epochs=1"]) == 0
    assert "3 steps in" in capsys.readouterr().out  # of five images, two at a time
    assert main(["tune", str(config), "--set", "max_train_steps=4"]) == 0
    told = capsys.readouterr()
    assert "4 steps in" in told.out
    assert re.search(r"tuning goes on from tuned.checkpoint-3, step 3 of 4\n", told.err)
    assert len(list(Path("tuned-images").glob("*.png"))) == 6


@pytest.mark.slow
def test_a_run_ends_with_a_pipeline_that_other_commands_load(
    model: Path, capsys: pytest.CaptureFixture[str], prompts: Path
) -> None:
    write_photos(Path("photos"))
    config = written(
        pretrained_model_name_or_path=str(model), use_ema=True, losses=["Output", "Features('stage')"],
        validation_prompts=["a red circle"], validation_steps=2, data_cache="encoded", checkpointing_steps=1,
    )  # fmt: skip
    assert main(["tune", str(config)]) == 0
    assert main(["tune", str(config), "--set", "max_train_steps=3"]) == 0  # goes on
    assert "3 steps" in capsys.readouterr().out
    names = {path.name for path in Path("tuned").iterdir()}
    assert {"model_index.json", "unet", "vae", "scheduler", "checkpoint-2", "checkpoint-3", "validation"} <= names
    images = sorted(path.name for path in Path("tuned/validation").iterdir())
    assert images == ["validation-000002.png", "validation-000003.png"]
    with quiet_libraries():
        tuned = load_pipeline("tuned", "float32", "cpu").unet
        untuned = sdgraph.apply(load_unet(str(model), "float32"), PASSES[0], verify=False)
        plain = diffusers.DiffusionPipeline.from_pretrained("tuned").unet
    assert isinstance(tuned, sdgraph.GraphUNet)
    assert type(plain) is diffusers.UNet2DConditionModel
    call = call_of(plain) | {"encoder_hidden_states": torch.randn(2, 5, plain.config.cross_attention_dim)}
    assert torch.equal(answer(plain, call), answer(tuned, call))
    assert tuned.state_dict().keys() == untuned.state_dict().keys()
    assert not torch.equal(tuned.state_dict()["conv_in.weight"], untuned.state_dict()["conv_in.weight"])
    assert main(["evaluate", str(model), "tuned", "--prompts", str(prompts), "--steps", "2"]) == 0
    # the next student is made from this one, and learns from the first teacher
    second = written(
        "second.json", pretrained_model_name_or_path="tuned", passes="PruneBlocks('mid_block')", output_dir="second",
        pretrained_teacher_model=str(model), data_cache="encoded",
    )  # fmt: skip
    assert main(["tune", str(second)]) == 0
    with quiet_libraries():
        applied = [str(a.one) for a in load_unet("second", "float32").graph.passes]
    assert applied == [*PASSES, "PruneBlocks('mid_block')"]


@pytest.mark.slow
def test_a_run_from_prompts_alone(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"pretrained_model_name_or_path": str(model), "prompts": str(prompts), "calls_per_prompt": 2}
    assert main(["tune", str(written(without="train_data_dir", losses=["Output"], **run))]) == 0
    assert list(Path("tuned/data").glob("rows-*.safetensors"))
    # the noise that was added is not known on trajectories
    run |= {"data_cache": "tuned/data", "output_dir": "other"}
    other = written(without="train_data_dir", losses=["Output", "Denoising"], **run)
    assert main(["tune", str(other)]) == 2
    assert "leave this loss out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_to_a_student_of_a_few_calls(model: Path, prompts: Path) -> None:
    few = {"prompts": str(prompts), "student_calls": 1, "guidance_scale": 3.0}
    main(["tune", str(written(without="train_data_dir", pretrained_model_name_or_path=str(model), **few))])
    with quiet_libraries():
        pipe, unet = load_pipeline("tuned", "float32", "cpu"), load_unet("tuned", "float32")
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert unet.config["few_step_calls"] == 1
    assert unet.config["guidance_folded"] == {"scale": 3.0, "range": [0.0, 1.0]}


@pytest.mark.slow
def test_a_run_from_images_with_captions_that_have_none(model: Path, prompts: Path) -> None:
    write_photos(Path("photos"))
    run = {"pretrained_model_name_or_path": str(model), "random_conditioning": True, "train_batch_size": 16}
    weights = []
    for folder, more in (("images", {}), ("more", {"prompts": str(prompts)})):
        assert main(["tune", str(written(output_dir=folder, **run, **more))]) == 0
        with quiet_libraries():
            unet = load_pipeline(folder, "float32", "cpu").unet
        weights.append(unet.state_dict()["conv_in.weight"])
    assert not torch.equal(*weights)


@pytest.mark.slow
def test_stages_are_trained_apart_and_assembled(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(Path("photos"))
    config = written(pretrained_model_name_or_path=str(model), stage_steps=1, max_train_steps=1)
    assert main(["tune", str(config)]) == 0
    assert capsys.readouterr().out.count("1 step in") == 3  # two stages, and the whole
    with quiet_libraries():
        tuned = load_pipeline("tuned", "float32", "cpu").unet
        stage = sdgraph.GraphUNet.from_pretrained("tuned/stage-1/unet")
        untuned = sdgraph.apply(load_unet(str(model), "float32"), PASSES, verify=False)
    assert tuned.graph.removed.keys() == untuned.graph.removed.keys()
    assert 0 < len(stage.graph.removed) < len(tuned.graph.removed)


IMAGES = """
import sys
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
images = pipe("a large red circle", num_inference_steps=2, generator=generator, output_type="pt").images
torch.save(images, sys.argv[2])
assert not any(name.split(".")[0] == "sdgraph" for name in sys.modules)
"""


@pytest.mark.slow
def test_diffusers_alone_makes_the_images_of_a_tuned_pipeline(tmp_path: Path) -> None:
    """In a process that has never seen sdgraph."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(MODEL)
    tuned = sdgraph.apply(pipe.unet, "PruneBlocks('bk-sdm-base')", verify=False)
    tune._save(pipe, tuned, tmp_path / "tuned")
    command = [sys.executable, "-W", "ignore", "-c", IMAGES, str(tmp_path / "tuned"), str(tmp_path / "images.pt")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, **threads})
    with torch.no_grad():
        pipe.unet = tuned
        pipe.set_progress_bar_config(disable=True)
        expected = pipe(
            "a large red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images
    assert torch.equal(torch.load(tmp_path / "images.pt"), expected)
