"""`switch`: several UNets in the place of one, each of which computes some calls of a generation."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Self

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import nn

from ..errors import CallError, ModeError, SavedError, ScheduleError, SourceError, SpecError, did_you_mean
from ..inheritance.attach import Attachment
from ..inheritance.cache import Backend, Turn, no_value
from ..inheritance.tracker import GenerationTracker
from ..ir.inputs import Input
from ..ir.sites import sites
from ..options import Count, Positive, Share, checked
from ..schedules import TRAINED, ByTimestep, MemberSchedule, SamplingRun
from ..solvers import looks_back
from ..spec import known, read
from ..views.timetable import Timetable, timetable
from .adapters import LORA
from .apply import apply
from .diffusers_api import REFUSED, UNetCall, refusal
from .recipe import PASSES
from .serialization import one_device
from .switch_folder import Contents, load_switch, save_switch
from .unet import GraphUNet

NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
# Entries of a configuration that say which latents and conditioning a UNet takes.
AGREEING = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "class_embed_type",
    "num_class_embeds",
    "projection_class_embeddings_input_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "time_cond_proj_dim",
    "prediction_type",
)
ON_MEMBERS = "do it on each UNet before sdgraph.switch, or on unet.members[name]"
CHANGING = (  # methods of diffusers that change what a UNet computes
    *LORA,
    "set_attn_processor",
    "set_default_attn_processor",
    "fuse_qkv_projections",
    "unfuse_qkv_projections",
    "enable_freeu",
    "disable_freeu",
    "_load_ip_adapter_weights",
    "enable_group_offload",
    "load_state_dict",
    "from_config",
)


@checked(SpecError)
def switch(
    members: Annotated[Mapping[str, Any], Any],
    schedule: str | MemberSchedule | None = None,
    *,
    boundary_ratio: Share | None = None,
    denoising_end: Share | None = None,
    num_train_timesteps: Count = TRAINED,
    carry_features: bool = False,
    guidance_scale: Mapping[str, Positive] | None = None,
    verify: bool = True,
) -> SwitchUNet:
    """Return one UNet that lets several UNets compute the calls of a generation, each as a schedule says.

    The UNets take the same latents and conditioning; blocks and widths may differ. Each may be pruned, tuned, and
    inherit features: its schedules count the calls of the generation, and its first call of a turn computes everything.
    None of the UNets is changed. Weights of equal contents are held once.

    Args:
        members: the UNets by name, in the order of the generation: UNets of diffusers, results of `apply`, or
            pipelines, of whose schedulers the prediction types are compared as well.
        schedule: the schedule that names the UNet of each call, or its text: one of `sdgraph.schedules`.
        boundary_ratio: the share of the training timesteps down to which the first of two UNets computes, as Wan's
            pipelines in diffusers have it; in the place of a schedule.
        denoising_end: the share of the training timesteps that the first of two UNets denoises, as SDXL's pipelines in
            diffusers have it; in the place of a schedule.
        num_train_timesteps: the number of training timesteps, for these two.
        carry_features: whether the values of sites that two UNets both have, in the same shape, are taken over when
            the turn changes. Otherwise no features are inherited across a change.
        guidance_scale: the scale of classifier-free guidance of UNets by name, in the place of the pipeline's, which
            has to be attached. The difference of the two predictions of a sample is scaled before the pipeline does.
        verify: whether the traces of UNets of diffusers are compared with them.
    Returns:
        a UNet for any pipeline of its members. A schedule by call needs `sdgraph.attach(pipe)`, or `expecting`.
    Raises:
        SpecError: there are no members, a name does not fit, or not exactly one of schedule, `boundary_ratio` and
            `denoising_end` is given.
        ScheduleError: the schedule names a UNet that there is not, or never names one that there is.
        SourceError: the UNets take different latents or conditioning, or one cannot be traced; the error says what
            differs.
    Example:
        `pipe.unet = sdgraph.switch({"large": pipe.unet, "small": small}, boundary_ratio=0.5)`
    Source:
        T-Stitch (Pan et al., 2024); Hybrid SD (Yan et al., 2024); A-SDM's switching between UNets.
    """
    if not isinstance(members, Mapping) or not members:
        raise SpecError("there are no UNets", where="members", hint='pass them by name: {"large": unet, "small": unet}')
    _check_names(members)
    names = tuple(members)
    ratios = {"boundary_ratio": boundary_ratio, "denoising_end": denoising_end}
    given = [name for name, value in ({"schedule": schedule} | ratios).items() if value is not None]
    if len(given) != 1 and (given or len(names) > 1):
        found = " and ".join(given) or "neither a schedule nor a boundary_ratio"
        hint = "pass one of them, such as boundary_ratio=0.5 or schedule=\"InTurns(('large', 'small'))\""
        raise SpecError(f"{found} {'are' if len(given) > 1 else 'is'} given", where="switch", hint=hint)
    if isinstance(schedule, str):
        schedule = _read_schedule(schedule)
    if boundary_ratio is not None or denoising_end is not None:
        if len(names) != 2:
            hint = f"use a schedule, such as ByTimestep({names!r}, (700, 300))"
            raise SpecError(f"{given[0]} lies between two UNets, not {len(names)}", where=given[0], hint=hint)
        schedule = (
            ByTimestep.boundary_ratio(boundary_ratio, names, num_train_timesteps)
            if boundary_ratio is not None
            else ByTimestep.denoising_end(denoising_end, names, num_train_timesteps)  # type: ignore[arg-type]
        )
    schedule = schedule if isinstance(schedule, MemberSchedule) else ByTimestep(names)
    _check_schedule(schedule, names)
    _check_agreement({name: _facts(one) for name, one in members.items()})
    return SwitchUNet(
        {name: apply(_unet_of(one), verify=verify) for name, one in members.items()},
        schedule,
        carry_features,
        guidance_scale or {},
    )


class SwitchUNet(UNetCall, UNet2DConditionModel):  # type: ignore[misc]
    """Several UNets in the place of one, as `sdgraph.switch` returns them.

    To diffusers it is a `UNet2DConditionModel`. `members` are its UNets by name, each a `GraphUNet`, and `schedule`
    says which of them computes a call. Whatever changes one UNet, such as LoRA and attention processors, is refused
    here and done on a member. Training is refused as well.

    Args:
        members: the UNets by name. They belong to this module from now on, and share equal weights.
        schedule: the schedule that names the UNet of each call.
        carry_features: whether values of common sites are taken over when the turn changes.
        guidance_scale: the scale of classifier-free guidance of members by name, where it is not the pipeline's.
    """

    __module__ = "sdgraph"  # which diffusers writes into the index of a pipeline, and asks its readers to import
    _supports_gradient_checkpointing = False
    members: Mapping[str, GraphUNet]

    @checked(SourceError)
    def __init__(
        self,
        members: Mapping[str, GraphUNet],
        schedule: MemberSchedule,
        carry_features: bool = False,
        guidance_scale: Annotated[Mapping[str, float], Any] = MappingProxyType({}),
    ) -> None:
        _check_names(members)
        _check_schedule(schedule, tuple(members))
        _check_agreement({name: _facts(member) for name, member in members.items()})
        ModelMixin.__init__(self)
        self.members = nn.ModuleDict(members)  # type: ignore[assignment]
        _check_known(schedule, guidance_scale, tuple(members), "guidance_scale")
        self.schedule, self.carry_features, self.guidance_scale = schedule, carry_features, dict(guidance_scale)
        self.tracker = GenerationTracker()
        self._checked_run: SamplingRun | None = None
        self._carried = _common_sites(members.values()) if carry_features else frozenset()
        hold_once([list(tensors_of(member)) for member in members.values()])
        first = next(iter(members.values()))
        self.register_to_config(**{k: v for k, v in first.graph.config.items() if k != PASSES})
        self.call_inputs = tuple(_common_inputs([member.call_inputs for member in members.values()]))
        self._conditioning = tuple(i.name for i in self.call_inputs if i.conditioning)
        nn.Module.train(self, False)

    # -- the call ------------------------------------------------------------------------------------------------

    def run(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if torch.compiler.is_exporting():
            raise ModeError("torch.export exports one graph", where="SwitchUNet", hint="export unet.members[name]")
        for member in self.members.values():
            member.follow_changes()

        def turns(call: int | None, timestep: float | None, run: SamplingRun) -> Turn:
            return self._turn(flat, self._member(flat["timestep"], call, timestep, run))

        if flat["sample"].is_meta:  # where no timestep can be read
            alone = self._turn(flat, next(iter(self.members)))
        elif not self.schedule.counts and not any(member.backend.sites for member in self.members.values()):
            position = self.tracker.position(flat["timestep"])
            place = (None, SamplingRun()) if position is None else (position.timestep, position.run)
            alone = turns(None, *place)
        else:
            return self.tracker.run(flat, self._conditioning, turns, self._weights)
        output: torch.Tensor = alone.backend.compute(flat, frozenset(), no_value)[0]
        return output

    def _turn(self, flat: Mapping[str, torch.Tensor], name: str) -> Turn:
        """Return the turn of a member, which covers the call."""
        member = self.members[name]
        backend: Backend[Any, Any] = member.backend if member.prepare(flat) else _Whole(member.backend)
        if name in self.guidance_scale and not flat["sample"].is_meta:
            backend = _Guided(backend, self.guidance_scale[name] / self._pipeline_scale(flat))
        return Turn(backend, name, self._carried)

    def _pipeline_scale(self, flat: Mapping[str, torch.Tensor]) -> float:
        """Return the scale of guidance of the attached pipeline that makes a call."""
        sources = [one for one in self.tracker.position_sources if isinstance(one, Attachment)]
        source = next((one for one in sources if one.read(flat["timestep"]) is not None), None)
        scale = source.guidance_scale if source is not None else None
        if scale is None or flat["sample"].shape[0] % 2:
            what = "the pipeline runs without guidance, or combines its predictions in another way"
            raise ModeError(
                what if source is not None else "no attached pipeline makes this call, so its guidance is unknown",
                where="guidance_scale",
                hint="sdgraph.attach(pipe), with guidance_scale above 1 and without guidance_rescale; or leave it out",
            )
        return scale

    def _member(self, timesteps: torch.Tensor, call: int | None, timestep: float | None, run: SamplingRun) -> str:
        """Return the name of the UNet that computes a call, see `Turns`."""
        if call is None and self.schedule.counts:
            raise ScheduleError(
                "nothing says which call of the generation this is, and the schedule counts calls",
                where=str(self.schedule),
                hint="sdgraph.attach(pipe), or `with unet.expecting(timesteps)` in a loop of your own",
            )
        if timestep is None:
            names = {self.schedule.member(0, float(one), run) for one in timesteps.reshape(-1).tolist()}
            if len(names) > 1:
                raise CallError(
                    f"the samples of a batch have timesteps of {' and '.join(sorted(names))}",
                    where="argument timestep",
                    hint="call the UNet once for each of them",
                )
            return names.pop()
        if run is not self._checked_run and (run.timesteps is not None or run.calls is not None):
            self._check_run(run)
        return self.schedule.member(call or 0, timestep, run)

    def _check_run(self, run: SamplingRun) -> None:
        """Refuse a run of which a call has no UNet, and warn where the solver looks back over a switch."""
        names = self.schedule.turns(run)
        _check_known(self.schedule, names, tuple(self.members))
        if looks_back(run.solver) and len(set(names)) > 1:
            self.tracker.warn(
                f"{run.solver.partition('(')[0]} combines the predictions of several calls, so the steps after a "
                f"switch also use those of the UNet before it; see docs/switching.md for what that changes"
            )
        self._checked_run = run

    def _weights(self, waits: bool) -> object:
        """Return an object that stays the same as long as values that were kept would be computed as they were."""
        inheriting = [member for member in self.members.values() if member.backend.sites]
        return tuple((member.backend, member.watch.weights(waits)) for member in inheriting)

    def timetable(self, calls: Any, **sizes: int) -> Timetable:
        """Return the UNet that computes each call of a generation, and what the call reuses and costs.

        Args:
            calls: a diffusers scheduler after `set_timesteps`, the timesteps of the calls, or their number.
            sizes: sizes of the calls at which costs are quoted, such as `B=2, H=64, W=64, L=77`; by default those of
                the first UNet, for one sample.
        Raises:
            ScheduleError: a schedule does not fit the calls.
            SpecError: a graph does not cover the sizes.
        Example:
            `pipe.scheduler.set_timesteps(25)`, then `print(unet.timetable(pipe.scheduler, B=2))`
        """
        run = SamplingRun.of(calls)
        graphs = {name: member.graph for name, member in self.members.items()}
        nominal = {s.name: s.nominal for s in next(iter(graphs.values())).dims.symbols if s.name in ("H", "W")}
        at = {name: graph.at(**(nominal | sizes)) for name, graph in graphs.items()}
        return timetable(at, run, self.schedule.turns(run), self._carried)

    def warm_up(self, height: Count, width: Count, *, batch: Count = 2, tokens: Count = 77, calls: Any = 25) -> None:
        for member in self.members.values():
            member.warm_up(height, width, batch=batch, tokens=tokens, calls=calls)

    def compile(self, **options: Any) -> None:
        """Let `torch.compile` compile each variant of each member when it is first run.

        Args:
            options: options of `torch.compile`, such as `mode="max-autotune"`.
        """
        for member in self.members.values():
            member.compile(**options)

    # -- weights, modes, moves -----------------------------------------------------------------------------------

    to = nn.Module.to  # diffusers' own only adds a warning about layers to keep in float32, of which there are none

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        moved: dict[tuple[Any, ...], torch.Tensor] = {}

        def once(tensor: torch.Tensor) -> torch.Tensor:
            key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
            if tensor.is_meta or not tensor.numel():
                return fn(tensor)
            if key not in moved:
                moved[key] = fn(tensor)
            return moved[key]

        super()._apply(once, recurse)
        self.reset()
        return self

    def train(self, mode: bool = True) -> Self:
        """Set evaluation mode. Training is refused: members that share weights would no longer.

        Args:
            mode: False.
        Returns:
            the module.
        Raises:
            ModeError: `mode` is True.
        """
        if mode:
            raise ModeError(
                "the members of a switch may share weights, so they are not trained together",
                where="SwitchUNet",
                hint="tune each UNet with sdgraph.tune, and switch between the results",
            )
        return super().train(mode)  # type: ignore[no-any-return]

    # -- what diffusers does with a UNet -------------------------------------------------------------------------

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The processors of the first member, by module path."""
        return self._first.attn_processors

    @property
    def _first(self) -> GraphUNet:
        return next(iter(self.members.values()))

    def __getattr__(self, name: str) -> Any:
        if name in ("add_embedding", "encoder_hid_proj"):  # pipelines read sizes off them, which agree
            return getattr(self._first, name)
        return super().__getattr__(name)

    def set_attention_slice(self, slice_size: Any = "auto") -> None:
        """Change nothing: PyTorch's fused attention keeps no matrix of attention that could be sliced.

        Args:
            slice_size: the size of a slice as in diffusers, which is ignored.
        """
        self._first.set_attention_slice(slice_size)

    # -- to disk and back ----------------------------------------------------------------------------------------

    @checked(SavedError)
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **options: Any,
    ) -> None:
        """Write `config.json`, `switch.json` (the schedule and all recipes) and the weights, equal ones once.

        Args:
            save_directory: the folder to write. An earlier saved UNet there is replaced.
            is_main_process: if False, nothing is written.
            safe_serialization: pickle is never written. If this is False, the log says so.
            variant: part of the name of the file of weights.
            max_shard_size: largest size of a file of weights; larger ones are split.
            options: what diffusers' pipelines pass along; only defaults are accepted.
        Raises:
            ModeError: the graph of a member cannot be rebuilt from a recipe.
            SavedError: the folder holds other files, or an option is not supported.
        """
        for member in self.members.values():
            member.check_unaltered()
        save_switch(
            Contents(
                str(self.schedule),
                self.carry_features,
                {name: member.graph for name, member in self.members.items()},
                self.guidance_scale,
                {name: member.tensors() for name, member in self.members.items()},
            ),
            self.config,
            save_directory,
            variant=variant,
            max_shard_size=max_shard_size,
            is_main_process=is_main_process,
            safe_serialization=safe_serialization,
            **options,
        )

    @classmethod
    @checked(SavedError)
    def from_pretrained(cls, directory: str | os.PathLike[str], **options: Any) -> SwitchUNet:
        """Read what `save_pretrained` wrote.

        Args:
            directory: the folder that was written.
            options: diffusers' `torch_dtype`, `subfolder`, `variant`, `device_map` and `max_memory`.
        Returns:
            the UNet, in evaluation mode.
        Raises:
            SavedError: files or members are missing, damaged or unsafe.
        """
        device_map, max_memory = options.pop("device_map", None), options.pop("max_memory", None)
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
        options.pop("torch_dtype", None)
        contents, path = load_switch(directory, **options)
        try:
            schedule = _read_schedule(contents.schedule)
            members = {name: GraphUNet(graph) for name, graph in contents.graphs.items()}
            unet = cls(members, schedule, contents.carry_features, contents.guidance_scale)
        except (ScheduleError, SpecError, SourceError) as error:
            raise SavedError(
                f"the members and the schedule do not fit: {error.what}", where=str(path), hint="save the switch again"
            ) from error
        if dtype is not None:
            nn.Module.to(unet, dtype)
        return unet if device_map is None else nn.Module.to(unet, one_device(unet, device_map, max_memory))

    def __deepcopy__(self, memo: dict[int, Any]) -> SwitchUNet:
        members = {name: copy.deepcopy(member, memo) for name, member in self.members.items()}
        return SwitchUNet(members, self.schedule, self.carry_features, self.guidance_scale)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModeError("a SwitchUNet is not pickled", hint="use save_pretrained(directory) and from_pretrained")

    def extra_repr(self) -> str:
        return f"schedule: {self.schedule}"


