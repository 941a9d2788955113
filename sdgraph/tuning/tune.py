"""The training loop: a student learns from its teacher until it has taken all steps, or stops with its state kept."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor

from ..atomic import owned
from ..errors import TuningError
from ..extra import imported
from ..ir.guards import check_call
from ..options import Bounds, Count, Text, checked
from ..progress import Bar, note
from ..runtime.apply import apply
from ..runtime.unet import GraphUNet
from . import fsdp
from .batch import Batch, Batches
from .checks import (
    check_differs,
    check_inputs,
    check_models,
    check_output,
    check_results,
    checkpoint_to_resume,
    has_empty,
)
from .feature_extractor import FeatureExtractor
from .identity import Identity, tell_of_versions, versions
from .losses import Denoising, Features, Loss, Output
from .noise_schedule import NoiseSchedule
from .objective import Objective, Student
from .rates import by_rate
from .report import LOG, Log, TuningReport
from .settings import Settings
from .sources import Source, as_source
from .train_state import TrainState, read, read_identity
from .train_step import TrainStep

DEFAULT = (Output(), Features("stage", weight=10.0), Denoising(weight=0.01))
log = logging.getLogger("sdgraph")
Validate = Callable[[GraphUNet, int], Mapping[str, Any]]


@checked(TuningError)
def tune(
    student: GraphUNet,
    teacher: GraphUNet | UNet2DConditionModel,
    data: Source | Iterable[Mapping[str, Tensor]],
    *,
    scheduler: Any,
    steps: Count | None = None,
    out: Text | Path,
    losses: Annotated[Sequence[Loss], Bounds(length=1)] | None = None,
    train: Annotated[Sequence[Text], Bounds(length=1)] | None = None,
    validate: Validate | None = None,
    resume_from_checkpoint: str | Path | None = "latest",
    **settings: Any,
) -> tuple[GraphUNet, TuningReport]:
    """Train a student to predict what its teacher predicts, and return the tuned student.

    The run is kept in `out`: `checkpoint-N/` as diffusers' scripts write it, `unet/` with the result, which diffusers
    alone loads too where a plain model computes the same, `tuning.json` with the recipe, `loss.csv` and `loss.svg`. The
    same call goes on from the last checkpoint, and what it computes equals an uninterrupted run bit for bit on one
    CPU. Started by `accelerate launch`, it runs on several GPUs or machines, as distributed data parallel; with
    `--use_fsdp` the weights are spread over them.

    Weights in half precision are trained in float32, in which small steps are not lost, and returned in their own
    precision; the checkpoints keep what was trained. `mixed_precision` says in which precision the models compute.

    Ctrl-C and SIGTERM stop a run after a whole step, which is kept as a checkpoint; the log says which.

    Args:
        student: the UNet to train, as `sdgraph.apply` returns it. It stays as it is; a copy is trained.
        teacher: the UNet to learn from, most often the one that the student was derived from. It stays as it is.
        data: latents and conditions: a source of `sdgraph.tuning`, or an iterable of dicts of tensors.
        scheduler: the diffusers scheduler that says how noise is added and what the UNet predicts.
        steps: the number of optimizer steps; or else `num_train_epochs` says how long the run is.
        out: the folder of the run.
        losses: the terms to minimise; by default the teacher's output, ten times its features by stage, and, if the
            data are no trajectories, a hundredth of the denoising loss.
        train: module paths, or patterns of `sdgraph.Graph.matching`, whose weights are trained; by default all.
        validate: called with the student (its averaged weights) and the step; returns figures and PIL images by name,
            which are logged and written to `out/validation`.
        resume_from_checkpoint: "latest", a folder `checkpoint-N`, or None to begin in a folder without checkpoints.
        settings: see `sdgraph.tuning.Settings`.
    Returns:
        The tuned student in evaluation mode, with its averaged weights where `use_ema` is set; and the log of the run.
    Raises:
        TuningError: the models do not fit each other, the data are unusable, a checkpoint belongs to another run, or a
            loss is not finite. What was saved is kept.
        PathError: a loss names a module that student or teacher does not have.
        ExtraError: accelerate, or the tracker, is not installed.
    Example:
        ```python
        student = sdgraph.apply(pipe.unet, [PruneBlocks("bk-sdm-base")])
        tuned, report = sdgraph.tune(
            student, pipe.unet, data, scheduler=pipe.scheduler, steps=5000, out="tuned", learning_rate=5e-5
        )
        ```
    Source:
        Kim et al., "BK-SDM", 2024, whose features outweigh the other terms, as ours do; the weight of the denoising
        loss: Zhang et al., "ALTER", 2025. Exact resume is our own.
    """
    chosen, folder = Settings.of({"max_train_steps": steps, **settings}), Path(out)
    source = as_source(data)
    check_output(folder, (student, teacher), source)
    teaching = apply(teacher, (), verify=False)
    chosen = chosen.for_data(has_empty(source))
    check_models(student, teaching)
    noise_schedule = NoiseSchedule.of(scheduler)
    row = _batches(source, noise_schedule, chosen, 1).batch(0, [0])
    check_inputs((student, teaching), row.inputs)
    for unet in (student, teaching):
        check_call(unet.graph.resolved_inputs(), unet.graph.guards, row.inputs, _at_least_float32(unet))
    check_differs(student, teaching, row.inputs)
    terms = _terms(losses, row, chosen)
    with fsdp.enabled() as spread:
        accelerator = _accelerator(chosen, folder)
    chosen = chosen.counted(len(source), _batches(source, noise_schedule, chosen, accelerator.num_processes).latents)
    spread = spread and accelerator.num_processes > 1
    if spread and chosen.use_8bit_adam:
        raise TuningError("weights that are spread over processes have moments in 32 bits", where="use_8bit_adam",
                          hint="leave it out: every process keeps its share of the moments alone")  # fmt: skip
    if spread and accelerator.scaler is not None:
        raise TuningError("weights that are spread over processes train in bf16", where="mixed_precision", hint="bf16")
    with alone(folder), terminable():
        accelerator.wait_for_everyone()
        resumed = checkpoint_to_resume(folder, resume_from_checkpoint)
        taught = copy.deepcopy(student).to(_at_least_float32(student)).requires_grad_(train is None).train()
        for path in taught.graph.matching(train) if train is not None else ():
            for parameter in taught.graph.region(path).parameters.values():
                parameter.requires_grad_(True)
        gradient = _gradient(taught, teaching, source, noise_schedule, terms, chosen, accelerator, spread)
        beside = copy.deepcopy(student).to("cpu", _at_least_float32(student)) if spread else None
        state = _state(taught, gradient, chosen, beside)
        precision = accelerator.mixed_precision
        identity = Identity.of(
            student, teaching, source, noise_schedule, terms, train, gradient.batches.size, precision
        )
        if resumed is not None:
            _resume(state, resumed, identity, chosen, terms)
            if accelerator.is_main_process:
                note(f"tuning goes on from {resumed}, step {state.step} of {chosen.steps}")
        if chosen.report_to != "none":
            accelerator.init_trackers("logs")
        _train(state, gradient, identity, chosen, folder, validate, student.dtype)
        for tracker in accelerator.trackers:
            tracker.finish()  # and no end_training(), after which these processes could not train any more
        record = {
            "settings": dataclasses.asdict(chosen),
            **identity.parts,
            "changes of the data": state.changes,
            "versions": versions(),
            "passes": [str(applied.one) for applied in student.graph.passes],
        }
        tuned = _as(state.result().requires_grad_(False).eval(), student.dtype)
        return _finished(tuned, folder, record if accelerator.is_main_process else None)


def alone(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Return a context in which no other run writes to a folder; processes of one run share it.

    Raises:
        TuningError: another run is writing there; the error says which process.
    """
    process = imported("accelerate", "tuning").PartialState(cpu=not torch.accelerator.is_available())
    return owned(folder, TuningError, "out") if process.is_main_process else contextlib.nullcontext()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the process by an exception, as SIGINT does, where nothing else handles it.

    The exit status is then 143, as of a process that the signal has ended.
    """

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()  # others may not handle signals
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _resume(
    state: TrainState, checkpoint: Path, identity: Identity, settings: Settings, losses: Sequence[Loss]
) -> None:
    """Take over the state of a checkpoint of the same run."""
    record = read(checkpoint)
    changes = identity.check(read_identity(checkpoint, record), checkpoint)
    fading = any(loss.until is not None for loss in losses)
    settings.check_resumed(record["settings"], record["step"], str(checkpoint), endless=not fading)
    tell_of_versions(record.get("versions", {}))
    state.load(checkpoint)
    if changes:
        state.changes.append({"step": state.step, **changes})


def _train(
    state: TrainState,
    gradient: TrainStep,
    identity: Identity,
    settings: Settings,
    folder: Path,
    validate: Validate | None,
    dtype: torch.dtype,
) -> None:
    """Take all steps that are left. If anything fails, the steps before it are kept in a checkpoint."""
    accelerator, steps = gradient.accelerator, settings.steps
    main, begun, saved = accelerator.is_main_process, time.monotonic() - state.seconds, state.step
    taken = [p.requires_grad for p in state.unet.parameters()]

    def save() -> None:
        nonlocal saved
        saved = state.step
        state.save(folder if main else None, settings, identity)
        accelerator.wait_for_everyone()

    bar = Bar(total=steps, initial=state.step, desc="tuning", unit="step", disable=not main)
    with Log(folder / LOG if main else None, gradient.objective.names, state.step) as lines, bar:
        try:
            while state.step < steps:
                figures: dict[str, float] = {
                    "learning_rate": float(state.rate.get_last_lr()[0]),
                    **gradient(state.step),
                }
                wrong = [name for name, figure in figures.items() if not math.isfinite(figure)]
                if accelerator.scaler is not None and wrong == ["gradient_norm"]:
                    wrong = []  # the optimizer leaves such a step out, and the scale of the loss is lowered
                if wrong:
                    save()
                    raise TuningError(
                        f"{' and '.join(wrong)} of step {state.step} is not finite",
                        where=str(folder / f"checkpoint-{state.step}"),
                        hint="the state before it is kept there; lower learning_rate, or use bf16 instead of fp16",
                    )
                state.advance()
                state.seconds = time.monotonic() - begun
                lines.write(state.step, state.seconds, figures)
                accelerator.log(figures, state.step)
                bar.update()
                bar.set_postfix(loss=f"{figures['loss']:.4f}")
                last = state.step == steps
                if last or state.step % settings.checkpointing_steps == 0:
                    save()
                due = last or state.step % (settings.validation_steps or settings.checkpointing_steps) == 0
                if validate is not None and due:
                    with state.averaged() as unet:
                        results = validate(_as(unet, dtype), state.step) if main else {}
                        _record(results, state.step, folder, accelerator)
                    if main and taken != [p.requires_grad for p in state.unet.parameters()]:
                        raise TuningError(
                            "validation has changed which weights of the student are trained",
                            where="validate",
                            hint="work on a copy: copy.deepcopy(unet)",
                        )
        except BaseException as reason:
            # Processes that share the weights can only save together, and the others know nothing of this.
            if main and state.whole and state.step > saved and not state.spread:
                with contextlib.suppress(TuningError):  # the first error tells more than that of a full disk
                    state.save(folder, settings, identity)
                    saved = state.step
            if main:
                _tell(reason, state.step, steps, folder / f"checkpoint-{saved}")
            raise


def _tell(reason: BaseException, step: int, steps: int, checkpoint: Path) -> None:
    """Say in the log at which step a run has stopped, and how to go on."""
    kept = f"{checkpoint} is kept" if checkpoint.exists() else "there is no checkpoint yet"
    again = "The same call, or the same command, goes on from there: resume_from_checkpoint='latest' is the default"
    again = again if checkpoint.exists() else "The same call, or the same command, begins anew"
    interrupted = not isinstance(reason, Exception)  # other errors say what to do
    log.warning("stopped after step %d of %d; %s%s", step, steps, kept, f". {again}" if interrupted else "")


def _accelerator(settings: Settings, folder: Path) -> Any:
    accelerate = imported("accelerate", "tuning")
    tracked = settings.report_to != "none"
    try:
        accelerator = accelerate.Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=settings.precision(),
            log_with=settings.report_to if tracked else None,
            project_dir=folder,
        )
    except ValueError as error:  # accelerate allows one precision in a process, and names its own trackers
        raise TuningError(
            f"accelerate refuses: {error}", where="mixed_precision, report_to", hint="start Python anew for another"
        ) from error
    kinds = accelerate.DistributedType
    if accelerator.distributed_type in (kinds.DEEPSPEED, kinds.MEGATRON_LM, kinds.XLA):
        raise TuningError(
            f"{accelerator.distributed_type.value} is not supported",
            where="accelerate",
            hint="use distributed data parallel; or FSDP, which spreads the weights over processes",
        )
    return accelerator


def _batches(source: Source, noise_schedule: NoiseSchedule, settings: Settings, processes: int) -> Batches:
    return Batches(
        source,
        noise_schedule,
        settings.train_batch_size * settings.gradient_accumulation_steps * processes,
        settings.seed,
        settings.proportion_empty_prompts or 0.0,
        settings.random_conditioning,
        settings.timestep_intervals,
        settings.guidance_pairs,
        settings.noise_offset,
    )


def _terms(losses: Sequence[Loss] | None, row: Batch, settings: Settings) -> list[Loss]:
    """Return the losses of a run, by default those that its data allow, with the weights of timesteps that it sets.

    Args:
        losses: the losses that were asked for.
        row: a row of the data.
        settings: of the run.
    Raises:
        TuningError: a loss cannot be computed on the data, or none weighs timesteps and they are to be weighed.
    """
    if losses is None:
        losses = [loss for loss in DEFAULT if row.noise is not None or not isinstance(loss, Denoising)]
    for loss in losses:
        loss.check(row)
    gamma, terms = settings.snr_gamma, [copy.copy(loss) for loss in losses]
    weighed = [term for term in terms if getattr(term, "snr_gamma", gamma) is None]
    for term in weighed:
        object.__setattr__(term, "snr_gamma", gamma)  # and no replace(), which would lose what is no field
    if gamma is not None and not weighed:
        raise TuningError(
            f"snr_gamma is {gamma}, and no loss takes it: {', '.join(map(str, losses))}",
            where="snr_gamma",
            hint="leave it out; Output, Denoising and Guidance weigh timesteps, where their own snr_gamma is left out",
        )
    return terms


def _gradient(
    student: GraphUNet,
    teacher: GraphUNet,
    source: Source,
    noise_schedule: NoiseSchedule,
    losses: Sequence[Loss],
    settings: Settings,
    accelerator: Any,
    spread: bool,
) -> TrainStep:
    """Put the models on their device, and connect them with the data and the losses."""
    batches = _batches(source, noise_schedule, settings, accelerator.num_processes)
    objective, given = Objective(losses, student, teacher), frozenset(batches.batch(0, [0]).inputs)
    student.to(accelerator.device)
    if accelerator.device.type == "cpu" and not all(p.requires_grad for p in student.parameters()):
        # In channels_last, torch's group norm crashes on the way back where its input needs no gradient. The strides
        # of 1x1 kernels count as both layouts, so that contiguous() would leave them.
        for parameter in student.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
        accelerator.mixed_precision, _at_least_float32(teacher)
    )
    if (teacher.device, teacher.dtype) != (accelerator.device, precision):
        teacher = copy.deepcopy(teacher).to(accelerator.device, precision)
    watched = FeatureExtractor(teacher, objective.teachers, given)
    torch.manual_seed(settings.seed)  # of the first weights of adapters
    model = Student(student, objective.pairs, teacher, given, settings.gradient_checkpointing)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if spread:
        prepared = accelerator.prepare_model(model, evaluation_mode=True)  # for its precision alone
        fsdp.shard(prepared, student)
    else:
        prepared = accelerator.prepare(model)
    trained = [model.get_parameter(name) for name in names]
    return TrainStep(
        accelerator, settings, batches, noise_schedule.to(accelerator.device), objective, watched, prepared, trained
    )


def _state(student: GraphUNet, gradient: TrainStep, settings: Settings, copy: GraphUNet | None) -> TrainState:
    """Create the optimizer, the schedule of its rate, and the moving average."""
    accelerator = gradient.accelerator
    options: dict[str, Any] = {
        "lr": settings.learning_rate,  # which "polynomial" reads, beside those of the groups
        "betas": (float(settings.adam_beta1), float(settings.adam_beta2)),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }
    groups = by_rate(gradient.trained, student, settings)
    optimizer: torch.optim.Optimizer
    if settings.use_8bit_adam:
        optimizer = imported("bitsandbytes", "8bit").optim.AdamW8bit(groups, **options)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    rate = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        step_rules=settings.step_rules,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.steps,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )
    average = EMAModel(student.parameters(), decay=settings.ema_decay) if settings.use_ema else None
    adapters = accelerator.unwrap_model(gradient.student).adapters
    return TrainState(student, adapters, accelerator.prepare(optimizer), rate, average, accelerator.scaler, copy)


def _record(results: Mapping[str, Any], step: int, folder: Path, accelerator: Any) -> None:
    """Log the figures and images of a validation, and write the images."""
    accelerator.log(check_results(results), step)
    images = {name: image for name, image in results.items() if hasattr(image, "save")}
    for name, image in images.items():
        path = folder / "validation" / f"{name}-{step:06}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            image.save(path)
        except OSError as error:
            raise TuningError(
                f"an image of the validation cannot be written: {error.strerror or error}",
                where=str(path),
                hint="return PIL images in RGB; the same command goes on from the last step",
            ) from error
    for tracker in accelerator.trackers if images else ():
        if tracker.name == "tensorboard":
            stacked = {name: np.asarray(image.convert("RGB"))[None] for name, image in images.items()}
            tracker.log_images(stacked, step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):  # accelerate's, of which some take lists
            lists = tracker.name in ("wandb", "swanlab")
            tracker.log_images({name: [image] if lists else image for name, image in images.items()}, step)
    accelerator.wait_for_everyone()


def _at_least_float32(unet: GraphUNet) -> torch.dtype:
    return torch.promote_types(unet.dtype, torch.float32)


def _as(unet: GraphUNet, dtype: torch.dtype) -> GraphUNet:
    """Return a UNet in a precision, such as that in which the student came."""
    return unet if unet.dtype == dtype else copy.deepcopy(unet).to(dtype)


def _finished(unet: GraphUNet, folder: Path, record: Mapping[str, Any] | None) -> tuple[GraphUNet, TuningReport]:
    """Return the tuned student with the log of its run; the main process, which has a record, writes both."""
    report = TuningReport.of(folder)
    if record is not None:
        text = json.dumps({"removed": unet.graph.removed, **record}, indent=1) + "\n"
        try:
            (folder / "tuning.json").write_text(text)
            unet.save_pretrained(folder / "unet")
            report.picture(folder / "loss.svg")
        except (OSError, SafetensorError) as error:
            raise TuningError(
                f"the result cannot be written: {getattr(error, 'strerror', None) or error}",
                where=str(folder),
                hint="free space there; the same command writes it from the last checkpoint",
            ) from error
    return unet, report
