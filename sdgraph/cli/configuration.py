"""The configuration of `sdgraph tune`: a file with the argument names of diffusers' training scripts."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SpecError, did_you_mean
from ..options import Count, Index, NotNegative, Share, Text, annotations_of, check, described
from ..text import from_json, read_text
from ..tuning.settings import ELSEWHERE, Settings

# What is read with one kind of data only.
IMAGES = ("center_crop", "random_flip", "background", "caption_column", "skip_broken", "dataloader_num_workers")
PROMPTS = ("calls_per_prompt",)
DATASET = ("dataset_config_name", "image_column")
KINDS = {
    **dict.fromkeys(IMAGES, "images"),
    **dict.fromkeys(PROMPTS, "prompts without images"),
    **dict.fromkeys(DATASET, "datasets"),
}


@dataclass(frozen=True)
class Configuration:
    """The models, data and validation of a training run. `sdgraph.tuning.Settings` are in the same file.

    Args:
        pretrained_model_name_or_path: folder of a diffusers pipeline, or its name on the hub.
        output_dir: the folder of the run, and of the tuned pipeline.
        variant: the variant of the pipeline's weights, such as "fp16".
        passes: the passes that make the student, as text; none if the pipeline's UNet is the student already.
        pretrained_teacher_model: folder of the pipeline or UNet to learn from; by default the pipeline's UNet, before
            the passes.
        losses: the terms to minimise, as text.
        learn_pruning: what to remove is learned in the first steps, as text, such as "LearnedPruning(1000, macs=0.7)".
        stage_steps: train the stages of the student apart for so many steps, each inside the teacher, before the whole.
        progressive: train a stage with all earlier stages in place.
        stage_processes: the number of stages that are trained at the same time.
        train_data_dir: a folder of images with captions.
        dataset_name: instead of such a folder, one that the library `datasets` has saved or can read, or the name of a
            dataset on the hub. Its images are written to the folder `data_cache`, or else `output_dir`, with "-images"
            after its name.
        dataset_config_name: the configuration of the dataset.
        image_column: the column of the dataset's images.
        prompts: a file with one prompt per line, instead of images; beside images, with random_conditioning, these are
            captions that have none.
        resolution: height and width of the images, in pixels; by default 512, and for prompts the pipeline's own.
        center_crop: cut out the centre of images instead of a random place.
        random_flip: mirror half of the images.
        background: the colour behind transparent places of images.
        caption_column: the column of the captions.
        skip_broken: leave out images that cannot be read; the log counts and names them.
        dataloader_num_workers: the number of processes that read and decode images; 0 does so in that of the run.
        data_cache: the folder to keep encoded data in; for prompts by default `data` in `output_dir`.
        data_cache_limit: the largest size of that folder, in bytes.
        num_inference_steps: the steps of the teacher's generations from prompts, and of validation.
        guidance_scale: the guidance of both; by default the pipeline's own.
        student_calls: the calls of a student that guidance is folded into, which divide num_inference_steps. It learns
            from whole generations from the prompts, `sdgraph.tuning.Paths`, and is validated with so many calls.
        guidance_range: the first and the last share of a generation between which such guidance acts.
        calls_per_prompt: the calls that are kept of a generation from a prompt.
        validation_prompts: prompts to generate from at every validation.
        resume_from_checkpoint: "latest", or a folder checkpoint-N.
    """

    pretrained_model_name_or_path: Text
    output_dir: Text
    variant: Text | None = None
    passes: str | tuple[str, ...] = ()
    pretrained_teacher_model: Text | None = None
    losses: tuple[str, ...] = ()
    learn_pruning: Text | None = None
    stage_steps: Index = 0
    progressive: bool = False
    stage_processes: Count = 1
    train_data_dir: Text | None = None
    dataset_name: Text | None = None
    dataset_config_name: Text | None = None
    image_column: Text = "image"
    prompts: Text | None = None
    resolution: Count | None = None
    center_crop: bool = False
    random_flip: bool = False
    background: Text = "white"
    caption_column: Text = "text"
    skip_broken: bool = False
    dataloader_num_workers: Index = 0
    data_cache: Text | None = None
    data_cache_limit: Count = 10**11
    num_inference_steps: Count = 25
    guidance_scale: NotNegative | None = None
    student_calls: Count | None = None
    guidance_range: tuple[Share, Share] = (0.0, 1.0)
    calls_per_prompt: Count = 4
    validation_prompts: tuple[str, ...] = ()
    resume_from_checkpoint: Text = "latest"

    def __post_init__(self) -> None:
        check(self, SpecError)

    @property
    def has_images(self) -> bool:
        """Whether the data are images with captions."""
        return self.train_data_dir is not None or self.dataset_name is not None

    @property
    def unpacked(self) -> Path:
        """The folder of the images of a dataset."""
        return Path(f"{Path(self.data_cache or self.output_dir)}-images")


class Setting(NamedTuple):
    """A name that a configuration may have.

    Args:
        name: the name.
        values: the values that it accepts, in words.
        default: its value where the file has none, as Python writes it; "" where the file must have one.
        meaning: a sentence or more.
    """

    name: str
    values: str
    default: str
    meaning: str


def known() -> list[Setting]:
    """Return all names that a configuration may have, as the code declares them."""
    found = []
    for owner in (Configuration, Settings):
        text, kinds = inspect.getdoc(owner) or "", annotations_of(owner)
        entries = re.findall(r"^    (\w+): (.+(?:\n {8,}.+)*)$", text.partition("Args:\n")[2], re.MULTILINE)
        meanings = {name: " ".join(meaning.split()) for name, meaning in entries}
        for field in fields(owner):
            default = "" if field.default is MISSING else repr(field.default)
            found.append(Setting(field.name, described(kinds[field.name]), default, meanings[field.name]))
    return found


def read(path: Path, changes: Sequence[str] = ()) -> tuple[Configuration, Settings]:
    """Read the configuration of a training run.

    Args:
        path: the file, `.toml` or `.json`.
        changes: "NAME=VALUE" with values as in TOML; text may do without quotes.
    Raises:
        SpecError: the file is missing or damaged, a name is unknown, or a value has the wrong type.
        TuningError: a value is impossible.
    """
    given = _file(path) | dict(map(_change, changes))
    of_run, of_loop = [field.name for field in fields(Configuration)], [field.name for field in fields(Settings)]
    for name in given:
        if name not in of_run and name not in of_loop:
            hint = (
                ELSEWHERE.get(name)
                or did_you_mean(name, [*of_run, *of_loop])
                or f"names: {', '.join([*of_run, *of_loop])}"
            )
            raise SpecError(f"there is no setting {name!r}", where=str(path), hint=hint)
    for field in [*fields(Configuration), *fields(Settings)]:
        if field.default is MISSING and field.name not in given:
            raise SpecError(f"{field.name} is missing", where=str(path), hint="`sdgraph tune --help` shows an example")
    settings = Settings.of({name: given[name] for name in given if name in of_loop})
    run = Configuration(**{name: given[name] for name in given if name in of_run})
    if run.guidance_scale is not None and run.guidance_scale <= 1:  # pipelines call the UNet without guidance then
        settings = settings.for_data(has_empty=False)
    if run.train_data_dir is not None and run.dataset_name is not None:
        raise SpecError("there are two sets of images", where=str(path), hint="name train_data_dir or dataset_name")
    if run.student_calls is not None and (run.has_images or run.guidance_scale is None):
        missing = "the data are images, which have no paths" if run.has_images else "guidance_scale is missing"
        raise SpecError(
            f"student_calls is {run.student_calls}, and {missing}",
            where=str(path),
            hint="name prompts alone, and the guidance_scale to fold in; 1 folds none in",
        )
    if run.student_calls is None and run.guidance_range != (0.0, 1.0):
        raise SpecError(
            "guidance_range is read with student_calls only", where=str(path), hint="leave it out, or set student_calls"
        )
    if not run.has_images and run.prompts is None:
        raise SpecError(
            "there is no data",
            where=str(path),
            hint="name train_data_dir, a folder of images with captions, or dataset_name, or prompts, a text file",
        )
    if run.has_images and run.prompts is not None and not settings.random_conditioning:
        raise SpecError(
            "there are two kinds of data; prompts beside images are read with random conditioning only",
            where=str(path),
            hint="name either train_data_dir or prompts, or set random_conditioning = true",
        )
    unread = {IMAGES: not run.has_images, PROMPTS: run.has_images, DATASET: run.dataset_name is None}
    for name in (name for names, idle in unread.items() for name in names if idle and name in given):
        raise SpecError(
            f"{name} is about {KINDS[name]}, and there are none",
            where=str(path),
            hint="leave it out",
        )
    if run.stage_steps and (run.pretrained_teacher_model is not None or run.resume_from_checkpoint != "latest"):
        name = "resume_from_checkpoint" if run.pretrained_teacher_model is None else "pretrained_teacher_model"
        raise SpecError(
            f"{name} does not go with stage_steps: stages are trained inside the UNet that they are made of",
            where=str(path),
            hint=f"leave {name} out; every stage goes on from its last checkpoint",
        )
    if run.stage_steps and run.learn_pruning is not None:
        raise SpecError(
            "learn_pruning does not go with stage_steps: stages are known before the first step",
            where=str(path),
            hint="leave one of them out",
        )
    if not run.stage_steps and (run.progressive or run.stage_processes != 1):
        raise SpecError(
            "progressive and stage_processes are about stages, and no stages are trained",
            where=str(path),
            hint="set stage_steps, the number of steps of a stage",
        )
    return run, settings


def _file(path: Path) -> dict[str, Any]:
    hint = "give a file .toml or .json with names and values, as the guide on tuning shows"
    try:
        text = read_text(path, SpecError, hint=hint)
        content = from_json(text) if path.suffix == ".json" else tomllib.loads(text)
    except SpecError:
        raise
    except (ValueError, RecursionError) as error:
        raise SpecError(f"the configuration cannot be read: {error}", where=str(path), hint=hint) from error
    if not isinstance(content, dict):
        raise SpecError("the configuration is not an object with names and values", where=str(path), hint=hint)
    return content


def _change(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise SpecError(f"{text!r} is no change", where="--set", hint="write NAME=VALUE, as in learning_rate=1e-4")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()
