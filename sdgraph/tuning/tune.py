"""The training loop: setup, training steps, validation and checkpoints, until all steps are taken or the run stops."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor

from ..errors import TuningError
from ..extra import imported
from ..options import Bounds, Count, Text, checked
from ..progress import Bar, note
from ..runtime.apply import apply
from ..runtime.feature_extractor import FeatureExtractor
from ..runtime.unet import GraphUNet
from . import fsdp
from .batch import Batches
from .checks import check_call_of_both, check_different, check_models, check_output, has_empty
from .identity import Identity, check_versions, versions
from .learned_pruning import LearnedPruning, PruningMasks, PruningSearch
from .learned_routing import LearnedRouting, RoutingMasks, RoutingSearch
from .losses import Loss
from .noise_schedule import NoiseSchedule
from .processes import alone, terminable
from .report import LOG, PRUNING, Log, TuningReport
from .settings import Settings
from .sources import Paths, Source, as_source
from .train_state import TrainState, checkpoint_to_resume, read, read_identity, training_dtype
from .train_step import Objective, Student, TrainStep, losses_for
from .validation import Validate, record

RECIPE_FORMAT = 1  # of `tuning.json`
log = logging.getLogger("sdgraph")


@checked(TuningError, options=Settings.check_names)
def tune(
    student: GraphUNet,
    teacher: GraphUNet | UNet2DConditionModel,
    data: Source | Iterable[Mapping[str, Tensor]],
    *,
    scheduler: Any,
    max_train_steps: Count | None = None,
    output_dir: Text | Path,
    losses: Annotated[Sequence[Loss], Bounds(length=1)] | None = None,
    train: Annotated[Sequence[Text], Bounds(length=1)] | None = None,
    learn_pruning: LearnedPruning | None = None,
    learn_routing: LearnedRouting | None = None,
    validate: Validate | None = None,
    resume_from_checkpoint: str | Path | None = "latest",
    **settings: Any,
) -> tuple[GraphUNet, TuningReport]:
    """Train a student to predict what its teacher predicts, and return the tuned student.

    The run is kept in `output_dir`: `checkpoint-N/` as diffusers' scripts write it, `unet/` with the result, which
    diffusers alone loads too where a plain model computes the same, `tuning.json` with the recipe, `loss.csv` and
    `loss.svg`. The same call goes on from the last checkpoint, and what it computes equals an uninterrupted run bit for
    bit on one CPU. Started by `accelerate launch`, it runs on several GPUs or machines, as distributed data parallel;
    with `--use_fsdp` the weights are sharded over them.

    Weights in half precision are trained in float32, in which small steps are not lost, and returned in their own
    precision; the checkpoints keep what was trained. `mixed_precision` is the precision in which the models compute.

    Ctrl-C and SIGTERM stop a run after a whole step, which is kept as a checkpoint; the log says which.

    Args:
        student: the UNet to train, as `sdgraph.apply` returns it. It stays as it is; a copy is trained.
        teacher: the UNet to learn from, most often the one that the student was derived from. It stays as it is.
        data: the latents and conditions: a source of `sdgraph.tuning`, or an iterable of dicts of tensors.
        scheduler: the diffusers scheduler that says how noise is added and what the UNet predicts.
        max_train_steps: the number of optimizer steps; alternatively `num_train_epochs` says how long the run is.
        output_dir: the folder of the run.
        losses: the terms to minimise; by default the teacher's output, ten times its features by stage, and, if the
            data are no trajectories, a hundredth of the denoising loss; `Trajectory` for `Paths`.
        train: the module paths, or patterns of `sdgraph.Graph.matching`, whose weights are trained; by default all.
        learn_pruning: a budget, for which the first steps learn what to remove from the student; by default nothing is
            removed. The log, the checkpoints and the choice of these steps are in `output_dir/pruning`, and the result
            is that of a plain `PruneBlocks`. The student may then be the teacher itself.
        learn_routing: masks by call for a budget, which the first steps learn together with the weights; by default all
            calls compute everything. The result is the whole student, and `report.routing.switch(tuned)` leaves out
            what the masks say. The student may then be the teacher itself.
        validate: a function of the student (its averaged weights) and the number of steps, which returns figures and
            PIL images by name. They are logged and written to `output_dir/validation`.
        resume_from_checkpoint: "latest", a folder `checkpoint-N`, or None to begin in a folder without checkpoints.
        settings: further options, those of `sdgraph.tuning.Settings`.
    Returns:
        The tuned student in evaluation mode, with its averaged weights if `use_ema` is set; and the log of the run.
    Raises:
        TuningError: the models do not fit each other, the data are unusable, a checkpoint belongs to another run, or a
            loss is not finite. What was saved is kept.
        PathError: a loss names a module that student or teacher does not have.
        ExtraError: accelerate, or the tracker, is not installed.
    Example:
        ```python
        student = sdgraph.apply(pipe.unet, [PruneBlocks("bk-sdm-base")])
        tuned, report = sdgraph.tune(
            student, pipe.unet, data, scheduler=pipe.scheduler, max_train_steps=5000, output_dir="tuned"
        )
        ```
    Source:
        Kim et al., "BK-SDM", 2024, whose features outweigh the other terms, as ours do; the weight of the denoising
        loss: Zhang et al., "ALTER", 2025. Exact resume is our own.
    """
    run_settings, folder = Settings.of({"max_train_steps": max_train_steps, **settings}), Path(output_dir)
    source = as_source(data)
    check_output(folder, (student, teacher), source)
    run_settings = run_settings.for_data(has_empty(source))
    frozen_teacher = apply(teacher, (), verify=False)
    check_models(student, frozen_teacher)
    noise_schedule = NoiseSchedule.of(scheduler)
    first_row = Batches.of(source, noise_schedule, run_settings, 1).batch(0, [0])
    check_call_of_both(student, frozen_teacher, first_row.inputs)
    if learn_pruning is not None and learn_routing is not None:
        raise TuningError(
            "one run learns what to prune, or masks by call",
            where="learn_pruning, learn_routing",
            hint="leave one of them out",
        )
    terms = losses_for(losses, first_row, run_settings.snr_gamma)
    if isinstance(source, Paths):
        source.check_schedule(noise_schedule)
    if learn_pruning is None and learn_routing is None and any(loss.reads_teacher for loss in terms):
        check_different(student, frozen_teacher, first_row.inputs)
    accelerator, sharded = _accelerator(run_settings, folder)
    batches = Batches.of(source, noise_schedule, run_settings, accelerator.num_processes)
    run_settings = run_settings.counted(len(source), batches.latents)
    run = functools.partial(_run, frozen_teacher, source, noise_schedule, terms)
    with alone(folder), terminable():
        accelerator.wait_for_everyone()
        launched = accelerator, sharded
        if learn_pruning is None and learn_routing is None:
            return run(student, run_settings, folder, launched, resume_from_checkpoint, train, validate, student.dtype)
        if sharded:
            raise TuningError(
                "gates mix values of a whole student, and its weights are sharded over processes",
                where="learn_pruning, learn_routing",
                hint="launch without --use_fsdp",
            )
        if learn_routing is not None:
            count = len(noise_schedule.alphas)
            routing = RoutingSearch(learn_routing, student, frozen_teacher, terms, run_settings, count, folder)
            options = (train, validate, student.dtype)
            tuned, _ = run(student, run_settings, folder, launched, resume_from_checkpoint, *options, search=routing)
            if accelerator.is_main_process:
                routing.finish()
            accelerator.wait_for_everyone()
            return tuned, TuningReport.of(folder)
        assert learn_pruning is not None
        first, rest = learn_pruning.settings(run_settings)
        search = PruningSearch(learn_pruning, student, frozen_teacher, terms, train, folder / PRUNING)
        resumed = None if resume_from_checkpoint is None else "latest"
        of_search = _accelerator(first, search.output_dir)
        found, _ = run(search.student, first, search.output_dir, of_search, resumed, search=search)
        pruned = search.finish(found)
        left = search.left_to_train(pruned)
        return run(pruned, rest, folder, launched, resume_from_checkpoint, left, validate, student.dtype)


def _run(
    teacher: GraphUNet,
    source: Source,
    noise_schedule: NoiseSchedule,
    losses: Sequence[Loss],
    student: GraphUNet,
    settings: Settings,
    output_dir: Path,
    launched: tuple[Any, bool],
    resume_from_checkpoint: str | Path | None,
    train: Sequence[str] | None = None,
    validate: Validate | None = None,
    dtype: torch.dtype | None = None,
    search: PruningSearch | RoutingSearch | None = None,
) -> tuple[GraphUNet, TuningReport]:
    """Train a student in all steps that are left, and return it with the log.

    Args:
        teacher: the teacher.
        source: the data.
        noise_schedule: the noise schedule.
        losses: the terms.
        student: the student, which stays as it is.
        settings: the settings, with a number of steps.
        output_dir: the folder of the run.
        launched: the accelerator, and whether weights are sharded over its processes.
        resume_from_checkpoint: the checkpoint to go on from, as for `tune`.
        train: the patterns of modules that are trained, as for `tune`.
        validate: the validation, as for `tune`.
        dtype: the precision of the result; by default that in which it is trained.
        search: the search of a learned pruning, if these are its steps, or that of masks by call.
    """
    (accelerator, sharded), masks = launched, None if search is None else search.masks
    checkpoint = checkpoint_to_resume(output_dir, resume_from_checkpoint)
    batches = Batches.of(source, noise_schedule, settings, accelerator.num_processes)
    trained = search.trainable() if isinstance(search, PruningSearch) else _trainable(student, train)
    train_step = _setup(trained, teacher, batches, losses, settings, accelerator, sharded, masks)
    unsharded = copy.deepcopy(student).to("cpu", training_dtype(student)) if sharded else None
    temporary = accelerator.unwrap_model(train_step.student).temporary
    state = TrainState.create(trained, temporary, train_step.trained, settings, accelerator, unsharded)
    identity = Identity.of(
        student, teacher, source, noise_schedule, losses, train, batches.size, accelerator.mixed_precision
    )
    if search is not None:
        identity = dataclasses.replace(identity, parts={**identity.parts, **search.identity})
    if checkpoint is not None:
        endless = search is None and all(loss.until is None for loss in losses)
        _resume(state, checkpoint, identity, settings, endless)
        if accelerator.is_main_process:
            name = "the search of what to prune" if isinstance(search, PruningSearch) else "tuning"
            note(f"{name} goes on from {checkpoint}, step {state.step} of {settings.last_step}")
    if settings.report_to != "none":
        accelerator.init_trackers("logs")
    dtype = dtype or training_dtype(student)
    _fit(train_step, state, identity, output_dir, validate, dtype)
    for tracker in accelerator.trackers:
        tracker.finish()  # and no end_training(), after which these processes could not train any more
    tuned = _cast(state.result().requires_grad_(False).eval(), dtype)
    if isinstance(source, Paths):
        tuned.note_few_steps(source.entries)
    report = TuningReport.of(output_dir)
    if accelerator.is_main_process:
        few_steps = source.scheduler if isinstance(source, Paths) else None
        _save_result(tuned, report, _recipe(student, settings, identity, state), few_steps)
    return tuned, report


def _accelerator(settings: Settings, output_dir: Path) -> tuple[Any, bool]:
    """Return an accelerator, and whether the weights are sharded over its processes.

    Raises:
        TuningError: accelerate refuses the settings, or was launched for what is not supported.
    """
    accelerate = imported("accelerate", "tuning")
    with fsdp.enabled() as sharded:
        try:
            accelerator = accelerate.Accelerator(
                cpu=not torch.accelerator.is_available(),
                mixed_precision=settings.precision(),
                log_with=None if settings.report_to == "none" else settings.report_to,
                project_dir=output_dir,
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
            hint="use distributed data parallel; or FSDP, which shards the weights over processes",
        )
    sharded = sharded and accelerator.num_processes > 1
    if sharded and settings.use_8bit_adam:
        raise TuningError(
            "weights that are sharded over processes have moments in 32 bits",
            where="use_8bit_adam",
            hint="leave it out: every process keeps its shard of the moments alone",
        )
    if sharded and accelerator.scaler is not None:
        raise TuningError("weights that are sharded over processes train in bf16", where="mixed_precision", hint="bf16")
    return accelerator, sharded


def _trainable(student: GraphUNet, train: Sequence[str] | None) -> GraphUNet:
    """Return a copy of the student to train, in which the named modules alone require gradients."""
    trained = copy.deepcopy(student).to(training_dtype(student)).requires_grad_(train is None).train()
    for path in trained.graph.matching(train) if train is not None else ():
        for parameter in trained.graph.region(path).parameters.values():
            parameter.requires_grad_(True)
    return trained


def _setup(
    student: GraphUNet,
    teacher: GraphUNet,
    batches: Batches,
    losses: Sequence[Loss],
    settings: Settings,
    accelerator: Any,
    sharded: bool,
    masks: PruningMasks | RoutingMasks | None,
) -> TrainStep:
    """Put the models on their device, let accelerate prepare the student, and return the training step."""
    objective, inputs = Objective(losses, student, teacher), frozenset(batches.batch(0, [0]).inputs)
    student.to(accelerator.device)
    if accelerator.device.type == "cpu" and not all(p.requires_grad for p in student.parameters()):
        # In channels_last, the backward pass of torch's group norm crashes where its input needs no gradient. The
        # strides of 1x1 kernels count as both layouts, so that contiguous() would leave them.
        for parameter in student.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    precision = half or training_dtype(teacher)
    if (teacher.device, teacher.dtype) != (accelerator.device, precision):
        teacher = copy.deepcopy(teacher).to(accelerator.device, precision)
    teacher_features = FeatureExtractor(teacher, objective.teacher_taps, inputs)
    torch.manual_seed(settings.seed)  # of the first weights of adapters
    model = Student(student, objective.pairs, teacher, inputs, settings.gradient_checkpointing, masks)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if sharded:
        prepared = accelerator.prepare_model(model, evaluation_mode=True)  # for its precision alone
        fsdp.shard(prepared, student)
    else:
        prepared = accelerator.prepare(model)
    trained = [model.get_parameter(name) for name in names]
    noise_schedule = batches.noise_schedule.to(accelerator.device)
    return TrainStep(
        accelerator, settings, batches, noise_schedule, objective, teacher_features, prepared, trained, masks
    )


def _resume(state: TrainState, checkpoint: Path, identity: Identity, settings: Settings, endless: bool) -> None:
    """Take over the state of a checkpoint of the same run, which may get more steps if it is endless."""
    saved = read(checkpoint)
    changes = identity.check(read_identity(checkpoint, saved), checkpoint)
    settings.check_resumed(saved["settings"], saved["step"], str(checkpoint), endless)
    check_versions(saved.get("versions", {}))
    state.load(checkpoint)
    if changes:
        state.changes.append({"step": state.step, **changes})


def _fit(
    train_step: TrainStep,
    state: TrainState,
    identity: Identity,
    output_dir: Path,
    validate: Validate | None,
    dtype: torch.dtype,
) -> None:
    """Take all steps that are left. If anything fails, the steps before it are kept in a checkpoint."""
    accelerator, settings = train_step.accelerator, train_step.settings
    main, begun, saved = accelerator.is_main_process, time.monotonic() - state.seconds, state.step

    def save() -> None:
        nonlocal saved
        saved = state.step
        state.save(output_dir if main else None, settings, identity)
        accelerator.wait_for_everyone()

    def is_due(interval: int) -> bool:
        return state.step == settings.last_step or state.step % interval == 0

    bar = Bar(total=settings.last_step, initial=state.step, desc="tuning", unit="step", disable=not main)
    gates = train_step.masks.figures if train_step.masks is not None else dict[str, float]
    columns = (*train_step.objective.names, *gates())
    with Log(output_dir / LOG if main else None, columns, state.step) as lines, bar:
        try:
            while state.step < settings.last_step:
                figures = {"learning_rate": state.learning_rate, **train_step(state.step), **gates()}
                wrong = [name for name, figure in figures.items() if not math.isfinite(figure)]
                if accelerator.scaler is not None and wrong == ["gradient_norm"]:
                    wrong = []  # the optimizer leaves such a step out, and the scale of the loss is lowered
                if wrong:
                    save()
                    raise TuningError(
                        f"{' and '.join(wrong)} of step {state.step} is not finite",
                        where=str(output_dir / f"checkpoint-{state.step}"),
                        hint="the state before it is kept there; lower learning_rate, or use bf16 instead of fp16",
                    )
                state.advance()
                state.seconds = time.monotonic() - begun
                lines.write(state.step, state.seconds, figures)
                accelerator.log(figures, state.step)
                bar.update()
                bar.set_postfix(loss=f"{figures['loss']:.4f}")
                if is_due(settings.checkpointing_steps):
                    save()
                if validate is not None and is_due(settings.validation_steps or settings.checkpointing_steps):
                    _validate(validate, state, output_dir, accelerator, dtype)
        except BaseException as reason:
            # Processes that share the weights can only save together, and the others know nothing of this.
            if main and state.consistent and state.step > saved and not state.sharded:
                with contextlib.suppress(TuningError):  # the first error tells more than that of a full disk
                    state.save(output_dir, settings, identity)
                    saved = state.step
            if main:
                _log_stop(reason, state.step, settings.last_step, output_dir / f"checkpoint-{saved}")
            raise


def _validate(validate: Validate, state: TrainState, output_dir: Path, accelerator: Any, dtype: torch.dtype) -> None:
    """Call the validation with the averaged student in its own precision, in the main process, and record its results.

    Raises:
        TuningError: it has changed which weights are trained, or returns something else than figures and images.
    """
    trained = [parameter.requires_grad for parameter in state.unet.parameters()]
    with state.averaged() as unet:
        if accelerator.is_main_process:
            record(validate(_cast(unet, dtype), state.step), state.step, output_dir, accelerator)
        accelerator.wait_for_everyone()
    if trained != [parameter.requires_grad for parameter in state.unet.parameters()]:
        raise TuningError(
            "validation has changed which weights of the student are trained",
            where="validate",
            hint="work on a copy: copy.deepcopy(unet)",
        )


def _log_stop(reason: BaseException, step: int, steps: int, checkpoint: Path) -> None:
    """Log the step at which a run has stopped, and how to go on."""
    kept = f"{checkpoint} is kept" if checkpoint.exists() else "there is no checkpoint yet"
    again = "The same call, or the same command, goes on from there: resume_from_checkpoint='latest' is the default"
    again = again if checkpoint.exists() else "The same call, or the same command, begins anew"
    interrupted = not isinstance(reason, Exception)  # other errors say what to do
    log.warning("stopped after step %d of %d; %s%s", step, steps, kept, f". {again}" if interrupted else "")


def _recipe(student: GraphUNet, settings: Settings, identity: Identity, state: TrainState) -> dict[str, Any]:
    """Return everything that decided the result, for `tuning.json`."""
    return {
        "removed": state.unet.graph.removed,
        "settings": dataclasses.asdict(settings),
        **identity.parts,
        "changes of the data": state.changes,
        "versions": versions(),
        "passes": [str(applied.one) for applied in student.graph.passes],
    }


def _save_result(unet: GraphUNet, report: TuningReport, recipe: Mapping[str, Any], scheduler: Any) -> None:
    """Write the recipe, the tuned student, its scheduler if it has one, and the curves of its losses."""
    try:
        text = json.dumps({"format": RECIPE_FORMAT, **recipe}, indent=1) + "\n"
        (report.output_dir / "tuning.json").write_text(text)
        unet.save_pretrained(report.output_dir / "unet")
        if scheduler is not None:
            scheduler.save_pretrained(report.output_dir / "scheduler")
        report.picture(report.output_dir / "loss.svg")
    except (OSError, SafetensorError) as error:
        raise TuningError(
            f"the result cannot be written: {getattr(error, 'strerror', None) or error}",
            where=str(report.output_dir),
            hint="free space there; the same command writes it from the last checkpoint",
        ) from error


def _cast(unet: GraphUNet, dtype: torch.dtype) -> GraphUNet:
    """Return a UNet in a precision, such as that in which the student was passed."""
    return unet if unet.dtype == dtype else copy.deepcopy(unet).to(dtype)
