"""The settings of a training run, under the names of diffusers' training scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import TuningError, did_you_mean

FREE = ("checkpointing_steps", "checkpoints_total_limit", "validation_steps", "report_to")  # may change on resume
EVEN = ("constant", "constant_with_warmup")  # schedules of the learning rate that do not know their end


@dataclass(frozen=True)
class Settings:
    """The settings of a training run, named and defined as in diffusers' training scripts.

    Args:
        max_train_steps: the number of optimizer steps.
        train_batch_size: samples per process and forward pass.
        gradient_accumulation_steps: forward passes per optimizer step.
        gradient_checkpointing: compute the blocks of the student again on the way back, to save memory.
        learning_rate: the learning rate after warm-up.
        learning_rates: factors of the learning rate, by patterns of names of parameters, such as
            `{"**.routing.*": 100}`. The first pattern that matches counts. diffusers' scripts have no such option.
        lr_scheduler: "constant", "constant_with_warmup", "linear", "cosine" and the others of diffusers.
        lr_warmup_steps: steps over which the learning rate rises.
        adam_beta1: decay of the mean of the gradient, per step.
        adam_beta2: decay of its mean square.
        adam_weight_decay: decay of the weights, relative to the learning rate.
        adam_epsilon: lower bound of the root of the mean square.
        max_grad_norm: longer gradients are scaled to this norm.
        mixed_precision: "no", "fp16" or "bf16"; by default bf16 on a GPU that has it.
        use_ema: keep a moving average of the weights, which becomes the result.
        ema_decay: decay of the average per step; in the beginning (1 + steps) / (10 + steps).
        proportion_empty_prompts: the share of captions that are left out, for classifier-free guidance.
        random_conditioning: see `sdgraph.tuning.Batches`.
        timestep_intervals: see `sdgraph.tuning.Batches`.
        guidance_pairs: see `sdgraph.tuning.Batches`; half of the captions are left out then, and batches are even.
        seed: of all random numbers.
        checkpointing_steps: steps between two checkpoints.
        checkpoints_total_limit: the number of checkpoints to keep; older ones are deleted.
        validation_steps: steps between two validations, of which one is at the end; by default as between checkpoints.
        report_to: the tracker of accelerate, such as "tensorboard" or "wandb"; "none" for none.
    Source:
        diffusers' `train_text_to_image.py`.
    """

    max_train_steps: int
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-5
    learning_rates: Mapping[str, float] | None = None
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: str | None = None
    use_ema: bool = False
    ema_decay: float = 0.9999
    proportion_empty_prompts: float = 0.0
    random_conditioning: bool = False
    timestep_intervals: int = 1
    guidance_pairs: bool = False
    seed: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    validation_steps: int | None = None
    report_to: str = "tensorboard"

    def __post_init__(self) -> None:
        positive = [f.name for f in fields(self) if f.type == "int" and f.name not in ("seed", "lr_warmup_steps")]
        for name in positive:
            if getattr(self, name) < 1:
                raise TuningError(f"{name} is {getattr(self, name)}", where=name, hint="pass a number of at least 1")
        for name in ("proportion_empty_prompts", "ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise TuningError(
                    f"{name} is {getattr(self, name)}", where=name, hint="pass a number from 0 to below 1"
                )
        for pattern, factor in (self.learning_rates or {}).items():
            if not 0 < factor < math.inf:
                raise TuningError(
                    f"the factor of {pattern!r} is {factor}", where="learning_rates", hint="pass a number above 0"
                )
        if self.guidance_pairs and (self.train_batch_size % 2 or self.proportion_empty_prompts):
            raise TuningError(
                "every second row is without its caption, so that batches are even and no other captions are left out",
                where="guidance_pairs",
                hint="pass an even train_batch_size, and proportion_empty_prompts=0",
            )
        if self.mixed_precision not in (None, "no", "fp16", "bf16"):
            raise TuningError(
                f"there is no precision {self.mixed_precision!r}", where="mixed_precision", hint="no, fp16 or bf16"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """Return the settings of options by name.

        Raises:
            TuningError: there is no such option, or its value is impossible.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                hint = did_you_mean(name, known) or f"options: {', '.join(known)}"
                raise TuningError(f"there is no option {name!r} of a training run", where=name, hint=hint)
        return cls(**options)

    def check_resumed(self, saved: Mapping[str, Any], step: int, where: str, endless: bool = True) -> None:
        """Refuse to go on with other settings, for the result would be that of neither.

        Args:
            saved: the settings of the checkpoint, as a dict.
            step: the step of the checkpoint.
            where: the checkpoint.
            endless: whether the weights of the losses do not depend on the number of steps.
        Raises:
            TuningError: settings differ, or the checkpoint is beyond the last step. More steps are fine where neither
                the learning rate nor a loss depends on their number.
        """
        if step > self.max_train_steps:
            raise TuningError(
                f"the checkpoint is at step {step}, beyond the {self.max_train_steps} steps of this run",
                where=where,
                hint="pass at least as many steps, or another `out`",
            )
        for field in fields(self):
            name, mine = field.name, getattr(self, field.name)
            if name in FREE or mine == saved.get(name):
                continue
            if name == "max_train_steps" and self.lr_scheduler in EVEN and endless:
                continue
            raise TuningError(
                f"the checkpoint was written with {name}={saved.get(name)!r}, and now it is {mine!r}",
                where=where,
                hint="pass the settings of before, or another `out`; to begin anew in this one, delete its checkpoints",
            )
