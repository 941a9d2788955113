"""Describe a folder: an exported UNet, a saved UNet, a pipeline, or a training run and its checkpoints.

  sdgraph inspect unet-ort
  sdgraph inspect tuned/checkpoint-500

The command prints the passes that were applied, the features that calls reuse, the sizes and the files, and for an
exported UNet all graphs and inputs. It runs nothing.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import SpecError
from .arguments import CALLS, add_calls, add_imports
from .generation import latent_unit, own_scheduler, with_calls
from .sources import INDEX, load_unet, local_folder, parts, read_object, sketch

STATE, TUNING, RECIPE, CONFIG = "state.json", "tuning.json", "sdgraph.json", "config.json"
SWITCH = "switch.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", help="folder of a pipeline, of a UNet, of an exported UNet, or of a training run"
    )
    add_calls(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files with their hashes")
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    folder = local_folder(args.directory)
    if folder is None:
        raise SpecError(f"there is no folder {args.directory}", hint="download the model, and give its folder")
    calls = args.calls or CALLS
    from ..untrusted import is_exported

    if is_exported(folder):
        from ..exporters.bundle.inspect import contents

        print(contents(folder, calls, verify=not args.no_verify))
        return
    described = [*_run(folder), *_checkpoint(folder), *_pipeline(folder)]
    unet = _unet_folder(folder)
    if unet is not None:
        described.append((_switch if (unet / SWITCH).is_file() else _unet)(unet, folder, calls))
    if not described:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise SpecError(
            f"{args.directory} is none of sdgraph's or diffusers' folders: it holds {names}",
            hint="give the folder of a pipeline, of a UNet, of an exported UNet, or of a training run",
        )
    print("\n\n".join(described))


def _unet_folder(folder: Path) -> Path | None:
    """Return the folder of the UNet that a folder is, or has."""
    found = [one for one in (folder / "unet", folder) if (one / CONFIG).is_file()]
    return found[0] if found else None


# -- parts of the description -----------------------------------------------------------------------------------------


def _run(folder: Path) -> Iterator[str]:
    """Describe a training run."""
    from ..tuning.train_state import checkpoints

    steps = [step for step, _ in checkpoints(folder)]
    if steps or (folder / TUNING).is_file():
        kept = ", ".join(map(str, steps)) or "none"
        ended = (folder / TUNING).is_file()
        end = "it has ended" if ended else "it has not ended, and the same command continues from the last"
        yield f"{folder}: a training run; checkpoints of the steps {kept}; {end}"


def _checkpoint(folder: Path) -> Iterator[str]:
    """Describe a checkpoint of a training run."""
    from ..views.format import format_table

    if not (folder / STATE).is_file():
        return
    record = read_object(folder / STATE)
    settings = record.get("settings", {})
    lines = [f"{folder}: a checkpoint of a training run, after step {record.get('step')}"]
    if isinstance(settings, dict):
        lines.append(format_table([(f"  {name}", str(value)) for name, value in settings.items() if value is not None]))
    yield "\n".join(lines)


def _pipeline(folder: Path) -> Iterator[str]:
    """Describe a pipeline: its parts, and the size of its images."""
    from ..views.format import format_count, format_table

    if not (folder / INDEX).is_file():
        return
    index = read_object(folder / INDEX)
    rows = [
        (f"  {name}", kind, f"{format_count(_bytes(folder / name))}B" if (folder / name).is_dir() else "missing")
        for name, (_, kind) in parts(index).items()
    ]
    lines = [f"{folder}: a pipeline, {index.get('_class_name')}", format_table(rows) if rows else "  no parts"]
    size = read_object(folder / "unet" / CONFIG).get("sample_size") if (folder / "unet" / CONFIG).is_file() else None
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        pixels = latent_unit(str(folder))
        lines.append(f"images of {height * pixels}x{width * pixels} pixels, if no other size is given")
    yield "\n".join(lines)


def _unet(unet: Path, folder: Path, calls: int) -> str:
    """Describe a UNet, plain or changed by passes, with the timetable of its calls."""
    from ..views.format import format_count, format_macs, format_names

    weights = list(_weights(unet))
    dtypes = Counter(dtype for _, dtype, _ in weights)
    total = sum(size for _, _, size in weights)
    head = f"{unet}: a UNet"
    if (unet / RECIPE).is_file():
        head += f", saved by sdgraph {read_object(unet / RECIPE).get('sdgraph')}"
    graph = sketch(str(unet))
    lines = [
        head,
        f"{format_count(total)} parameters, {', '.join(sorted(dtypes)) or 'no weights'}; "
        f"{format_macs(graph.macs)} at its own size",
        f"passes: {', '.join(map(str, graph.passes)) or 'none'}",
    ]
    if graph.removed:
        lines.append(f"removed: {format_names(list(graph.removed))}")
    if graph.sites:
        scheduler = own_scheduler(str(folder))
        lines += ["", str(graph.timetable(calls if scheduler is None else with_calls(scheduler, calls)))]
    return "\n".join(lines)


def _switch(unet: Path, folder: Path, calls: int) -> str:
    """Describe a switch of several UNets: its members, and which of them computes each call."""
    from ..views.format import format_count

    total = sum(size for _, _, size in _weights(unet))
    loaded = load_unet(str(unet), "float32")
    scheduler = own_scheduler(str(folder))
    lines = [
        f"{unet}: a switch of several UNets, saved by sdgraph {read_object(unet / SWITCH).get('version')}",
        f"{format_count(total)} parameters, equal ones counted once",
        f"schedule: {loaded.schedule}",
    ]
    lines += [
        f"{name}: {format_count(sum(p.numel() for p in member.parameters()))} parameters, "
        f"passes: {', '.join(map(str, member.graph.passes)) or 'none'}"
        for name, member in loaded.members.items()
    ]
    timetable = loaded.timetable(calls if scheduler is None else with_calls(scheduler, calls))
    return "\n".join([*lines, "", str(timetable)])


def _weights(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Iterate over the tensors of a folder: name, dtype and size, without reading their values."""
    import math

    import safetensors

    from ..errors import SavedError

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    tensor = file.get_slice(name)
                    yield name, str(tensor.get_dtype()), math.prod(tensor.get_shape())
        except (OSError, safetensors.SafetensorError) as error:
            raise SavedError(f"{path.name} cannot be read: {error}", where=str(path), hint="copy it again") from error


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
