"""What a training step changes, and how it is written to a checkpoint and read back, bit for bit.

A checkpoint has the layout of diffusers' scripts: `unet/` and `unet_ema/` are saved UNets. The rest is safetensors and
JSON; nothing is pickled. Random numbers have no state, because they follow from the number of the step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..atomic import appearing
from ..errors import SdgraphError, TuningError
from ..runtime.recipe import read_recipe
from ..runtime.serialization import save
from ..runtime.unet import GraphUNet
from ..runtime.weight_files import read_weights
from ..text import from_json, json_object, read_text
from . import fsdp
from .identity import Identity, versions
from .settings import Settings

STATE, OPTIMIZER, ADAPTERS = "state.json", "optimizer.safetensors", "adapters.safetensors"
ROWS = "rows.json"  # the hashes of the rows of data
UNET, AVERAGE = "unet", "unet_ema"
RECORD: dict[str, type] = {  # what the record of a checkpoint has, beside numbers
    "settings": dict,
    "identity": dict,
    "versions": dict,
    "changes": list,
    "optimizer": dict,
    "lr_scheduler": dict,
}


class TrainState:
    """The state of a training run.

    Args:
        unet: the student.
        adapters: what is trained with it and thrown away afterwards.
        optimizer: of the parameters of both.
        rate: the schedule of the learning rate.
        average: the moving average of the student's weights.
        scaler: the scale of the loss, in fp16.
        copy: another UNet like the student, on the CPU, where the student's weights are spread over processes.
    """

    def __init__(
        self,
        unet: GraphUNet,
        adapters: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: torch.optim.lr_scheduler.LRScheduler,
        average: EMAModel | None,
        scaler: Any = None,
        copy: GraphUNet | None = None,
    ) -> None:
        self.unet, self.adapters, self.optimizer, self.rate = unet, adapters, optimizer, rate
        self.average, self.scaler, self.copy = average, scaler, copy
        self.step, self.seconds = 0, 0.0
        self.changes: list[dict[str, int]] = []  # of the rows of data: the step before which, and how many
        self.whole = True  # whether all of it is of the same step

    @property
    def spread(self) -> bool:
        """Whether the weights are spread over processes, which can only save them together."""
        return self.copy is not None

    @contextmanager
    def averaged(self) -> Iterator[GraphUNet]:
        """Within this context there is the student with its averaged weights, in evaluation mode."""
        if self.copy is not None:
            try:
                yield self.result()
            finally:
                self.copy.to("cpu")
            return
        parameters = list(self.unet.parameters())
        if self.average is not None:
            self.average.store(parameters)
            self.average.copy_to(parameters)
        self.unet.eval()
        try:
            yield self.unet
        finally:
            self.unet.train()
            if self.average is not None:
                self.average.restore(parameters)

    def result(self) -> GraphUNet:
        """Return the student with its averaged weights for good, or a copy of it where its weights are spread."""
        if self.copy is not None:
            names = self.copy.state_dict()
            self.copy.load_state_dict({n: t for n, t in self._averages(self._weights()).items() if n in names})
            return self.copy.to(self.unet.device)
        if self.average is not None:
            self.average.copy_to(self.unet.parameters())
        return self.unet

    def _weights(self, keep: bool = True) -> dict[str, Tensor]:
        return fsdp.gather(self.unet.tensors(), keep)

    def _averages(self, weights: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
        """Return the averages of weights in their place."""
        if self.average is None:
            return dict(weights)
        names = [name for name, _ in self.unet.named_parameters()]
        return {**weights, **fsdp.gather(dict(zip(names, self.average.shadow_params, strict=True)), keep)}

    def advance(self) -> None:
        """Take the step that the gradients in the parameters ask for."""
        self.whole = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not getattr(self.optimizer, "step_was_skipped", False):  # in fp16, as accelerate's schedules do
            self.rate.step()
        if self.average is not None:
            self.average.step(self.unet.parameters())
        self.step += 1
        self.whole = True

    def save(self, out: Path | None, settings: Settings, identity: Identity) -> None:
        """Write a checkpoint, whole or not at all, and then delete the oldest ones beyond their limit.

        Args:
            out: the folder of the run; None in all processes but the main one, which take part with their shares.
            settings: the settings of the run.
            identity: all else that decides the result.
        Raises:
            TuningError: nothing can be written there; earlier checkpoints are kept.
        """
        kept = out is not None
        weights = self._weights(kept)
        averages = self._averages(weights, kept)
        tensors, numbers = _flat(self.optimizer.state_dict()["state"])
        moments = fsdp.gather(tensors, kept)
        adapters = fsdp.gather(_contiguous(self.adapters.state_dict()), kept)
        if out is None:
            return
        target = out / f"checkpoint-{self.step}"
        graph = (self.copy or self.unet).graph  # spreading weights gives modules hooks and classes, which are not saved
        try:
            with appearing(target, lambda _: None, TuningError) as folder:
                save(graph, weights, self.unet.config, folder / UNET)
                if self.average is not None:
                    save(graph, averages, self.unet.config, folder / AVERAGE)
                safetensors.torch.save_file(moments, folder / OPTIMIZER)
                safetensors.torch.save_file(adapters, folder / ADAPTERS)
                record = {
                    "step": self.step,
                    "seconds": self.seconds,
                    "settings": asdict(settings),
                    "identity": dict(identity.parts),
                    "versions": versions(),
                    "changes": self.changes,
                    "optimizer": numbers,
                    "lr_scheduler": self.rate.state_dict(),
                    "averaged_steps": None if self.average is None else self.average.optimization_step,
                    "scaler": None if self.scaler is None else self.scaler.state_dict(),
                }
                (folder / STATE).write_text(json.dumps(record, indent=1) + "\n")
                if identity.rows:
                    (folder / ROWS).write_text(json.dumps(identity.rows, indent=0))
        except (OSError, safetensors.SafetensorError) as error:
            raise TuningError(
                f"the checkpoint of step {self.step} cannot be written: {getattr(error, 'strerror', None) or error}",
                where=str(target),
                hint="free space there; the checkpoint before it is kept, and the same command goes on from it",
            ) from error
        limit = settings.checkpoints_total_limit
        before = [folder for step, folder in checkpoints(out) if step < self.step]
        for old in before[: 1 - limit or None] if limit else ():
            shutil.rmtree(old)

    def load(self, folder: Path) -> None:
        """Take over the state of a checkpoint.

        Raises:
            TuningError: a file is missing or damaged.
        """
        record = read(folder)
        try:
            for module, file in ((self.unet, UNET), (self.adapters, ADAPTERS)):
                there, kept = module.state_dict(), _read(folder / file)
                module.load_state_dict({name: fsdp.distribute(t, there.get(name)) for name, t in kept.items()})
            tensors = safetensors.torch.load_file(folder / OPTIMIZER)
            self.optimizer.load_state_dict(
                self.optimizer.state_dict() | {"state": _nested(tensors, record["optimizer"], self.optimizer)}
            )
            self.rate.load_state_dict(record["lr_scheduler"])
            if self.average is not None:
                kept, named = _read(folder / AVERAGE), dict(self.unet.named_parameters())
                for name, shadow in zip(named, self.average.shadow_params, strict=True):
                    shadow.copy_(fsdp.distribute(kept[name], shadow))
                self.average.optimization_step = record["averaged_steps"]
            if self.scaler is not None and record["scaler"] is not None:
                self.scaler.load_state_dict(record["scaler"])
        except (OSError, KeyError, ValueError, RuntimeError, SdgraphError, safetensors.SafetensorError) as error:
            raise TuningError(
                f"the checkpoint cannot be read: {error}",
                where=str(folder),
                hint="delete it; the one before it remains",
            ) from error
        for group, rate in zip(self.optimizer.param_groups, self.rate.get_last_lr(), strict=True):
            group["lr"] = rate
        self.step, self.seconds, self.changes = record["step"], record["seconds"], record["changes"]


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """Return the steps and folders of the checkpoints of a run, in order."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in out.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def read(folder: Path) -> dict[str, Any]:
    """Return the record of a checkpoint.

    Raises:
        TuningError: there is none, or it is damaged.
    """
    hint = "name a folder checkpoint-N of a run; where this one is damaged, delete it, and the one before it remains"
    record = json_object(folder / STATE, TuningError, hint=hint)
    wrong = [name for name, kind in RECORD.items() if not isinstance(record.get(name), kind)]
    wrong += ["step"] * (type(record.get("step")) is not int) + ["seconds"] * (not _is_number(record.get("seconds")))
    if wrong:
        raise TuningError(f"no checkpoint can be read: it has no {wrong[0]}", where=str(folder), hint=hint)
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if record["step"] < 0 or (named and int(named[1]) != record["step"]):
        raise TuningError(
            f"the checkpoint is of step {record['step']}, and its name says another",
            where=str(folder),
            hint=f"name it checkpoint-{record['step']}, or move it out of the folder of the run",
        )
    return record


