"""Hashes of contents: of tensors, models, tokenizers and files, all of every one of them."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn, uint8

from ..errors import TuningError
from ..ir.verify import structure
from ..progress import Bar
from ..text import json_object
from .unet import GraphUNet

FORMAT = 1  # of a file of hashes
SIZE = 16  # bytes of a hash
ROWS = 64  # rows that are hashed by one call of a thread
MANY = 1000  # files whose reading takes long enough for a bar
SETTLED = 2 * 10**9  # nanoseconds after which a file that is written to has another time
PLAIN = (bool, int, float, str, type(None))
# What a configuration or a module has beside options: where it was loaded from, and how it saves memory.
PASSING = (
    "architectures",
    "dtype",
    "gradient_checkpointing",
    "name_or_path",
    "torch_dtype",
    "training",
    "transformers_version",
    "use_slicing",
)
LAST_CALL = ("padding", "truncation")  # parts of a tokenizer that say how it was called last
TOKENIZER = (
    "add_prefix_space",
    "do_lower_case",
    "model_max_length",
    "padding_side",
    "special_tokens_map",
    "truncation_side",
)
PRIVATE = ("_active_adapter", "_disable_adapters")  # options of peft's layers; other private names are no options


def hash_text(*parts: str) -> str:
    """Return the hash of texts, 32 hexadecimal digits."""
    digest = _new()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return str(digest.hexdigest())


def as_number(found: str) -> int:
    """Return the beginning of a hash as a counter of `generator`."""
    return int(found[:15], 16)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of tensors: of their names, dtypes, shapes and all of their numbers."""
    return hash_text(*(f"{name} {found}" for name, found in hash_each(tensors).items()))


