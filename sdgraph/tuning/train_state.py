"""The state of a training run: weights, moments, averages and the learning rate, and its checkpoints, bit for bit.

A checkpoint has the layout of diffusers' scripts: `unet/` and `unet_ema/` are saved UNets. The rest is safetensors and
JSON; nothing is pickled. Random numbers have no state, because they follow from the number of the step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..atomic import appearing
from ..errors import PathError, SdgraphError, TuningError, did_you_mean
from ..extra import imported
from ..ir.regions import matching
from ..runtime.recipe import read_recipe
from ..runtime.serialization import save
from ..runtime.unet import GraphUNet
from ..runtime.weight_files import read_weights
from ..text import from_json, json_object, read_text
from . import fsdp
from .identity import Identity, versions
from .settings import Settings

STATE, OPTIMIZER, ADAPTERS = "state.json", "optimizer.safetensors", "adapters.safetensors"
FORMAT = 1  # of a checkpoint: its files, and what its record has
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
    """Everything that a training step changes.

    Args:
        unet: the student.
        adapters: the modules that are trained with it and thrown away afterwards.
        optimizer: the optimizer of the parameters of both.
        lr_scheduler: the schedule of the learning rate.
        average: the moving average of the student's weights, if one is kept.
        scaler: the scaler of the loss, in fp16.
        unsharded: another UNet like the student, on the CPU, if the student's weights are sharded over processes.
    """

    def __init__(
        self,
        unet: GraphUNet,
        adapters: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        average: EMAModel | None,
        scaler: Any = None,
        unsharded: GraphUNet | None = None,
    ) -> None:
        self.unet, self.adapters, self.optimizer, self.lr_scheduler = unet, adapters, optimizer, lr_scheduler
        self.average, self.scaler, self.unsharded = average, scaler, unsharded
        self.step, self.seconds = 0, 0.0
        self.changes: list[dict[str, int]] = []  # of the rows of data: the step before which, and how many
        self.consistent = True  # whether all of it is of the same step

    @classmethod
    def create(
        cls,
        unet: GraphUNet,
        adapters: nn.Module,
        trained: Sequence[nn.Parameter],
        settings: Settings,
        accelerator: Any,
        unsharded: GraphUNet | None,
    ) -> TrainState:
        """Return the state before the first step.

        Args:
            unet: the student.
            adapters: the modules that are trained with it.
            trained: the parameters that are trained, of both.
            settings: the settings of the run.
            accelerator: the accelerator, which prepares the optimizer.
            unsharded: another UNet like the student, if its weights are sharded.
        Raises:
            TuningError: a pattern of `learning_rates` names no parameter.
            ExtraError: bitsandbytes is not installed, and `use_8bit_adam` is set.
        """
        options: dict[str, Any] = {
            "lr": settings.learning_rate,  # which "polynomial" reads, beside those of the groups
            "betas": (float(settings.adam_beta1), float(settings.adam_beta2)),
            "weight_decay": settings.adam_weight_decay,
            "eps": settings.adam_epsilon,
        }
        groups = parameter_groups(trained, unet, settings)
        optimizer: torch.optim.Optimizer
        if settings.use_8bit_adam:
            optimizer = imported("bitsandbytes", "8bit").optim.AdamW8bit(groups, **options)
        else:
            optimizer = torch.optim.AdamW(groups, fused=True, **options)
        lr_scheduler = get_scheduler(
            settings.lr_scheduler,
            optimizer,
            step_rules=settings.step_rules,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.last_step,
            num_cycles=settings.lr_num_cycles,
            power=settings.lr_power,
        )
        average = EMAModel(unet.parameters(), decay=settings.ema_decay) if settings.use_ema else None
        prepared = accelerator.prepare(optimizer)
        return cls(unet, adapters, prepared, lr_scheduler, average, accelerator.scaler, unsharded)

    @property
    def sharded(self) -> bool:
        """Whether the weights are sharded over processes, which can only save them together."""
        return self.unsharded is not None

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step, without the factors of `learning_rates`."""
        return float(self.lr_scheduler.get_last_lr()[0])

    @contextmanager
    def averaged(self) -> Iterator[GraphUNet]:
        """Return a context with the student with its averaged weights, in evaluation mode."""
        if self.unsharded is not None:
            try:
                yield self.result()
            finally:
                self.unsharded.to("cpu")
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
        """Return the student with its averaged weights for good, or a copy of it if its weights are sharded."""
        if self.unsharded is not None:
            names = self.unsharded.state_dict()
            self.unsharded.load_state_dict({n: t for n, t in self._averages(self._weights()).items() if n in names})
            return self.unsharded.to(self.unet.device)
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
        """Take an optimizer step along the gradients in the parameters, and average the weights."""
        self.consistent = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not getattr(self.optimizer, "step_was_skipped", False):  # in fp16, as accelerate's schedules do
            self.lr_scheduler.step()
        if self.average is not None:
            self.average.step(self.unet.parameters())
        self.step += 1
        self.consistent = True

    def save(self, output_dir: Path | None, settings: Settings, identity: Identity) -> None:
        """Write a checkpoint atomically, and then delete the oldest ones beyond their limit.

        Args:
            output_dir: the folder of the run; None in all processes but the main one, which send their shards.
            settings: the settings of the run.
            identity: all else that decides the result.
        Raises:
            TuningError: nothing can be written there; earlier checkpoints are kept.
        """
        main = output_dir is not None
        weights = self._weights(main)
        averages = self._averages(weights, main)
        tensors, numbers = _flat(self.optimizer.state_dict()["state"])
        moments = fsdp.gather(tensors, main)
        adapters = fsdp.gather(_contiguous(self.adapters.state_dict()), main)
        if output_dir is None:
            return
        target = output_dir / f"checkpoint-{self.step}"
        graph = (self.unsharded or self.unet).graph  # sharding gives modules hooks and classes, which are not saved
        try:
            with appearing(target, lambda _: None, TuningError) as folder:
                save(graph, weights, self.unet.config, folder / UNET)
                if self.average is not None:
                    save(graph, averages, self.unet.config, folder / AVERAGE)
                safetensors.torch.save_file(moments, folder / OPTIMIZER)
                safetensors.torch.save_file(adapters, folder / ADAPTERS)
                record = {
                    "format": FORMAT,
                    "step": self.step,
                    "seconds": self.seconds,
                    "settings": asdict(settings),
                    "identity": dict(identity.parts),
                    "versions": versions(),
                    "changes": self.changes,
                    "optimizer": numbers,
                    "lr_scheduler": self.lr_scheduler.state_dict(),
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
        before = [folder for step, folder in checkpoints(output_dir) if step < self.step]
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
            self.lr_scheduler.load_state_dict(record["lr_scheduler"])
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
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.step, self.seconds, self.changes = record["step"], record["seconds"], record["changes"]


def training_dtype(unet: GraphUNet) -> torch.dtype:
    """Return the precision in which the weights of a UNet are trained, at least float32."""
    return torch.promote_types(unet.dtype, torch.float32)


def parameter_groups(trained: Iterable[nn.Parameter], student: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer, first those whose learning rate has no factor.

    Args:
        trained: the parameters that are trained, of the student and others.
        student: the module whose parameters the patterns of `learning_rates` name.
        settings: the settings of the run.
    Raises:
        TuningError: a pattern names no parameter.
    """
    named = dict(student.named_parameters())
    factors: dict[nn.Parameter, float] = {}
    for pattern, factor in (settings.learning_rates or {}).items():
        for name in _matching(pattern, named):
            factors.setdefault(named[name], factor)
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for parameter in trained:
        groups.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    return [{"params": params, "lr": factor * settings.learning_rate} for factor, params in groups.items()]


def _matching(pattern: str, named: Mapping[str, nn.Parameter]) -> list[str]:
    try:
        return matching(pattern, list(named), named.__getitem__)
    except (PathError, KeyError) as error:
        hint = did_you_mean(pattern, named) or "patterns of names of parameters, such as '**.routing.*'"
        raise TuningError(f"no parameter is named {pattern!r}", where="learning_rates", hint=hint) from error


def checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Return the steps and folders of the checkpoints of a run, in order."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def checkpoint_to_resume(output_dir: Path, wanted: str | Path | None) -> Path | None:
    """Return the checkpoint that a run goes on from, None if it begins.

    Args:
        output_dir: the folder of the run.
        wanted: "latest", a folder, or None to begin.
    Raises:
        TuningError: the folder is missing, or a run that is to begin would replace another.
    """
    kept = checkpoints(output_dir)
    if wanted == "latest":
        return kept[-1][1] if kept else None
    if wanted is not None:
        folder = Path(wanted) if Path(wanted).exists() else output_dir / wanted
        if not folder.is_dir():
            raise TuningError(
                f"there is no checkpoint {str(wanted)!r}",
                where="resume_from_checkpoint",
                hint=f"there are {', '.join(path.name for _, path in kept) or 'none'} in {output_dir}; "
                "or pass 'latest'",
            )
        return folder
    if kept:
        raise TuningError(
            f"{output_dir} holds the checkpoints of another run",
            where="output_dir",
            hint="pass resume_from_checkpoint='latest' to go on with it, or another folder",
        )
    return None


def read(folder: Path) -> dict[str, Any]:
    """Return the record of a checkpoint.

    Raises:
        TuningError: there is none, it is damaged, or it has another format.
    """
    hint = "name a folder checkpoint-N of a run; where this one is damaged, delete it, and the one before it remains"
    record = json_object(folder / STATE, TuningError, hint=hint, format=FORMAT)
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
