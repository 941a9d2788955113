"""Generate images with an exported pipeline, on ONNX Runtime.

  sdgraph export PIPELINE --passes "InheritFeatures.deep_cache(3)" --out pipeline-onnx
  sdgraph generate pipeline-onnx "a red bicycle" "a mountain lake" --steps 25 --seed 0 -o image.png
  sdgraph generate pipeline-onnx "a blue bicycle" --image image.png --strength 0.6 -o blue.png

Of several prompts, the images are numbered: image-0.png, image-1.png. Prompt N has the seed `--seed` plus N. With
--image the command changes an image, and with --mask it repaints the white part of the mask.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import SpecError
from ..progress import Bar, note
from .arguments import add_number, add_output, add_provider, add_threads, number, seed
from .generation import UNIT, add_scheduler, add_size, made_scheduler, set_steps

STEPS, EVERY = 25, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="directory of a pipeline that `sdgraph export` wrote")
    parser.add_argument("texts", metavar="PROMPT", nargs="+", help="prompt; an image is made of each")
    add_output(parser, "-o/--out", "FILE", "image to write, a PNG or JPEG file", required=True)
    add_number(parser, "--steps", "inference steps of the scheduler", STEPS)
    parser.add_argument("--seed", type=seed, default=0, help="seed of the first prompt (default: %(default)s)")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="negative prompt (default: an empty text)")
    parser.add_argument(
        "--guidance-scale", type=number, metavar="SCALE", help="guidance scale (default: that of the pipeline)"
    )
    add_scheduler(parser)
    add_size(parser)
    parser.add_argument("--image", type=Path, metavar="FILE", help="image to change, for image-to-image or inpainting")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="mask for inpainting; its white part is repainted")
    parser.add_argument(
        "--strength", type=number, metavar="SHARE",
        help="share of the steps that change the image, above 0 and at most 1 (default: that of the pipeline)",
    )  # fmt: skip
    add_number(parser, "--tile", "decode in tiles of N latents, such as 64, which bounds the memory")
    add_output(parser, "--preview", "FILE", f"image that shows the unfinished image after every {EVERY} steps")
    add_provider(parser, "the fastest that is installed, by the kind of processor")
    add_threads(parser, "PyTorch", "ONNX Runtime")


def run(args: argparse.Namespace) -> None:
    from ..atomic import written
    from ..exporters.ort import open_pipeline

    folder = Path(args.directory).expanduser()
    if not folder.is_dir():
        hint = "give the directory of a pipeline that `sdgraph export` wrote"
        raise SpecError(f"there is no folder {args.directory}", hint=hint)
    outputs = _outputs(args.out, len(args.texts), args.overwrite)
    for path in (*outputs, *filter(None, [args.preview])):
        _check_format(path)
    pictures = _pictures(args)
    task: Any = "inpainting" if "mask_image" in pictures else "image-to-image" if pictures else "text-to-image"
    note(f"loading {args.directory}")
    pipe = open_pipeline(
        folder, task=task, provider=args.provider, precision=args.precision, tile=args.tile
    )  # fmt: skip
    note(f"ONNX Runtime: {pipe.unet.backend.provider} in {pipe.unet.backend.precision}")
    pipe.set_progress_bar_config(disable=True)
    _check_size(args, pipe.vae.factor)
    if args.scheduler is not None:
        pipe.scheduler = made_scheduler(args.scheduler, pipe.scheduler)
    set_steps(pipe.scheduler, args.steps)
    _warn_of_length(args.texts, pipe)
    given = {
        "negative_prompt": args.negative_prompt,
        "guidance_scale": args.guidance_scale,
        "strength": args.strength,
        # Image-to-image takes the size of the image.
        "height": None if task == "image-to-image" else args.height,
        "width": None if task == "image-to-image" else args.width,
        **pictures,
    }
    call = {name: value for name, value in given.items() if value is not None}
    for i, (prompt, path) in enumerate(zip(args.texts, outputs, strict=True)):
        image = _generate(pipe, prompt, args.seed + i, args.steps, call, args.preview)
        with written(path) as file:
            image.save(file)
        print(path)


def _generate(pipe: Any, prompt: str, seed: int, steps: int, call: dict[str, Any], preview: Path | None) -> Any:
    """Return the image of a prompt, with a progress bar."""
    import torch

    with Bar(total=steps, desc=prompt[:40], unit="step") as bar:
        callback = _callback(bar, preview)
        result = pipe(
            prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=callback, **call,
        )  # fmt: skip
    return result.images[0]


def _callback(bar: Bar, preview: Path | None) -> Callable[..., dict[str, Any]]:
    from ..atomic import written

    def after(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        bar.total = getattr(pipe, "_num_timesteps", bar.total)  # image-to-image makes fewer than all steps
        bar.update()
        if preview is not None and (step + 1) % EVERY == 0:
            latents = values["latents"] / pipe.vae.config.get("scaling_factor", 1.0)
            image = pipe.vae.decode(latents[:1], return_dict=False)[0]
            with written(preview) as file:
                pipe.image_processor.postprocess(image)[0].save(file)
        return values

    return after


def _outputs(path: Path, count: int, overwrite: bool) -> list[Path]:
    """Return the file of each prompt.

    Raises:
        SpecError: one of them exists already.
    """
    if count == 1:
        return [path]
    paths = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]
    for one in paths:
        if one.exists() and not overwrite:
            raise SpecError(f"{one} already exists", where="--out", hint="pass --overwrite, or write to another path")
    return paths


def _check_format(path: Path) -> None:
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise SpecError(f"{path} is no PNG or JPEG file", where="--out", hint="name it with the ending .png or .jpg")


def _pictures(args: argparse.Namespace) -> dict[str, Any]:
    """Return the image and the mask of the command line, as the arguments of diffusers.

    Raises:
        SpecError: a file is no image; there is a mask without an image; or the strength has no image, or is no share.
    """
    if args.image is None:
        for name in ("mask", "strength"):
            if getattr(args, name) is not None:
                raise SpecError(
                    f"--{name} is for an image", where=f"--{name}", hint="give the image, with --image FILE"
                )
        return {}
    if args.strength is not None and not 0 < args.strength <= 1:
        raise SpecError(f"the strength is {args.strength:g}", where="--strength", hint="above 0 and at most 1")
    size = (args.width, args.height) if args.width and args.height else None
    pictures = {"image": _read(args.image, "RGB", "--image", size)}
    if args.mask is not None:
        pictures["mask_image"] = _read(args.mask, "L", "--mask", size)
        if pictures["mask_image"].size != pictures["image"].size:
            raise SpecError("the mask has another size than the image", where="--mask", hint="draw it on the image")
    return pictures


def _read(path: Path, mode: str, where: str, size: tuple[int, int] | None) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path).convert(mode)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise SpecError(
            f"{path} cannot be read as an image: {error}", where=where, hint="a PNG or JPEG file"
        ) from error
    return image if size is None else image.resize(size)


def _check_size(args: argparse.Namespace, factor: int) -> None:
    """Refuse a height or a width that is no multiple of the sides of a latent."""
    unit = math.lcm(UNIT, factor)
    for name in ("height", "width"):
        size = getattr(args, name)
        if size is not None and size % unit:
            near = " or ".join(str(s) for s in (size // unit * unit, -(-size // unit) * unit) if s)
            raise SpecError(
                f"the pipeline cannot make a {name} of {size} pixels", where=f"--{name}",
                hint=f"{near}: multiples of {unit} pixels",
            )  # fmt: skip


def _warn_of_length(prompts: Sequence[str], pipe: Any) -> None:
    """Print a note for a prompt that the tokenizer cuts."""
    tokenizer = pipe.tokenizer
    for prompt in prompts:
        tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(tokens) > tokenizer.model_max_length:
            cut = tokenizer.decode(tokens[tokenizer.model_max_length - 1 : -1])
            note(f"CLIP reads {tokenizer.model_max_length} tokens, and the prompt has {len(tokens)}: not read: {cut!r}")
