"""The settings of a training run, under the names of diffusers' training scripts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch

from ..errors import TuningError, did_you_mean
from ..extra import imported
from ..options import Bounds, Count, Index, NotNegative, Positive, Seed, check

# What may change when a run goes on. The precision that a run computes in is part of its identity instead, because by
# default it depends on the machine.
FREE = ("checkpointing_steps", "checkpoints_total_limit", "validation_steps", "report_to", "mixed_precision")
UNENDING = ("constant", "constant_with_warmup", "piecewise_constant")  # rates that do not depend on the last step
LAST_RATE = 1e-7  # of "polynomial", in diffusers
EMPTY = 0.1  # the default share of captions to leave out

Rates = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"
]
Precision = Literal["no", "fp16", "bf16"]
Samples = Annotated[int, Bounds(ge=1, le=2**24)]
Decay = Annotated[float, Bounds(ge=0, lt=1)]


@dataclass(frozen=True)
class Settings:
    """The settings of a training run, named and defined as in diffusers' training scripts.

    Args:
        max_train_steps: the number of optimizer steps.
        num_train_epochs: instead of the steps: how often to read all rows. An epoch has ceil(rows / rows per step)
            steps, where a step reads `train_batch_size` rows per forward pass, process and accumulated batch.
        train_batch_size: samples per process and forward pass.
        gradient_accumulation_steps: forward passes per optimizer step.
        gradient_checkpointing: recompute the blocks of the student in the backward pass, which saves memory.
        learning_rate: the learning rate after warm-up.
        learning_rates: factors of the learning rate, by patterns of names of parameters, such as
            `{"**.routing.*": 100}`. The first pattern that matches counts. diffusers' scripts have no such option.
        lr_scheduler: "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial" (to
            1e-7) or "piecewise_constant" (with `step_rules`), all as in diffusers.
        lr_warmup_steps: steps over which the learning rate rises from 0.
        lr_num_cycles: the number of cycles of "cosine_with_restarts".
        lr_power: the power of "polynomial".
        step_rules: the rules of "piecewise_constant": factors of the learning rate with the steps before which they
            hold, and the factor of the rest; "1:10,0.1:20,0.01" multiplies by 0.1 from step 10 to step 19.
        adam_beta1: decay of the mean of the gradient, per step.
        adam_beta2: decay of its mean square.
        adam_weight_decay: decay of the weights, relative to the learning rate.
        adam_epsilon: lower bound of the root of the mean square.
        use_8bit_adam: keep the moments of AdamW in 8 bits, which saves three quarters of their memory; with CUDA and
            bitsandbytes.
        max_grad_norm: longer gradients are scaled to this norm; 0 leaves all gradients as they are.
        mixed_precision: "no", "fp16" or "bf16"; by default what `accelerate launch` says, or else bf16 on a GPU that
            has it.
        use_ema: keep a moving average of the weights, which becomes the result.
        ema_decay: decay of the average per step; in the beginning (1 + steps) / (10 + steps).
        proportion_empty_prompts: the share of captions that are left out, for classifier-free guidance. By default 0.1,
            and 0 where the data have no empty caption, or `guidance_pairs` leaves out half of the captions.
        snr_gamma: weigh timesteps by min-SNR with this limit, 5 in the paper, in all losses that have an option
            `snr_gamma` and leave it out; None weighs all alike.
        noise_offset: add one random number per sample and channel, times this, to the noise; 0.1 lets a model learn
            very dark and very bright images. Not for `Prompts`, where no noise is added.
        random_conditioning: give very noisy rows another caption of the data, see `sdgraph.tuning.Batches`.
        timestep_intervals: draw the timesteps of a batch from one of so many equal parts of the schedule, in turns.
        guidance_pairs: fill two rows with every noisy latent, one of them without its caption; batches are even then.
        seed: the seed of all random numbers.
        checkpointing_steps: steps between two checkpoints.
        checkpoints_total_limit: the number of checkpoints to keep; older ones are deleted. None keeps all.
        validation_steps: steps between two validations, of which one is at the end; by default as between checkpoints.
        report_to: the tracker of accelerate, such as "tensorboard" or "wandb"; "all" for all that are installed, "none"
            for none.
    Raises:
        TuningError: a setting has another type, is out of range, or has no effect beside the others.
    Example:
        `sdgraph.tune(..., max_train_steps=5000, learning_rate=5e-5, lr_scheduler="cosine", use_ema=True)`
    Source:
        diffusers' `train_text_to_image.py`; Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy",
        2023; the offset of the noise: Guttenberg, "Diffusion with Offset Noise", 2023.
    """

    max_train_steps: Count | None = None
    num_train_epochs: Count | None = None
    train_batch_size: Samples = 16
    gradient_accumulation_steps: Samples = 1
    gradient_checkpointing: bool = False
    learning_rate: Positive = 1e-5
    learning_rates: Mapping[str, Positive] | None = None
    lr_scheduler: Rates = "constant"
    lr_warmup_steps: Index = 0
    lr_num_cycles: Count = 1
    lr_power: Positive = 1.0
    step_rules: str | None = None
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.999
    adam_weight_decay: NotNegative = 1e-2
    adam_epsilon: Positive = 1e-8
    use_8bit_adam: bool = False
    max_grad_norm: NotNegative = 1.0
    mixed_precision: Precision | None = None
    use_ema: bool = False
    ema_decay: Decay = 0.9999
    proportion_empty_prompts: Decay | None = None
    snr_gamma: Positive | None = None
    noise_offset: NotNegative = 0.0
    random_conditioning: bool = False
    timestep_intervals: Count = 1
    guidance_pairs: bool = False
    seed: Seed = 0
    checkpointing_steps: Count = 500
    checkpoints_total_limit: Count | None = 2
    validation_steps: Count | None = None
    report_to: str = "tensorboard"

    def __post_init__(self) -> None:
        check(self, TuningError)
        self._check_length()
        if self.guidance_pairs and (self.train_batch_size % 2 or self.proportion_empty_prompts):
            raise TuningError(
                "every second row is without its caption, so that batches are even and no other captions are left out",
                where="guidance_pairs",
                hint="pass an even train_batch_size, and leave proportion_empty_prompts out",
            )
        self._check_rate()

    def _check_length(self) -> None:
        """Refuse a run without a length, or with two."""
        if self.max_train_steps is None and self.num_train_epochs is None:
            raise TuningError(
                "max_train_steps is missing",
                where="max_train_steps",
                hint="pass the number of steps, or num_train_epochs",
            )
        if self.max_train_steps is not None and self.num_train_epochs is not None:
            raise TuningError(
                f"num_train_epochs is {self.num_train_epochs}, and the number of steps says how long the run is",
                where="num_train_epochs",
                hint="leave one of them out",
            )

    def _check_rate(self) -> None:
        """Refuse what a schedule of the learning rate leaves unread, or cannot compute."""
        of = {
            "lr_warmup_steps": ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
            "lr_num_cycles": ("cosine_with_restarts",),
            "lr_power": ("polynomial",),
            "step_rules": ("piecewise_constant",),
        }
        for field in fields(self):
            readers = of.get(field.name, (self.lr_scheduler,))
            if getattr(self, field.name) != field.default and self.lr_scheduler not in readers:
                given = f"{field.name} is {getattr(self, field.name)!r}"
                raise TuningError(
                    f"{given}, which lr_scheduler={self.lr_scheduler!r} does not read",
                    where=field.name,
                    hint=f"leave it out, or set lr_scheduler to {' or '.join(map(repr, readers))}",
                )
        if self.lr_scheduler == "piecewise_constant":
            _check_rules(self.step_rules)
        if self.lr_scheduler == "polynomial" and self.learning_rate <= LAST_RATE:
            raise TuningError(
                f"learning_rate is {self.learning_rate}, and 'polynomial' ends at {LAST_RATE}",
                where="learning_rate",
                hint="raise it, or choose another lr_scheduler, such as 'linear', which ends at 0",
            )
        if self.lr_scheduler == "polynomial" and self.lr_warmup_steps >= (self.max_train_steps or math.inf):
            raise TuningError(
                f"lr_warmup_steps is {self.lr_warmup_steps}, which leaves 'polynomial' no step of the run",
                where="lr_warmup_steps",
                hint="pass fewer, or set lr_scheduler to 'constant_with_warmup'",
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """Return the settings of options by name, for a run on this machine.

        Args:
            options: the values by the names of the settings.
        Raises:
            TuningError: there is no such option, or its value is impossible, or this machine has no such precision or
                tracker.
            ExtraError: accelerate is not installed.
        """
        cls.check_names(options)
        settings = cls(**options)
        _check_launched()
        _check_precision(settings.precision())
        _check_tracker(settings.report_to)
        if settings.use_8bit_adam:
            _check_8bit()
        return settings

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Refuse names that are no settings.

        Args:
            names: the names of options.
        Raises:
            TuningError: there is no such option; the error names the closest one.
        """
        known = [field.name for field in fields(cls)]
        for name in names:
            if name not in known:
                hint = ELSEWHERE.get(name) or did_you_mean(name, known) or f"options: {', '.join(known)}"
                raise TuningError(f"there is no option {name!r} of a training run", where=name, hint=hint)

    @property
    def last_step(self) -> int:
        """The number of the last optimizer step, which `counted` computes from epochs."""
        assert self.max_train_steps is not None
        return self.max_train_steps

    def counted(self, rows: int, size: int) -> Settings:
        """Return the settings with the number of steps, computed from epochs if they have these.

        Args:
            rows: the number of rows of the data.
            size: the number of rows that a step reads, of all processes and accumulated batches together.
        """
        if self.num_train_epochs is None:
            return self
        return replace(self, max_train_steps=self.num_train_epochs * math.ceil(rows / size), num_train_epochs=None)

    def precision(self) -> str:
        """Return the precision of a run on this machine."""
        if self.mixed_precision is not None:
            return self.mixed_precision
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return launched or ("bf16" if bf16 else "no")

    def for_data(self, has_empty: bool) -> Settings:
        """Return the settings with the default share of captions that are left out, if they have none.

        Args:
            has_empty: whether the data have the conditions of an empty caption.
        """
        if self.proportion_empty_prompts is not None:
            return self
        share = EMPTY if has_empty and not self.guidance_pairs else 0.0
        return replace(self, proportion_empty_prompts=share)

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
        if step > self.last_step:
            raise TuningError(
                f"the checkpoint is at step {step}, beyond the {self.last_step} steps of this run",
                where=where,
                hint="pass at least as many steps, or another `output_dir`",
            )
        for field in fields(self):
            name, mine = field.name, getattr(self, field.name)
            if name in FREE or mine == saved.get(name, field.default):
                continue
            if name == "max_train_steps" and self.lr_scheduler in UNENDING and endless:
                continue
            raise TuningError(
                f"the checkpoint was written with {name}={saved.get(name)!r}, and now it is {mine!r}",
                where=where,
                hint="pass the settings of before, or another `output_dir`; to begin anew in this one, delete its "
                "checkpoints",
            )


