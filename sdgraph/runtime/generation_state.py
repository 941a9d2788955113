"""`GenerationState`: a generation that was stopped after some calls, on disk, and continued by another process."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import numpy as np
import safetensors
import safetensors.torch
import torch

from ..atomic import written
from ..errors import ModeError, SavedError, SpecError
from ..inheritance.tracker import GenerationTracker
from ..options import Count, checked
from ..schedules import TRAINED
from ..text import from_json
from ..untrusted import Format, as_kind, check_format
from ..version import __version__

FORMAT = 1
AGAIN = "stop the generation again, and save its state with this version"
LARGEST = 2**30  # numbers of a tensor
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)
CONDITIONING = ("encoder_hidden_states", "class_labels", "timestep_cond", "added_cond_kwargs")
CLOSE = 0.05  # the relative error up to which conditioning is the same, as other devices round it
Number = bool | int | float | str | None


class Leaf(msgspec.Struct, frozen=True, omit_defaults=True):
    """A value of a scheduler: a number or text, a tensor, or a list of values.

    Args:
        value: the number or text.
        tensor: the name of the tensor in the file.
        items: the values of a list.
        place: the device of the tensor, "cpu" or that of the latents; or "numpy".
    """

    value: Number = None
    tensor: str | None = None
    items: tuple[Leaf, ...] | None = None
    place: str = "cpu"


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """The description of a state, which the metadata of its file holds as JSON.

    Args:
        format: version of this description.
        version: version of sdgraph that wrote it.
        pipeline: the class of the pipeline.
        calls: the number of calls that were made.
        scheduler: the class of the scheduler.
        options: the configuration of the scheduler.
        changed: the attributes of the scheduler that its steps have changed.
        call: the arguments of the pipeline that are numbers, text or None.
        left_out: the other arguments of the pipeline.
        generators: the device of each generator.
        model: the digest of the UNet.
    """

    format: Format
    version: str
    pipeline: str
    calls: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    scheduler: str
    options: dict[str, Any]
    changed: dict[str, Leaf]
    call: dict[str, Number | list[str]]
    left_out: tuple[str, ...]
    generators: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=1000)]
    model: str


class _Stopped(Exception):
    """The pipeline was stopped after the last call that was wanted."""


@dataclass(frozen=True)
class GenerationState:
    """A generation of a diffusers pipeline, stopped after some calls: latents, scheduler, conditioning and position.

    `stop` makes it, `save` and `load` bring it to disk and back as one safetensors file, and `resume` continues it.
    On the same kernels the images are those of a generation that was never stopped, bit for bit.

    Features that calls inherit are not part of it: the first call after it computes everything.

    Args:
        description: the numbers and names of the state.
        tensors: its tensors by name: `latents`, `first` (the input of the first call), the conditioning, the timesteps,
            and whatever the scheduler and the generators keep.
    """

    description: Description
    tensors: Mapping[str, torch.Tensor]

    @property
    def calls(self) -> int:
        """The number of calls that were made."""
        return self.description.calls

    @property
    def latents(self) -> torch.Tensor:
        """The latents after the last call, (B, C, H, W)."""
        return self.tensors["latents"]

    @property
    def denoising_start(self) -> float:
        """The share of the training timesteps that lies behind, as SDXL's image-to-image pipelines take it."""
        trained = self.description.options.get("num_train_timesteps") or TRAINED
        return float((trained - float(self.tensors["timesteps"][self.calls]) - 1) / trained)

    @classmethod
    @checked(SpecError)
    def stop(cls, pipe: Any, calls: Count, **call: Any) -> GenerationState:
        """Run a pipeline for some calls.

        Args:
            pipe: the pipeline, with a `unet` and a `scheduler`.
            calls: the number of calls. A solver of the second order makes two per step.
            call: the arguments of the pipeline; `generator` is one of them, because its state is part of the state.
        Returns:
            the state of the generation after these calls.
        Raises:
            SpecError: there is no generator, or the generation has no more calls than these.
            ModeError: the scheduler keeps something that cannot be saved.
        Example:
            `GenerationState.stop(pipe, 10, prompt="a bowl of fruit", generator=torch.Generator().manual_seed(0))`
        """
        generators = _generators(call.get("generator"))
        started = [generator.get_state() for generator in generators]
        recording = _Recording(pipe, calls)
        try:
            with recording.installed():
                pipe(**call)
        except _Stopped:
            if hasattr(pipe, "maybe_free_model_hooks"):
                pipe.maybe_free_model_hooks()
        else:
            hint = f"stop it after fewer than {recording.steps} calls"
            raise SpecError(f"the generation has no more than {recording.steps} calls", where="calls", hint=hint)
        scheduler = pipe.scheduler
        if recording.steps >= len(scheduler.timesteps):
            raise SpecError("nothing is left after the last call", where="calls", hint="stop it earlier")
        tensors = {"latents": recording.latents, "first": recording.first, "timesteps": scheduler.timesteps}
        tensors |= {f"conditioning.{name}": tensor for name, tensor in recording.conditioning.items()}
        for i, (start, generator) in enumerate(zip(started, generators, strict=True)):
            tensors |= {f"generator.{i}.start": start, f"generator.{i}.now": generator.get_state()}
        changed = {name: _leaf(value, f"scheduler.{name}", tensors) for name, value in recording.changed().items()}
        plain = {name: value for name, value in call.items() if _is_plain(value)}
        description = Description(
            format=FORMAT,
            version=__version__,
            pipeline=type(pipe).__name__,
            calls=calls,
            scheduler=type(scheduler).__name__,
            options=_options(scheduler),
            changed=changed,
            call=plain,
            left_out=tuple(sorted(call.keys() - plain.keys() - {"generator"})),
            generators=tuple(str(generator.device.type) for generator in generators),
            model=_digest(pipe.unet),
        )
        kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        return cls(description, kept)

    def resume(self, pipe: Any, *, other_model: bool = False, **call: Any) -> Any:
        """Continue the generation in a pipeline.

        The pipeline prepares the call as before. Its loop skips the calls that were made.

        Args:
            pipe: a pipeline of the same class, with a scheduler of the same configuration.
            other_model: whether the UNet may be another one that takes the same latents and conditioning.
            call: arguments of the pipeline that take the place of those that were saved. Those that were neither
                numbers nor text, such as images, have to be passed again.
        Returns:
            the output of the pipeline.
        Raises:
            SavedError: the state is of another model, scheduler, number of steps, prompt or image.
            ModeError: an `expecting` block counts the calls of this UNet; use `sdgraph.attach(pipe)`.
        Example:
            `image = GenerationState.load("state.safetensors").resume(pipe).images[0]`
        """
        about = self.description
        scheduler = getattr(pipe, "scheduler", None)
        _check_same("the pipeline", type(pipe).__name__, about.pipeline)
        _check_same("the scheduler", type(scheduler).__name__, about.scheduler)
        if not other_model and _digest(pipe.unet) != about.model:
            raise SavedError(
                "the state is of another UNet", where="resume", hint="load that UNet, or pass other_model=True"
            )
        tracker = getattr(pipe.unet, "tracker", None)
        if isinstance(tracker, GenerationTracker) and tracker.expects:
            raise ModeError("an `expecting` block counts calls from 0", where="resume", hint="use sdgraph.attach(pipe)")
        prompts = self._prompts() if not any("prompt" in name for name in call) else {}
        missing = [name for name in about.left_out if name not in call and not (prompts and "prompt" in name)]
        if missing:
            hint = "pass again what is neither a number nor text"
            raise SavedError(f"the call also had {', '.join(missing)}", where="resume", hint=hint)
        saved = {name: value for name, value in about.call.items() if not (prompts and "prompt" in name)}
        if prompts:
            saved["num_images_per_prompt"] = 1  # the conditioning of a call is that of all samples
        generators = [torch.Generator(device) for device in about.generators]
        for i, generator in enumerate(generators):
            _set_state(generator, self.tensors[f"generator.{i}.start"])
        one_or_all = generators[0] if len(generators) == 1 else generators
        with _Skipping(pipe, self, generators).installed():
            return pipe(**{**saved, **prompts, **call, "generator": one_or_all})

    def _prompts(self) -> dict[str, torch.Tensor]:
        """Return the arguments of a pipeline that give its UNet the conditioning of this state; {} if it is unknown."""
        if "prompt" not in self.description.call and "prompt_embeds" not in self.description.left_out:
            return {}
        samples, rows = self.latents.shape[0], self.tensors["conditioning.encoder_hidden_states"].shape[0]
        if rows not in (samples, 2 * samples):
            return {}
        names = {"encoder_hidden_states": "prompt_embeds", "added_cond_kwargs.text_embeds": "pooled_prompt_embeds"}
        prompts: dict[str, Any] = {}
        for name, argument in names.items():
            tensor = self.tensors.get(f"conditioning.{name}")
            if tensor is not None:
                prompts[argument] = tensor[-samples:]
                if rows == 2 * samples:
                    prompts[f"negative_{argument}"] = tensor[:samples]
        return prompts

    @checked(SavedError)
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as one safetensors file, atomically.

        Args:
            path: the file.
        Raises:
            SavedError: the file cannot be written.
        """
        metadata = {"format": "pt", "sdgraph_state": json.dumps(msgspec.to_builtins(self.description))}
        try:
            with written(path) as file:
                safetensors.torch.save_file(dict(self.tensors), file, metadata)
        except OSError as error:
            raise SavedError(f"cannot write there: {error}", where=str(path), hint="choose another file") from error

    @classmethod
    @checked(SavedError)
    def load(cls, path: str | os.PathLike[str]) -> GenerationState:
        """Read a file that `save` wrote.

        Args:
            path: the file.
        Returns:
            the state.
        Raises:
            SavedError: the file is missing, damaged, no state, of a newer version, or holds what no state does.
        Example:
            `GenerationState.load("state.safetensors")`
        """
        path = Path(path)
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = _description((file.metadata() or {}).get("sdgraph_state"), path)
                names = list(file.keys())
                for name in names:
                    part = file.get_slice(name)
                    if math.prod(part.get_shape()) > LARGEST:
                        raise SavedError(f"{name} has the shape {part.get_shape()}", where=str(path), hint=AGAIN)
                tensors = {name: file.get_tensor(name).clone() for name in names}
        except (OSError, safetensors.SafetensorError, ValueError) as error:
            if isinstance(error, SavedError):
                raise
            raise SavedError(f"{path.name} cannot be read: {error}", where=str(path), hint=AGAIN) from error
        _check_tensors(about, tensors, path)
        return cls(about, tensors)


def _description(text: str | None, path: Path) -> Description:
    if text is None:
        hint = "give a file that GenerationState.save wrote"
        raise SavedError("the file is no state of a generation", where=str(path), hint=hint)
    try:
        plain = from_json(text)
    except ValueError as error:
        raise SavedError(f"its description is damaged: {error}", where=str(path), hint=AGAIN) from error
    if not isinstance(plain, dict):
        raise SavedError("its description is damaged", where=str(path), hint=AGAIN)
    check_format(plain, FORMAT, path, AGAIN)
    return as_kind(plain, Description, path, AGAIN)


def _check_tensors(about: Description, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse tensors that no state has: too few, of other dtypes or sizes, or not finite."""
    generators = [f"generator.{i}.{which}" for i in range(len(about.generators)) for which in ("start", "now")]
    listed = [name for leaf in about.changed.values() for name in _tensors_in(leaf)]
    needed = ("latents", "first", "timesteps", "conditioning.encoder_hidden_states", *generators, *listed)
    for name in needed:
        if name not in tensors:
            raise SavedError(f"the state has no {name}", where=str(path), hint=AGAIN)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise SavedError(f"{name} is of {tensor.dtype}", where=str(path), hint=AGAIN)
        if not name.startswith(("scheduler.", "generator.")) and not tensor.isfinite().all():
            raise SavedError(f"{name} has numbers that are not finite", where=str(path), hint="generate it again")
        if name.startswith("scheduler.") and tensor.isnan().any():
            raise SavedError(f"{name} has numbers that are nan", where=str(path), hint="generate it again")
    latents, timesteps = tensors["latents"], tensors["timesteps"]
    if latents.ndim != 4 or latents.dtype not in FLOATS or not latents.numel():
        raise SavedError(f"latents have the shape {tuple(latents.shape)}", where=str(path), hint=AGAIN)
    if timesteps.ndim != 1 or not about.calls < len(timesteps):
        what = f"{about.calls} of {timesteps.numel()} calls were made, so nothing is left"
        raise SavedError(what, where=str(path), hint=AGAIN)
    for name in listed:
        if tensors[name].numel() != 1 and tensors[name].shape != latents.shape:
            raise SavedError(f"{name} has the shape {tuple(tensors[name].shape)}", where=str(path), hint=AGAIN)


