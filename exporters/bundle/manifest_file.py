"""The file of a manifest, `sdgraph.json`. It is written last, and not trusted when it is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sdgraph.atomic import sha256
from sdgraph.errors import SavedError, SdgraphError
from sdgraph.frontend.call import ARGUMENTS
from sdgraph.inheritance.tracker import GenerationTracker
from sdgraph.ir.dims import evaluate
from sdgraph.untrusted import as_kind, check_format, read_json, require_inside

from .manifest import AGAIN, CONFIG, DATA, FORMAT, KINDS, MANIFEST, REPORT, Manifest, SwitchManifest, named

_MODEL_FILE = re.compile(r"[\w-]{1,100}\.onnx")
_STRATEGY = re.compile(r"Quantize\([^\x00-\x1f]{0,100000}\)")
_SYMBOL = re.compile(r"[A-Z]\d{0,3}")  # of a size of the call
_LARGEST_SIZE = 1 << 31  # of a dimension, where the sizes of the call are 64


def write_manifest(manifest: Manifest | SwitchManifest, folder: Path) -> None:
    """Write a manifest, with the hashes of the files in the folder."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name not in (MANIFEST, REPORT)}
    if isinstance(manifest, SwitchManifest):
        members = {
            name: replace(one, files={file: files[file] for file in sorted(one.own_files & files.keys())})
            for name, one in manifest.members.items()
        }
        plain = asdict(replace(manifest, members=members))
    else:
        plain = asdict(replace(manifest, files=files))
    (folder / MANIFEST).write_text(json.dumps({**plain, "sha256": digest(plain)}, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest | SwitchManifest:
    """Read the manifest of a directory, of one UNet or of a switch.

    Raises:
        SavedError: it is missing, edited, malformed, or of a newer format.
    """
    path = folder / MANIFEST
    plain = read_json(path, AGAIN)
    if not plain.keys() & {"variants", "members"} or "format" not in plain:
        hint = "sdgraph.GraphUNet.from_pretrained reads what save_pretrained wrote"
        raise SavedError(f"{MANIFEST} is not that of an export", where=str(path), hint=hint)
    check_format(plain, FORMAT, path, AGAIN)
    if plain.pop("sha256", None) != digest(plain):
        raise SavedError(f"{MANIFEST} was edited", where=str(path), hint=f"{AGAIN}: it says what the variants are")
    manifest: Manifest | SwitchManifest
    if "members" in plain:
        manifest = as_kind(plain, SwitchManifest, path, AGAIN)
    else:
        manifest = as_kind(plain, Manifest, path, AGAIN)
    try:
        if isinstance(manifest, SwitchManifest):
            _check_members(manifest)
        else:
            _check(manifest)
    except (SdgraphError, ValueError, RecursionError, MemoryError) as error:
        what = error.what if isinstance(error, SdgraphError) else str(error) or type(error).__name__
        raise SavedError(f"{MANIFEST} is damaged: {what}", where=str(path), hint=AGAIN) from error
    return manifest


def digest(plain: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest as plain data, which reveals an edited one."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def check_files(manifest: Manifest | SwitchManifest, folder: Path, leave_out: Container[str] = ()) -> None:
    """Compare files with their hashes.

    Args:
        manifest: the manifest, which has the hashes.
        folder: the folder of the files.
        leave_out: the names of the files that are not compared.
    Raises:
        SavedError: a file is missing, is not the one that was exported, or is a link out of the directory.
    """
    found: dict[str, str] = {}
    for member, one in manifest.members.items():
        of = f", of member {member}," if member else ""
        for name, digest in one.files.items():
            if name in leave_out:
                continue
            require_inside(folder / name, AGAIN)
            if not (folder / name).is_file():
                raise SavedError(f"{name}{of} is missing", where=str(folder), hint=AGAIN)
            if name not in found:
                found[name] = sha256(folder / name)
            if found[name] != digest:
                raise SavedError(f"{name}{of} is not the file that was exported", where=str(folder / name), hint=AGAIN)


def _check_members(manifest: SwitchManifest) -> None:
    """Check that the members and the schedule fit together.

    Raises:
        ValueError, SdgraphError: they do not.
    """
    first = next(iter(manifest.members.values()))
    for name, member in manifest.members.items():
        if member.member != name:
            raise ValueError(f"members.{name}.member: it is {member.member!r}")
        if member.dtype != first.dtype:
            raise ValueError(f"members.{name}.dtype: {member.dtype}, and the first has {first.dtype}")
        for i, variant in enumerate(member.variants):
            if not variant.file.startswith(named(name, "")):
                raise ValueError(f"members.{name}.variants[{i}].file: {variant.file[:100]!r} is of another member")
        try:
            _check(member)
        except ValueError as error:
            raise ValueError(f"members.{name}.{error}") from error
    manifest.rota(GenerationTracker())  # this reads the schedule, which may fail


def _check(manifest: Manifest) -> None:
    """Check that the fields fit together.

    Raises:
        ValueError, SdgraphError: they do not.
    """
    variants = manifest.variants
    if not variants or variants[0].reused:
        raise ValueError("variants: the first does not compute everything")
    sites = manifest.sites  # this reads their schedules, which may fail
    if len(sites) < len(manifest.values):
        raise ValueError("values: a site is there twice")
    for i, variant in enumerate(variants):
        for site in (*variant.reads, *variant.writes, *variant.bypassed, *variant.computed):
            _require_known(site, sites, f"variants[{i}]")
        for site in variant.reads:
            _require_known(site, variants[0].writes, f"variants[{i}].reads")
        if not _MODEL_FILE.fullmatch(variant.file):
            raise ValueError(f"variants[{i}].file: {variant.file[:100]!r} is no file name of a model")
    for name in (CONFIG, DATA, *(variant.file for variant in variants)):
        if name not in manifest.files:
            raise ValueError(f"files: there is no hash of {name}")
    for i, spec in enumerate(manifest.inputs):
        _require_known(spec.kind, KINDS, f"inputs[{i}].kind")
        _require_known(spec.place[0] if spec.place else "", ARGUMENTS, f"inputs[{i}].place")
    if manifest.quantization and not _STRATEGY.fullmatch(manifest.quantization):
        raise ValueError(f"quantization: {manifest.quantization[:80]!r} is no strategy")
    names = [spec.name for spec in manifest.inputs if spec.shape is not None]
    if len({spec.name for spec in manifest.inputs}) < len(manifest.inputs) or names[:2] != ["sample", "timestep"]:
        raise ValueError("inputs: sample and timestep, and each once")
    for name in manifest.given:
        _require_known(name, names, "given")
    _check_sizes(manifest)


def _check_sizes(manifest: Manifest) -> None:
    """Check that dimensions are sizes and guards can be evaluated, for a call whose free sizes are all 64."""
    shapes = {f"inputs[{i}].shape": spec.shape or () for i, spec in enumerate(manifest.inputs)}
    free = {str(d): 64 for shape in shapes.values() for d in shape if _SYMBOL.fullmatch(str(d))}
    shapes |= {"output": manifest.output}
    shapes |= {f"values[{i}].shape": value.shape for i, value in enumerate(manifest.values)}
    for field, shape in shapes.items():
        for dim in shape:
            size: object = dim if isinstance(dim, int) else evaluate(dim, free)
            if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= _LARGEST_SIZE:
                raise ValueError(f"{field}: {str(dim)[:80]!r} is no size")
    for guard in manifest.guards:
        evaluate(guard.condition, free)


def _require_known(name: str | int, known: Container[Any], field: str) -> None:
    if name not in known:
        raise ValueError(f"{field}: {str(name)[:100]!r} is not known")