def read_identity(folder: Path, record: Mapping[str, Any]) -> Identity:
    """Return the identity of the run that a checkpoint, of which the record is read, is of.

    Raises:
        TuningError: a file is damaged.
    """
    rows, hint = folder / ROWS, "delete the checkpoint; the one before it remains"
    if not rows.is_file():
        return Identity(record["identity"], ())
    text = read_text(rows, TuningError, hint=hint)
    try:
        return Identity(record["identity"], tuple(from_json(text)))
    except (ValueError, TypeError) as error:
        raise TuningError(f"{ROWS} cannot be read: {error}", where=str(rows), hint=hint) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, or of the folder of a saved UNet."""
    if not path.is_dir():
        return safetensors.torch.load_file(path)
    recipe = read_recipe(path)
    return read_weights(path / recipe.weights, recipe.files, recipe.names)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _flat(state: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an optimizer as tensors and numbers, by the number of the parameter and the name.

    bitsandbytes wraps what it keeps in 8 bits in a further dict, and reads it without.
    """
    entries: dict[str, Any] = {}
    for number, entry in state.items():
        for name, value in entry.items():
            parts = value if isinstance(value, Mapping) else {name: value}
            entries |= {f"{number}.{part}": content for part, content in parts.items()}
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    return _contiguous(tensors), {name: value for name, value in entries.items() if name not in tensors}


def _nested(
    tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Any]]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            # In the layout of the parameter, or the kernels would go through memory in another order.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(fsdp.distribute(value, parameter))
        state.setdefault(int(number), {})[name] = value
    return state