# -- what runs while a pipeline does ----------------------------------------------------------------------------------


class _Loop:
    """A pipeline whose UNet and scheduler are watched while it runs.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        if not hasattr(getattr(pipe, "scheduler", None), "step") or not hasattr(pipe, "unet"):
            raise SpecError(
                f"a {type(pipe).__name__} has no unet and scheduler", where="pipe", hint="pass a pipeline of diffusers"
            )
        self.unet, self.scheduler = pipe.unet, pipe.scheduler
        self.forward, self.step = pipe.unet.forward, pipe.scheduler.step
        self.steps = 0
        self._names = inspect.signature(self.forward)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """A context in which the UNet and the scheduler call back."""
        owned = {one: one.__dict__.get(name) for one, name in ((self.unet, "forward"), (self.scheduler, "step"))}
        self.unet.__dict__["forward"] = _with_signature(self.forward, self.on_forward)
        self.scheduler.__dict__["step"] = _with_signature(self.step, self.on_step)  # which pipelines look at
        try:
            yield
        finally:
            for one, name in ((self.unet, "forward"), (self.scheduler, "step")):
                if owned[one] is None:
                    del one.__dict__[name]
                else:
                    one.__dict__[name] = owned[one]

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call of the UNet by name."""
        return self._names.bind(*args, **kwargs).arguments

    def on_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call of the UNet."""
        return self.forward(*args, **kwargs)

    def on_step(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a step of the scheduler."""
        return self.step(*args, **kwargs)


