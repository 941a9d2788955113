"""The arguments with which images are generated: prompts, steps, a scheduler, guidance and a size."""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DecisionError, SpecError, did_you_mean
from .arguments import add_dtype, add_number, device, number, positive
from .sources import local_folder, read_object, sketch

if TYPE_CHECKING:
    from ..compiler.passes import Pass
    from ..ir.guards import Guard
    from .plans import RequestedPasses

STEPS = 50
UNIT = 8  # pixels that the pipelines of Stable Diffusion divide height and width by


# -- arguments --------------------------------------------------------------------------------------------------------


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of diffusers' pipelines, and the dtype."""
    add_images(parser, prompts_required=True)
    add_dtype(parser)


def add_images(parser: argparse.ArgumentParser, prompts_required: bool = False) -> None:
    """Add the arguments of diffusers' pipelines, under their names, and the device."""
    parser.add_argument(
        "--prompts", type=Path, required=prompts_required, metavar="FILE",
        help="text file with one prompt per line" + " (default: two prompts)" * (not prompts_required),
    )  # fmt: skip
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="negative prompt of all images (default: an empty text)"
    )
    add_number(parser, "--steps", f"inference steps of the scheduler (default: those of a plan, or {STEPS})")
    add_scheduler(parser)
    parser.add_argument(
        "--guidance-scale", type=number, metavar="SCALE", help="guidance scale (default: that of the pipeline)"
    )
    add_size(parser)
    parser.add_argument("--device", type=device, default="cpu", help="device of PyTorch (default: %(default)s)")