HUB = (
    "a run writes to its folder only, so that no setting publishes anything; the result is a folder that diffusers "
    "loads: look at its images, and upload it with `hf upload NAME FOLDER`"
)
ELSEWHERE = {  # names of diffusers' scripts, and of others, for what has another name here
    "prediction_type": "pass a scheduler with this prediction_type",
    "dataloader_num_workers": "it is an option of the data: sdgraph.tuning.Images(..., dataloader_num_workers=4)",
    "push_to_hub": HUB,
    "hub_token": HUB,
    "hub_model_id": HUB,
    "enable_xformers_memory_efficient_attention": "PyTorch's attention is used, which needs as little memory",
    "steps": "did you mean 'max_train_steps'?",
    "out": "did you mean 'output_dir'?",
    "scale_lr": "multiply learning_rate by hand",
}


def _check_rules(rules: str | None) -> None:
    """Refuse rules that are not factors with rising steps, and a factor at the end."""
    try:
        *pairs, last = (rules or "").split(",")
        factors, steps = zip(*(pair.split(":") for pair in pairs), strict=True) if pairs else ((), ())
        numbers, ends = [float(factor) for factor in (*factors, last)], [0, *map(int, steps)]
        right = all(0 < n < math.inf for n in numbers) and all(a < b for a, b in pairwise(ends))
    except ValueError:
        right = False
    if not right:
        raise TuningError(
            f"step_rules is {rules!r}",
            where="step_rules",
            hint="factors above 0 with the steps before which they hold, rising, and the factor of the rest: "
            "'1:1000,0.1:2000,0.01'",
        )


