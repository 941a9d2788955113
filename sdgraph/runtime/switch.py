"""`switch`: several UNets in the place of one, each of which computes some calls of a generation."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Self

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import nn

from ..errors import ModeError, SavedError, ScheduleError, SourceError, SpecError
from ..inheritance.cache import Backend
from ..inheritance.tracker import GenerationTracker
from ..options import Count, Positive, Share, checked
from ..schedules import TRAINED, ByTimestep, MemberSchedule, SamplingRun
from ..views.timetable import Timetable, timetable
from .adapters import LORA
from .apply import apply
from .diffusers_api import REFUSED, UNetCall, refusal
from .members import (
    check_agreement,
    check_names,
    common_inputs,
    common_sites,
    facts,
    hold_once,
    site_shapes,
    tensors_of,
    unet_of,
)
from .recipe import PASSES
from .rota import Rota, Whole, check_schedule, read_schedule
from .serialization import one_device
from .switch_folder import Contents, load_switch, save_switch
from .unet import GraphUNet

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
    check_names(members)
    names = tuple(members)
    ratios = {"boundary_ratio": boundary_ratio, "denoising_end": denoising_end}
    given = [name for name, value in ({"schedule": schedule} | ratios).items() if value is not None]
    if len(given) != 1 and (given or len(names) > 1):
        found = " and ".join(given) or "neither a schedule nor a boundary_ratio"
        hint = "pass one of them, such as boundary_ratio=0.5 or schedule=\"InTurns(('large', 'small'))\""
        raise SpecError(f"{found} {'are' if len(given) > 1 else 'is'} given", where="switch", hint=hint)
    if isinstance(schedule, str):
        schedule = read_schedule(schedule)
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
    check_schedule(schedule, names)
    check_agreement({name: facts(one) for name, one in members.items()})
    return SwitchUNet(
        {name: apply(unet_of(one), verify=verify) for name, one in members.items()},
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
        check_names(members)
        check_agreement({name: facts(member) for name, member in members.items()})
        ModelMixin.__init__(self)
        self.members = nn.ModuleDict(members)  # type: ignore[assignment]
        shapes = [site_shapes(member.graph) for member in members.values()] if carry_features else []
        self.tracker = GenerationTracker()
        carried = common_sites(shapes) if carry_features else frozenset()
        self.rota = Rota(schedule, members, self.tracker, carried, guidance_scale)
        hold_once([list(tensors_of(member)) for member in members.values()])
        first = next(iter(members.values()))
        self.register_to_config(**{k: v for k, v in first.graph.config.items() if k != PASSES})
        self.call_inputs = tuple(common_inputs([member.call_inputs for member in members.values()]))
        self._conditioning = tuple(i.name for i in self.call_inputs if i.conditioning)
        nn.Module.train(self, False)

    # -- the call ------------------------------------------------------------------------------------------------

    def run(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if torch.compiler.is_exporting():
            raise ModeError("torch.export exports one graph", where="SwitchUNet", hint="export unet.members[name]")
        for member in self.members.values():
            member.follow_changes()

        def backend(name: str) -> Backend[Any, Any]:
            member = self.members[name]
            return member.backend if member.prepare(flat) else Whole(member.backend)

        inherits = any(member.backend.sites for member in self.members.values())
        return self.rota.run(flat, self._conditioning, backend, inherits, self._weights)

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
        return timetable(at, run, self.schedule.turns(run), self.rota.carried)

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

    @property
    def schedule(self) -> MemberSchedule:
        """The schedule that names the UNet of each call."""
        return self.rota.schedule

    @schedule.setter
    def schedule(self, schedule: MemberSchedule) -> None:
        check_schedule(schedule, self.rota.members)
        self.rota.schedule = schedule

    @property
    def carry_features(self) -> bool:
        """Whether values of common sites are taken over when the turn changes."""
        return bool(self.rota.carried)

    @property
    def guidance_scale(self) -> Mapping[str, float]:
        """The scale of classifier-free guidance of members by name, where it is not the pipeline's."""
        return self.rota.guidance_scale

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
            schedule = read_schedule(contents.schedule)
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