def _with_signature(method: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return instead(*args, **kwargs)

    return call


class _Recording(_Loop):
    """A pipeline that runs until a number of calls was made."""

    def __init__(self, pipe: Any, calls: int) -> None:
        super().__init__(pipe)
        self._calls = calls
        self.conditioning: dict[str, torch.Tensor] = {}
        self._before: dict[str, Any] = {}

    def on_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the conditioning of the first call."""
        if not self.conditioning:
            call = self.bound(args, kwargs)
            self.first = call["sample"].detach().clone()
            self.conditioning = {name: t.detach().clone() for name, t in _conditioning(call)}
        return self.forward(*args, **kwargs)

    def on_step(self, *args: Any, **kwargs: Any) -> Any:
        """Note what the scheduler keeps; after the last call, stop.

        Raises:
            _Stopped: the last call was made.
        """
        if not self.steps:
            self._before = {name: _shallow(value) for name, value in vars(self.scheduler).items()}
        result = self.step(*args, **kwargs)
        self.steps += 1
        if self.steps == self._calls:
            self.latents = (result[0] if isinstance(result, tuple) else result.prev_sample).detach().clone()
            raise _Stopped
        return result

    def changed(self) -> dict[str, Any]:
        """Return the attributes that the steps have changed."""
        return {
            name: value
            for name, value in vars(self.scheduler).items()
            if name not in ("step", "_internal_dict")
            and not (name in self._before and _same(self._before[name], value))
        }


class _Skipping(_Loop):
    """A pipeline that skips the calls that a state has behind it."""

    def __init__(self, pipe: Any, state: GenerationState, generators: list[torch.Generator]) -> None:
        super().__init__(pipe)
        self._state, self._generators = state, generators
        self._tracker = getattr(pipe.unet, "tracker", None)

    def on_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer zeros for a call that was made before."""
        if self.steps >= self._state.calls:
            return self.forward(*args, **kwargs)
        call = self.bound(args, kwargs)
        sample: torch.Tensor = call["sample"]
        if not self.steps:
            self._check_first(call)
        timestep = call["timestep"]
        if isinstance(self._tracker, GenerationTracker) and isinstance(timestep, torch.Tensor):
            self._tracker.position(timestep.reshape(-1))  # an attached scheduler sees where the generation began
        shape = (sample.shape[0], self.unet.config.out_channels, *sample.shape[2:])
        output = sample.new_zeros(shape)
        return (output,) if call.get("return_dict", True) is False else SimpleNamespace(sample=output)

    def on_step(self, *args: Any, **kwargs: Any) -> Any:
        """Leave the latents as they are for a step that was made before, and continue with those of the state."""
        if self.steps >= self._state.calls:
            return self.step(*args, **kwargs)
        sample = inspect.signature(self.step).bind(*args, **kwargs).arguments["sample"]
        self.steps += 1
        if self.steps == self._state.calls:
            latents = self._state.latents
            if latents.shape != sample.shape or latents.dtype != sample.dtype:
                ours, theirs = ((tuple(t.shape), str(t.dtype)) for t in (sample, latents))
                raise _differs("the latents", ours, theirs)
            sample = latents.to(sample.device)
            self._restore(sample)
        if kwargs.get("return_dict", True) is False:
            return sample, sample  # pipelines that read the second one do so after their last step
        return SimpleNamespace(prev_sample=sample, pred_original_sample=sample, denoised=sample)

    def _check_first(self, call: Mapping[str, Any]) -> None:
        """Refuse a call that does not begin as the state's did."""
        tensors, options = self._state.tensors, _options(self.scheduler)  # which `set_timesteps` may change
        theirs = self._state.description.options
        for name in {**options, **theirs}:
            _check_same(f"the scheduler's {name}", options.get(name), theirs.get(name))
        timesteps = self.scheduler.timesteps.detach().cpu()
        if not torch.equal(timesteps, tensors["timesteps"]):
            here, there = (
                f"{len(t)} calls from {float(t[0]):g} to {float(t[-1]):g}" for t in (timesteps, tensors["timesteps"])
            )
            raise _differs("the run", here, there)
        now = {f"conditioning.{name}": tensor for name, tensor in _conditioning(call)} | {"first": call["sample"]}
        saved = {name for name in tensors if name.startswith("conditioning.")} | {"first"}
        for name in sorted(saved | now.keys()):
            if name not in now or name not in saved:
                raise _differs(f"the argument {name}", name in now, name in saved)
            given, tgiven = now[name].detach().cpu(), tensors[name]
            if given.shape != tgiven.shape:
                raise _differs(name, tuple(given.shape), tuple(tgiven.shape))
            error = float((given.double() - tgiven.double()).norm() / tgiven.double().norm().clamp_min(1e-12))
            if not error <= CLOSE:
                raise SavedError(
                    f"{name} differs from that of the state by {error:.2g} (relative L2)",
                    where="resume",
                    hint="pass the prompt, images and sizes of the call that was stopped",
                )

    def _restore(self, latents: torch.Tensor) -> None:
        """Set what the scheduler and the generators had after the last call."""
        known = vars(self.scheduler)
        for name, leaf in self._state.description.changed.items():
            if name in ("step", "_internal_dict") or (name not in known and hasattr(type(self.scheduler), name)):
                raise SavedError(f"the state changes {name} of the scheduler", where="resume", hint=AGAIN)
            setattr(self.scheduler, name, self._value(leaf, latents))
        for i, generator in enumerate(self._generators):
            _set_state(generator, self._state.tensors[f"generator.{i}.now"])

    def _value(self, leaf: Leaf, latents: torch.Tensor) -> Any:
        if leaf.items is not None:
            return [self._value(item, latents) for item in leaf.items]
        if leaf.tensor is None:
            return leaf.value
        tensor = self._state.tensors[leaf.tensor]
        if leaf.place == "numpy":
            return tensor.numpy()
        return tensor.clone() if leaf.place == "cpu" else tensor.to(latents.device, copy=True)


# -- values -----------------------------------------------------------------------------------------------------------


def _conditioning(call: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the conditioning of a call, with the names of nested tensors joined by dots."""
    for name in CONDITIONING:
        stack = [(name, call.get(name))]
        while stack:
            path, value = stack.pop()
            if isinstance(value, torch.Tensor):
                yield path, value
            elif isinstance(value, Mapping):
                stack += [(f"{path}.{key}", inner) for key, inner in value.items()]
            elif isinstance(value, list | tuple):
                stack += [(f"{path}.{i}", inner) for i, inner in enumerate(value)]


def _leaf(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Leaf:
    """Return a value of a scheduler as a leaf, and add its tensors."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return Leaf(value)
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(value.copy())
        return Leaf(tensor=name, place="numpy")
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return Leaf(tensor=name, place="cpu" if value.device.type == "cpu" else "latents")
    if isinstance(value, list):
        return Leaf(items=tuple(_leaf(one, f"{name}.{i}", tensors) for i, one in enumerate(value)))
    raise ModeError(
        f"the scheduler keeps a {type(value).__name__}, whose state cannot be saved",
        where=name,
        hint="use another scheduler",
    )


def _tensors_in(leaf: Leaf) -> Iterator[str]:
    if leaf.tensor is not None:
        yield leaf.tensor
    for item in leaf.items or ():
        yield from _tensors_in(item)


def _shallow(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _same(before: Any, now: Any) -> bool:
    """Whether an attribute is as it was: the same object, or an equal number or list of the same objects."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_same, before, now))
    plain = bool | int | float | str | None
    return before is now or (isinstance(before, plain) and type(before) is type(now) and bool(before == now))


def _generators(given: Any) -> list[torch.Generator]:
    generators = given if isinstance(given, list) else [given]
    if not generators or not all(isinstance(one, torch.Generator) for one in generators):
        raise SpecError(
            "there is no generator whose state could be saved",
            where="generator",
            hint="pass generator=torch.Generator().manual_seed(seed)",
        )
    return generators


def _set_state(generator: torch.Generator, state: torch.Tensor) -> None:
    try:
        generator.set_state(state)
    except (RuntimeError, TypeError) as error:
        raise SavedError(f"the state of a generator is damaged: {error}", where="resume", hint=AGAIN) from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _options(scheduler: Any) -> dict[str, Any]:
    """Return the configuration of a scheduler as it is written to JSON."""
    own = {k: v for k, v in getattr(scheduler, "config", {}).items() if not k.startswith("_")}
    return dict(json.loads(json.dumps(own, default=str)))


def _digest(unet: Any) -> str:
    """Return a digest of the names, shapes, dtypes and a few numbers of the weights of a UNet."""
    digest = hashlib.sha256()
    if not isinstance(unet, torch.nn.Module):
        digest.update(json.dumps(dict(unet.manifest.files), sort_keys=True).encode())
        return digest.hexdigest()
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            digest.update(flat[:: max(1, len(flat) // 64)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    graph = getattr(unet, "graph", None) if not hasattr(unet, "members") else None
    digest.update(", ".join(map(str, graph.passes if graph is not None else ())).encode())
    digest.update(str(getattr(unet, "schedule", "")).encode())
    return digest.hexdigest()


def _check_same(what: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise _differs(what, ours, theirs)


def _differs(what: str, ours: Any, theirs: Any) -> SavedError:
    hint = "continue with the pipeline, the scheduler and the arguments of the generation that was stopped"
    return SavedError(f"{what} is {ours!r} here, and {theirs!r} in the state", where="resume", hint=hint)