def hash_each(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the hash of each tensor: of its dtype, shape and all of its numbers."""
    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(tensors, pool.map(_hash_tensor, tensors.values()), strict=True))


def hash_rows(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the hash of every row of tensors (N, ...), which are paired by row."""
    count = len(next(iter(tensors.values())))
    head = ", ".join(f"{name} {tensor.dtype} {tuple(tensor.shape[1:])}" for name, tensor in tensors.items())

    def hashed(begin: int) -> list[str]:
        parts = [_bytes(tensor[begin : begin + ROWS]) for tensor in tensors.values()]
        rows = min(ROWS, count - begin)
        digests = [_new(head.encode()) for _ in range(rows)]
        for part in parts:
            for digest, row in zip(digests, part.reshape(rows, -1), strict=True):
                digest.update(row.data)
        return [digest.hexdigest() for digest in digests]

    with ThreadPoolExecutor(_threads()) as pool:
        return tuple(found for chunk in pool.map(hashed, range(0, count, ROWS)) for found in chunk)


def hash_model(model: nn.Module) -> str:
    """Return the hash of a model: of its weights and buffers, its modules, their options, and its configuration."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    if isinstance(model, GraphUNet):
        return hash_text(hash_program(model), hash_tensors(model.tensors()))
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    options = [f"{path} {_options(module)}" for path, module in model.named_modules()]
    return hash_text(str(model), *options, _configuration(model), hash_tensors(held))


def hash_program(unet: GraphUNet) -> str:
    """Return the hash of what a UNet computes with whatever weights: its operations, modules, sites and guards."""
    graph = unet.graph
    named = sorted(f"{name} {value}" for values in (graph.kinds(), graph.sites) for name, value in values.items())
    guards = [f"{guard.condition} {guard.outcome}" for guard in graph.guards]
    return hash_text(structure(graph), *map(without_places, named), *guards)


def hash_tokenizer(tokenizer: Any) -> str:
    """Return the hash of a tokenizer of transformers: of its vocabulary, merges, rules and special tokens."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = [_json({name: part for name, part in whole.items() if name not in LAST_CALL})]
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_vocabulary(folder)
            rules = [f"{path.name} {path.read_text(encoding='utf-8')}" for path in sorted(Path(folder).iterdir())]
    options = {name: getattr(tokenizer, name, None) for name in TOKENIZER}
    return hash_text(*rules, _json(tokenizer.get_vocab()), _json(options))


def hash_bytes(content: bytes) -> str:
    """Return the hash of the contents of a file, as `hash_file` does."""
    return str(_new(content).hexdigest())


def hash_file(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _new).hexdigest()


def hash_files(paths: Sequence[Path], known: Path | None = None) -> list[str]:
    """Return the hashes of files.

    Args:
        paths: the files.
        known: the file that keeps their hashes with their sizes and times, so that unchanged files are not read again.
            The time of the last change of a file's entry counts as well, which no program can set back; files that were
            changed within the last two seconds are read again the next time.
    """
    kept = _read_known(known)
    before, now = {str(path.absolute()): path.stat() for path in paths}, time.time_ns()
    states = {name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in before.items()}
    missing = [name for name, state in states.items() if kept.get(name, [])[:-1] != state]
    with ThreadPoolExecutor(_threads()) as pool:
        found = pool.map(hash_file, map(Path, missing))
        bar = Bar(found, desc="reading files", total=len(missing), unit="file", disable=len(missing) < MANY)
        hashes = {name: kept[name][-1] for name in states if name not in set(missing)} | dict(
            zip(missing, bar, strict=True)
        )
    old = {name for name, state in states.items() if max(state[1:3]) < now - SETTLED}
    if known is not None and old & set(missing):
        files = kept | {name: [*states[name], hashes[name]] for name in old}
        text = json.dumps({"format": FORMAT, "files": files})
        new = known.with_name(f"{known.name}.{os.getpid()}")
        new.write_text(text)
        new.replace(known)
    return [hashes[str(path.absolute())] for path in paths]


def without_places(text: str) -> str:
    """Return a text of objects without their places in memory, which every process chooses anew."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def is_hash(text: str) -> bool:
    """Return whether a text is a hash, which tells people nothing."""
    return re.fullmatch(f"[0-9a-f]{{{2 * SIZE}}}", text) is not None


def _read_known(known: Path | None) -> dict[str, list[Any]]:
    if known is None or not known.exists():
        return {}
    try:
        content = json_object(known, TuningError, hint="", format=FORMAT)
    except TuningError:  # it only saves reading files again
        return {}
    files = content.get("files")
    return {name: state for name, state in files.items() if isinstance(state, list)} if isinstance(files, dict) else {}


def _new(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=SIZE)


def _threads() -> int:
    return min(8, os.cpu_count() or 1)  # hashlib lets go of the interpreter; more threads wait for the memory


def _hash_tensor(tensor: Tensor) -> str:
    digest = _new(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(_bytes(tensor).data)
    return str(digest.hexdigest())


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the numbers of a tensor in the order of its dimensions, whatever its layout in memory."""
    if tensor.is_meta:
        raise TuningError(
            "the weights of a model are not in memory, so that nothing can say which they are",
            where="pipe",
            hint="load the pipeline without sequential offloading",
        )
    return tensor.detach().cpu().contiguous().flatten().view(uint8).numpy()


def _options(module: nn.Module) -> str:
    values, processor = _plain(module), vars(module).get("processor")
    if processor is not None and not isinstance(processor, nn.Module):  # of diffusers' attention
        values["processor"] = {"kind": type(processor).__qualname__, **_plain(processor)}
    return _json(values)


def _plain(thing: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(thing).items() if _is_option(name) and _is_plain(value)}


def _is_option(name: str) -> bool:
    return name in PRIVATE or not (name.startswith("_") or name in PASSING)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return isinstance(value, PLAIN) or (isinstance(value, list | tuple) and all(map(_is_plain, value)))


def _configuration(model: nn.Module) -> str:
    """Return what the configuration of a model of diffusers or transformers has beside the defaults of its class."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_diff_dict"):
        values = dict(config.to_diff_dict())
    else:
        defaults = {name: _json(p.default) for name, p in inspect.signature(type(model).__init__).parameters.items()}
        values = dict(config) if isinstance(config, Mapping) else {}
        values = {name: value for name, value in values.items() if defaults.get(name) != _json(value)}
    return _json({name: value for name, value in values.items() if _is_option(name)})


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
