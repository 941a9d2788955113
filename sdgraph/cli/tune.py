"""Train a UNet that passes have changed to predict what its teacher predicts.

  sdgraph tune tuning.toml
  accelerate launch -m sdgraph tune tuning.toml             # several GPUs

CONFIG is a TOML or JSON file with the argument names of diffusers' training scripts:

  pretrained_model_name_or_path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
  passes = ["PruneBlocks('bk-sdm-base')"]
  train_data_dir = "photos"         # images with captions; or prompts = "prompts.txt", without images
  output_dir = "tuned"
  max_train_steps = 5000
  learning_rate = 5e-5
  losses = ["Output", "Features('stage', weight=10)", "Denoising(weight=0.01)"]

All settings are listed by `sdgraph tune --settings`. Ctrl-C and SIGTERM keep the steps so far, and say how many.
The same command goes on from the last checkpoint. At the end `output_dir` is a diffusers pipeline with the tuned UNet,
which all commands load.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SpecError
from .arguments import add_imports, add_threads
from .plans import read_passes
from .sources import load_pipeline, load_unet, read_prompts

WRITTEN = ("loss.csv", "loss.svg", "model_index.json", "tuning.json")  # files of a run in its folder
MARKS = ("loss.csv", "tuning.json", "whole")  # by which a folder is known to be that of a run

if TYPE_CHECKING:
    from ..runtime.unet import GraphUNet
    from ..tuning.incubation import IncubationReport
    from ..tuning.report import TuningReport
    from ..tuning.sources import Source
    from .configuration import Configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML or JSON file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="another value than the file has, such as learning_rate=1e-4; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--settings", action=_List, nargs=0, help="list all settings with their values and defaults, and exit"
    )
    add_threads(parser, "PyTorch")
    add_imports(parser)


class _List(argparse.Action):
    """An option that lists all settings instead of running the command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .configuration import known

        for setting in known():
            default = f"default {setting.default}" if setting.default else "required"
            print(f"{setting.name}: {setting.values}; {default}")
            print(textwrap.fill(setting.meaning, 110, initial_indent="    ", subsequent_indent="    "))
        parser.exit()


def run(args: argparse.Namespace) -> None:
    import torch

    from ..extra import imported
    from ..runtime.apply import apply
    from ..spec import read as read_spec
    from ..tuning.incubation import incubate
    from ..tuning.learned_pruning import LearnedPruning
    from ..tuning.losses import Loss
    from ..tuning.processes import alone
    from ..tuning.sources import Paths
    from ..tuning.tune import tune
    from ..tuning.validation import ValidationImages
    from .configuration import read

    config, settings = read(args.config, args.set)
    check_output(config, args.config)
    passes = read_passes(config.passes).passes
    losses: Sequence[Any] | None = [read_spec(text, Loss) for text in config.losses] or None
    learned = None if config.learn_pruning is None else read_spec(config.learn_pruning, LearnedPruning)
    process = imported("accelerate", "tuning").PartialState(cpu=not torch.accelerator.is_available())
    with alone(Path(config.output_dir)):
        pipe = load_pipeline(config.pretrained_model_name_or_path, "float32", process.device, config.variant)
        source = apply(pipe.unet, ())
        student = apply(source, passes)  # before the data are encoded, which takes long
        if config.pretrained_teacher_model is not None:
            pipe.unet = load_unet(config.pretrained_teacher_model, "float32").to(process.device)
        folded = config.student_calls is not None
        generation: dict[str, Any] = {
            "num_inference_steps": config.student_calls if folded else config.num_inference_steps,
            "guidance_scale": 1.0 if folded else config.guidance_scale,
        }
        options: dict[str, Any] = {
            "scheduler": pipe.scheduler,
            "max_train_steps": settings.max_train_steps,
            "output_dir": config.output_dir,
            "losses": losses,
            "validate": ValidationImages(pipe, config.validation_prompts, **generation)
            if config.validation_prompts
            else None,
            **{name: value for name, value in asdict(settings).items() if name != "max_train_steps"},
        }
        data = _data(config, pipe, settings.seed, any(loss.reads_following for loss in losses or ()))
        if isinstance(data, Paths):
            pipe.scheduler = data.scheduler  # of validation, and of the pipeline that is saved
        tuned: GraphUNet
        report: TuningReport | IncubationReport
        if config.stage_steps:
            options |= {"progressive": config.progressive, "processes": config.stage_processes}
            stages = [stage for p in passes for stage in p.stages(source.graph)]
            tuned, report = incubate(source, stages, data, stage_steps=config.stage_steps, **options)
        else:
            teacher = source if config.pretrained_teacher_model is None else pipe.unet
            options |= {"resume_from_checkpoint": config.resume_from_checkpoint, "learn_pruning": learned}
            tuned, report = tune(student, teacher, data, **options)
        if process.is_main_process:
            _save(pipe, tuned, Path(config.output_dir))
            print(f"{report}\nsaved in {config.output_dir}")
    process.destroy_process_group()