for _name, _hint in {**REFUSED, **dict.fromkeys(CHANGING, ON_MEMBERS)}.items():
    setattr(SwitchUNet, _name, refusal(_name, _hint, "a switch of several UNets", "SwitchUNet"))


class _Whole:
    """A backend whose calls compute everything, and of which nothing is kept.

    Args:
        backend: the backend that computes them.
    """

    def __init__(self, backend: Backend[Mapping[str, torch.Tensor], torch.Tensor]) -> None:
        self.sites: Mapping[str, Any] = {}
        self._backend = backend

    def compute(
        self, inputs: Mapping[str, torch.Tensor], reused: frozenset[str], read: Callable[[str], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the output of a call."""
        return self._backend.compute(inputs, frozenset(), no_value)[0], {}


class _Guided:
    """A backend whose prediction with a prompt lies farther from that without, or nearer to it.

    Args:
        backend: the backend that computes the calls, of samples without a prompt and the same ones with it.
        factor: the factor of the difference.
    """

    def __init__(self, backend: Backend[Mapping[str, torch.Tensor], torch.Tensor], factor: float) -> None:
        self.sites, self._backend, self._factor = backend.sites, backend, factor

    def compute(
        self, inputs: Mapping[str, torch.Tensor], reused: frozenset[str], read: Callable[[str], torch.Tensor]
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return the output of a call, and the values of the sites that it computed."""
        output, computed = self._backend.compute(inputs, reused, read)
        without, given = output.chunk(2)
        return torch.cat([without, without + self._factor * (given - without)]), computed


# -- equal weights ----------------------------------------------------------------------------------------------------


def tensors_of(unet: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Return an iterator over parameters and buffers by name."""
    yield from unet.named_parameters()
    yield from unet.named_buffers()


def hold_once(models: list[list[tuple[str, torch.Tensor]]]) -> None:
    """Let tensors of a model share the storage of tensors of earlier models with equal contents.

    Args:
        models: the parameters and buffers of each model, with their names; of several equal tensors that of the same
            name is chosen.
    """
    earlier: dict[object, dict[str, torch.Tensor]] = {}
    for model in models:
        for name, tensor in model:
            known = earlier.get(_outline(tensor), {})
            candidates = [known[name]] if name in known else []
            for other in (*candidates, *known.values()):
                if other.data_ptr() == tensor.data_ptr() or torch.equal(_bits(other), _bits(tensor)):
                    tensor.data = other.data
                    break
        for name, tensor in model:
            if tensor.numel() and not tensor.is_meta:
                earlier.setdefault(_outline(tensor), {}).setdefault(name, tensor)


def _outline(tensor: torch.Tensor) -> object:
    """Return what equal tensors have in common, and different ones hardly: their form, and a few of their numbers."""
    if tensor.is_meta or not tensor.numel():
        return None
    flat = tensor.detach().reshape(-1)
    few = _bits(flat[:: max(1, len(flat) // 16)]).tolist()
    return tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(), tuple(few)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # nan equals nan, and 0 is not -0


# -- checks -----------------------------------------------------------------------------------------------------------


def _unet_of(member: Any) -> Any:
    """Return the UNet of a member, which may be a pipeline."""
    return member.unet if hasattr(member, "scheduler") and hasattr(member, "unet") else member


def _facts(member: Any) -> dict[str, Any]:
    """Return what has to agree between members."""
    unet = _unet_of(member)
    if not isinstance(unet, UNet2DConditionModel):
        raise SourceError(
            f"a member is a {type(unet).__name__}", where="members", hint="pass UNets of diffusers or of sdgraph"
        )
    config = {name: unet.config.get(name) for name in AGREEING}
    widths = config["cross_attention_dim"]
    if isinstance(widths, list | tuple) and len(set(widths)) == 1:
        config["cross_attention_dim"] = widths[0]
    scheduler = getattr(getattr(member, "scheduler", None), "config", {})
    config["prediction_type"] = scheduler.get("prediction_type", config["prediction_type"])
    return config | {"dtype": unet.dtype, "device": unet.device}


def _check_names(members: Mapping[Any, Any]) -> None:
    for name in members:
        if not isinstance(name, str) or not NAME.fullmatch(name) or hasattr(nn.ModuleDict, name):
            raise SpecError(
                f"a member is named {name!r}",
                where="members",
                hint="use 1 to 40 letters, digits, _ and -, as in 'large'",
            )


def _read_schedule(text: str) -> MemberSchedule:
    schedule = read(text, MemberSchedule)
    if not isinstance(schedule, MemberSchedule):
        kinds = ", ".join(sorted(known(MemberSchedule)))
        raise ScheduleError(f"{text} names no UNets", where="schedule", hint=f"schedules of UNets: {kinds}")
    return schedule


def _check_schedule(schedule: MemberSchedule, members: tuple[str, ...]) -> None:
    _check_known(schedule, schedule.members, members)
    unnamed = [name for name in members if name not in schedule.members]
    if unnamed:
        raise ScheduleError(
            f"the schedule never names {', '.join(unnamed)}", where=str(schedule), hint="leave it out of the members"
        )


def _check_known(
    schedule: MemberSchedule, names: Iterable[str], members: tuple[str, ...], who: str = "the schedule"
) -> None:
    for name in names:
        if name not in members:
            raise ScheduleError(
                f"{who} names a UNet {name!r}",
                where=str(schedule),
                hint=did_you_mean(name, members) or f"members: {', '.join(members)}",
            )


def _check_agreement(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse members that take other latents or conditioning than the first one."""
    first, *others = facts
    for other in others:
        ours, theirs = facts[first], facts[other]
        differing = [
            f"{name} {ours[name]} and {theirs[name]}"
            for name in ours
            if ours[name] != theirs[name] and not (name == "prediction_type" and None in (ours[name], theirs[name]))
        ]
        if differing:
            raise SourceError(
                f"{first} and {other} differ: {'; '.join(differing)}",
                where="members",
                hint="the UNets of a switch get the same latents, prompts and timesteps, in one dtype on one device",
            )


def _common_inputs(inputs: list[Sequence[Input]]) -> Iterator[Input]:
    """Yield the inputs that all members have. Residuals are left out together, as a ControlNet passes them.

    Raises:
        SourceError: a member needs an input that another one does not have.
    """
    first, *others = inputs
    by_name = [{spec.name: spec for spec in other} for other in others]
    differing = {str(spec.place[0]) for spec in first for other in by_name if other.get(spec.name) != spec}
    names = {spec.name for spec in first}
    differing |= {str(spec.place[0]) for other in others for spec in other if spec.name not in names}
    if any(name.startswith(("down_block_add", "mid_block_add")) for name in differing):
        differing |= {"down_block_additional_residuals", "mid_block_additional_residual"}
    for each in inputs:
        for spec in each:
            if str(spec.place[0]) in differing and not spec.optional:
                raise SourceError(
                    f"the members take {spec.name} differently", where="members", hint="use UNets of one conditioning"
                )
    yield from (spec for spec in first if str(spec.place[0]) not in differing)


def _common_sites(members: Iterable[GraphUNet]) -> frozenset[str]:
    """Return the sites that all members have in one shape, and whose values are kept."""
    shapes = []
    for member in members:
        graph = member.graph
        nodes = sites(graph.fx)
        shapes.append(
            {
                (name, graph.dims.expressions(nodes[name].meta["val"], nodes[name].meta["probe"]))
                for name, site in graph.sites.items()
                if not site.bypassed
            }
        )
    common = frozenset(name for name, shape in set.intersection(*shapes) if "?" not in shape)
    if not common:
        raise SpecError(
            "the members have no site in common, in one shape",
            where="carry_features",
            hint="leave it out, or apply InheritFeatures with the same sites to all members",
        )
    return common