def _check_launched() -> None:
    """Refuse an accumulation of gradients by accelerate, which would divide the loss once more."""
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise TuningError(
            "accelerate launch accumulates gradients, and so does the run, by its own setting",
            where="accelerate launch --gradient_accumulation_steps",
            hint="leave it out there, and set gradient_accumulation_steps of the run",
        )


def _check_precision(precision: str) -> None:
    bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    if precision not in ("no", "bf16", "fp16") or (precision == "fp16" and not torch.accelerator.is_available()):
        raise TuningError(
            f"mixed_precision is {precision!r}, which this machine does not train in",
            where="mixed_precision",
            hint=f"'no'{', or bf16' if bf16 else ''}; fp16 needs a GPU",
        )
    if precision == "bf16" and not bf16:
        raise TuningError(
            "mixed_precision is 'bf16', which this GPU does not have", where="mixed_precision", hint="fp16"
        )


def _check_8bit() -> None:
    if not torch.cuda.is_available():
        raise TuningError(
            "use_8bit_adam needs CUDA, which this machine does not have",
            where="use_8bit_adam",
            hint="leave it out: AdamW is used, whose moments take two numbers of 32 bits per weight",
        )
    imported("bitsandbytes", "8bit")


def _check_tracker(name: str) -> None:
    imported("accelerate", "tuning")
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [str(kind.value) for kind in LoggerType]
    if name in ("none", "all"):
        return
    if name not in known:
        hint = did_you_mean(name, known) or f"one of {', '.join(known)}; or 'none'"
        raise TuningError(f"report_to is {name!r}, which is no tracker of accelerate", where="report_to", hint=hint)
    if name not in map(str, get_available_trackers()):
        raise TuningError(
            f"report_to is {name!r}, which is not installed",
            where="report_to",
            hint=f"pip install {name.replace('_', '-')}; or report_to='none'",
        )