def check_output(config: Configuration, file: Path) -> None:
    """Refuse an `output_dir` that is read from or holds another pipeline, before anything is loaded.

    Args:
        config: the configuration.
        file: its file.
    Raises:
        SpecError: the folder is one of these.
    """
    from ..atomic import check_apart, lies_in
    from ..tuning.checks import DATA

    out, hint = Path(config.output_dir), "name a new folder"
    names = ("pretrained_model_name_or_path", "pretrained_teacher_model", "train_data_dir", "dataset_name")
    paths = [(name, Path(getattr(config, name) or "").expanduser()) for name in names if getattr(config, name)]
    if config.data_cache is not None and not lies_in(Path(config.data_cache), out / DATA):
        paths.append(("data_cache", Path(config.data_cache)))
    check_apart(out, [(name, path) for name, path in paths if path.exists()], SpecError, "output_dir")
    for path in (file, *([] if config.prompts is None else [Path(config.prompts)])):
        if path.name in WRITTEN and lies_in(path, out):
            raise SpecError(f"{out} contains {path}, which the run would replace", where="output_dir", hint=hint)
    if (out / "model_index.json").exists() and not any((out / name).exists() for name in MARKS):
        raise SpecError(f"{out} holds a pipeline that no run has written", where="output_dir", hint=hint)


def _save(pipe: Any, tuned: GraphUNet, folder: Path) -> None:
    """Write the tuned pipeline. Its index names the plain UNet where one computes the same, so that diffusers needs no
    sdgraph to load it.
    """
    from ..errors import ModeError
    from ..runtime.pipelines import with_unet

    try:
        named: Any = tuned.to_diffusers()
    except ModeError:
        named = tuned
    if not (folder / "unet").exists():
        tuned.save_pretrained(folder / "unet")  # so that a run that is stopped here knows the folder as its own
    with with_unet(pipe, named):
        pipe.save_pretrained(folder)
    if named is not tuned:
        tuned.save_pretrained(folder / "unet")  # the same to diffusers, and to sdgraph with the passes


def _data(config: Configuration, pipe: Any, seed: int, every_point: bool) -> Source:
    """Return the images or the prompts that a configuration names, encoded; of paths all points, or the edges."""
    from ..tuning.sources import Guided, Images, MoreCaptions, Paths, Prompts, unpacked

    prompts = None if config.prompts is None else read_prompts(Path(config.prompts))
    if config.student_calls is not None:
        assert config.guidance_scale is not None
        return Paths(
            prompts or (),
            pipe,
            cache=config.data_cache or Path(config.output_dir, "data"),
            calls=config.student_calls,
            grid=config.num_inference_steps,
            guidance=Guided(config.guidance_scale, config.guidance_range),
            points="grid" if every_point else "edges",
            height=config.resolution,
            width=config.resolution,
            seed=seed,
            cache_limit=config.data_cache_limit,
        )
    if not config.has_images:
        return Prompts(
            prompts or (),
            pipe,
            cache=config.data_cache or Path(config.output_dir, "data"),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            calls_per_prompt=config.calls_per_prompt,
            height=config.resolution,
            width=config.resolution,
            seed=seed,
            cache_limit=config.data_cache_limit,
        )
    folder, column = config.train_data_dir, config.caption_column
    if config.dataset_name is not None:
        images_folder = unpacked(
            config.dataset_name,
            config.unpacked,
            dataset_config_name=config.dataset_config_name,
            image_column=config.image_column,
            caption_column=column,
        )
        folder = str(images_folder)
        column = "text"
    assert folder is not None
    images = Images(
        folder,
        pipe,
        resolution=config.resolution or 512,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        background=config.background,
        caption_column=column,
        skip_broken=config.skip_broken,
        dataloader_num_workers=config.dataloader_num_workers,
        seed=seed,
        cache=config.data_cache,
        cache_limit=config.data_cache_limit,
    )
    return images if prompts is None else MoreCaptions(images, prompts, pipe)
