"""Options of ONNX Runtime's sessions: settings of the caller, threads, shared weights and working memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from sdgraph.errors import SpecError, did_you_mean

from .providers import CPU, CUDA

THREADS = "intra_op_num_threads"
ONE_ARENA = "session.use_env_allocators"
DOUBLING, AS_ASKED = 0, 1  # how an arena grows

log = logging.getLogger("sdgraph")
_arenas: set[tuple[str, int]] = set()


def make(settings: Mapping[str, Any], sizes: Mapping[str, int], weights: Mapping[str, Any]) -> Any:
    """Return the options of one session. They are not shared, because ONNX Runtime cannot remove an entry.

    Args:
        settings: attributes of `onnxruntime.SessionOptions`, and its configuration entries, whose names have a dot.
        sizes: the sizes that all calls will have, by the names of the model's dimensions.
        weights: OrtValues by the names of the model's initialisers.
    Raises:
        SpecError: there is no such attribute, or it does not take the value.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for name, value in settings.items():
        name = str(name)
        if "." in name:
            options.add_session_config_entry(name, str(value))
            continue
        known = [key for key, held in vars(type(options)).items() if isinstance(held, property)]
        if name not in known:
            hint = did_you_mean(name, known) or f"one of {', '.join(known)}; configuration entries have a dot"
            raise SpecError(f"no option {name!r}", where="session_options", hint=hint)
        try:
            setattr(options, name, value)
        except TypeError as error:
            raise SpecError(
                f"{name} does not take {value!r}", where="session_options", hint="see onnxruntime.SessionOptions"
            ) from error
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    for name, value in weights.items():
        options.add_initializer(name, value)
    return options


def threads(settings: Any) -> int:
    """Return the number of threads of each session; by default as many as PyTorch has.

    ONNX Runtime itself does not read OMP_NUM_THREADS.

    Args:
        settings: the settings of `make`, or a `SessionOptions`.
    Raises:
        SpecError: the setting is not a number of threads.
    """
    if not isinstance(settings, Mapping):
        return int(getattr(settings, THREADS))
    number = settings.get(THREADS, torch.get_num_threads())
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise SpecError(
            f"{THREADS} does not take {number!r}", where="session_options", hint="a whole number of at least 1"
        )
    return number


def one_arena(provider: str, provider_options: Mapping[str, str]) -> dict[str, str]:
    """Return settings with which sessions, which run in turns, share one arena of working memory in this process.

    CUDA graphs must not use it, which keep writing to the same addresses: those may belong to other sessions by then.

    Args:
        provider: the name of the provider.
        provider_options: its options.
    """
    try:
        _register(CPU, 0, {}, DOUBLING)
        if provider == CUDA:
            _register(CUDA, int(provider_options.get("device_id", 0)), provider_options, AS_ASKED)
    except Exception as error:  # ONNX Runtime's errors have no common base
        log.warning("each session has a separate arena: %s", error)
        return {}
    return {ONE_ARENA: "1"}


def _register(provider: str, device: int, options: Mapping[str, str], growth: int) -> None:
    import onnxruntime as ort

    if (provider, device) not in _arenas:
        kind = "Cuda" if provider == CUDA else "Cpu"
        memory = ort.OrtMemoryInfo(kind, ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, device, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator_v2(provider, memory, dict(options), ort.OrtArenaCfg(0, growth, -1, -1))
        _arenas.add((provider, device))