def add_scheduler(parser: argparse.ArgumentParser) -> None:
    """Add --scheduler."""
    parser.add_argument(
        "--scheduler", metavar="NAME",
        help="scheduler of diffusers, with or without options, as in "
        "'DPMSolverMultistepScheduler(use_karras_sigmas=True)' (default: that of the pipeline)",
    )  # fmt: skip


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add --height and --width."""
    for name in ("height", "width"):
        parser.add_argument(
            f"--{name}", type=positive, metavar="PIXELS", help=f"{name} of the images (default: that of the model)"
        )


def call_of(args: argparse.Namespace, requested: RequestedPasses) -> dict[str, Any]:
    """Return the arguments of a pipeline's call, after the checks that need no weights.

    Args:
        args: the arguments of the command.
        requested: the passes, whose plan has a number of steps.
    Raises:
        SpecError: the plan is for another number of steps, the pipeline cannot have the scheduler or make the steps,
            or its UNet does not have the height or the width.
    """
    requested.check_steps(args.steps)
    steps = args.steps or requested.steps or STEPS
    check_scheduler(args.scheduler, args.pipeline, steps)
    check_size(args, args.pipeline, requested.passes)
    call = {
        "num_inference_steps": steps,
        "guidance_scale": args.guidance_scale,
        "negative_prompt": args.negative_prompt,
        "height": args.height,
        "width": args.width,
    }
    return {name: value for name, value in call.items() if value is not None}


# -- schedulers -------------------------------------------------------------------------------------------------------


def check_scheduler(text: str | None, source: str, steps: int, where: str = "--scheduler") -> None:
    """Refuse a scheduler that a pipeline cannot have, or a number of steps that it cannot make, before loading.

    Args:
        text: the name of a scheduler, with options; None is the pipeline's own.
        source: the folder of the pipeline, or its name on the hub.
        steps: the number of steps.
        where: the option of the command line that names the scheduler.
    Raises:
        SpecError: there is no such scheduler or option, or it does not fit.
    """
    if text is not None:
        scheduler_class(text, where)
    own = own_scheduler(source)
    if own is not None:
        scheduler = made_scheduler(text, own, where)
        set_steps(scheduler, steps)


def own_scheduler(source: str) -> Any:
    """Return the scheduler of a pipeline in a folder; None if there is none, or if the pipeline is on the hub."""
    import diffusers

    folder = local_folder(source)
    if folder is None or not (folder / "scheduler" / "scheduler_config.json").is_file():
        return None
    config = read_object(folder / "scheduler" / "scheduler_config.json")
    known = getattr(diffusers, str(config.get("_class_name")), None)
    return None if known is None else known.from_config(config)


def made_scheduler(text: str | None, own: Any, where: str = "--scheduler") -> Any:
    """Return the scheduler that a text names, with the noise of another one.

    Args:
        text: the name, with options; None is a scheduler like `own`.
        own: the scheduler of the pipeline.
        where: the option of the command line that names the scheduler.
    Raises:
        SpecError: there is no such scheduler or option, or it does not fit the pipeline.
    """
    if text is None:
        return type(own).from_config(own.config)
    kind, options = scheduler_class(text, where)
    mine, others = ({one.__name__, *getattr(one, "_compatibles", ())} for one in (kind, type(own)))
    if kind.__name__ not in others and type(own).__name__ not in mine:
        fitting = ", ".join(_usual())
        raise SpecError(
            f"{kind.__name__} does not fit a pipeline with {type(own).__name__}", where=where, hint=f"usual: {fitting}"
        )
    try:
        return kind.from_config(own.config, **options)
    except Exception as error:  # whatever diffusers raises about values of options, and about packages
        reason = str(error).strip().partition("\n")[0]
        raise SpecError(
            f"{kind.__name__} cannot be made: {reason}", where=where, hint="choose other options, or another scheduler"
        ) from error


def set_steps(scheduler: Any, steps: int, where: str = "--steps") -> None:
    """Set the timesteps of a scheduler.

    Args:
        scheduler: the scheduler of diffusers, which is changed.
        steps: the number of steps.
        where: the option of the command line that gives the number.
    Raises:
        SpecError: the scheduler cannot make as many steps.
    """
    most = scheduler.config.get("num_train_timesteps") or steps
    try:
        if steps > most:
            raise ValueError(f"it was trained on {most} timesteps")
        scheduler.set_timesteps(steps)
    except Exception as error:  # whatever diffusers and NumPy raise
        reason = str(error).strip().partition("\n")[0]
        raise SpecError(
            f"{type(scheduler).__name__} cannot make {steps} steps: {reason}", where=where, hint=f"1 to {most} steps"
        ) from error


def with_calls(scheduler: Any, calls: int, where: str = "--calls") -> Any:
    """Return a scheduler that makes a number of calls of the UNet, which may be more than its steps.

    Args:
        scheduler: the scheduler of diffusers, which is changed.
        calls: the number of calls.
        where: the option of the command line that gives the number.
    Raises:
        SpecError: no number of steps makes as many calls.
    """
    near = []
    for steps in range(calls, 0, -1):
        set_steps(scheduler, steps, where)
        near.append(len(scheduler.timesteps))
        if near[-1] == calls:
            return scheduler
        if near[-1] < calls:
            break
    raise SpecError(
        f"{type(scheduler).__name__} makes no generation of {calls} calls", where=where,
        hint=f"{' or '.join(map(str, sorted(set(near[-2:]))))} calls",
    )  # fmt: skip


def scheduler_class(text: str, where: str = "--scheduler") -> tuple[Any, dict[str, Any]]:
    """Return the class and the options in the text of a scheduler.

    Args:
        text: the name of the scheduler, with or without options.
        where: the option of the command line that names the scheduler.
    Raises:
        SpecError: there is no such scheduler or option.
    """
    from diffusers import schedulers

    hint = "write the name of a scheduler of diffusers, as in 'DPMSolverMultistepScheduler(use_karras_sigmas=True)'"
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        if not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("options have names")
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        name = call.func.id
    except (SyntaxError, ValueError) as error:
        if "(" in text:
            raise SpecError(f"cannot read the scheduler {text!r}: {error}", where=where, hint=hint) from error
        name, options = text, {}
    every = [n for n in dir(schedulers) if n.endswith("Scheduler") and not n.startswith("Flax")]
    known = list(dict.fromkeys([*_usual(), *every]))  # the usual ones are proposed first
    if name not in known:
        short = {n.removesuffix("Scheduler").lower(): n for n in known}
        word = name.lower().removesuffix("scheduler")
        near = [n for n in short if word in n][:3] if len(word) > 2 else []
        near = near or difflib.get_close_matches(word, short, cutoff=0.5)
        meant = f"did you mean {' or '.join(repr(short[n]) for n in near)}? " if near else ""
        raise SpecError(
            f"diffusers has no scheduler {name!r}", where=where, hint=f"{meant}usual: {', '.join(_usual())}"
        )
    kind = getattr(schedulers, name)
    accepted = [n for n in inspect.signature(kind.__init__).parameters if n not in ("self", "args", "kwargs")]
    for option in options:
        if accepted and option not in accepted:
            near_option = did_you_mean(option, accepted) or f"options: {', '.join(accepted)}"
            raise SpecError(f"{name} has no option {option!r}", where=where, hint=near_option)
    return kind, options


def _usual() -> list[str]:
    """Return the names of the schedulers that run the same models."""
    from diffusers.schedulers import KarrasDiffusionSchedulers

    return [one.name for one in KarrasDiffusionSchedulers]


# -- sizes ------------------------------------------------------------------------------------------------------------


def check_size(args: argparse.Namespace, source: str, passes: Sequence[Pass] = ()) -> None:
    """Refuse a height or a width that the pipeline or its UNet after passes does not have, before weights are read.

    Args:
        args: the arguments of the command.
        source: the folder of the pipeline, or its name on the hub.
        passes: the passes.
    Raises:
        SpecError: it is no multiple of the factor of the VAE and the pipeline, or a condition of the graph does not
            hold; the hint has the nearest valid sizes.
    """
    unit = math.lcm(UNIT, latent_unit(source))
    for name in ("height", "width"):
        size = getattr(args, name)
        if size is not None and size % unit:
            raise _no_size(name, size, [size // unit * unit, -(-size // unit) * unit], f"multiples of {unit} pixels")
    if (args.height, args.width) != (None, None) and local_folder(source) is not None:
        from ..runtime.apply import apply

        with contextlib.suppress(DecisionError):  # a pass looks at weights
            check_graph_size(args, source, apply(sketch(source), passes, verify=False))


def check_graph_size(args: argparse.Namespace, source: str, unet: Any) -> None:
    """Refuse a height or a width that a graph does not cover.

    Args:
        args: the arguments of the command.
        source: the folder of the pipeline, or its name on the hub.
        unet: a traced or an exported UNet, or a graph; all others cover every size.
    Raises:
        SpecError: a condition of the graph does not hold; the hint has the nearest sizes for which it does.
    """
    from ..ir.guards import satisfied, sizes_in

    described = getattr(unet, "manifest", getattr(unet, "graph", unet))  # an exported UNet, a traced one, or a graph
    guards: Sequence[Guard] = getattr(described, "guards", ())
    pixels = latent_unit(source)
    for name, symbol in (("height", "H"), ("width", "W")):
        size = getattr(args, name)
        if size is None:
            continue
        own = [guard for guard in guards if sizes_in(guard) == {symbol}]

        def holds(latents: int, own: Any = own, symbol: str = symbol) -> bool:
            return latents > 0 and all(satisfied(guard, {symbol: latents}) for guard in own)

        if not holds(size // pixels):
            unit = math.lcm(UNIT, pixels)
            near = [s for k in range(1, 129) for s in (size - k * unit, size + k * unit) if holds(s // pixels)][:2]
            broken = next(guard for guard in own if not satisfied(guard, {symbol: size // pixels}))
            raise _no_size(name, size, near, f"of {broken.where}")


def _no_size(name: str, size: int, near: list[int], reason: str) -> SpecError:
    sizes = " or ".join(str(s) for s in sorted({s for s in near if s > 0})) or "another size"
    return SpecError(f"the UNet cannot run at a {name} of {size} pixels", where=f"--{name}", hint=f"{sizes}: {reason}")


def latent_unit(source: str) -> int:
    """Return the pixels of an image, in height or in width, for one of its latents."""
    folder = local_folder(source)
    if folder is None or not (folder / "vae" / "config.json").is_file():
        return UNIT
    channels = read_object(folder / "vae" / "config.json").get("block_out_channels")
    return int(2 ** (len(channels) - 1)) if isinstance(channels, list) and channels else UNIT
