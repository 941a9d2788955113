"""`MasksByCall`: one UNet that leaves out other regions at other calls, with one set of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar

from diffusers import UNet2DConditionModel

from ..errors import SdgraphError, SourceError, SpecError
from ..options import Bounds, Count, checked
from ..schedules import TRAINED, ByTimestep, MemberSchedule
from ..spec import Spec
from .apply import apply
from .switch import SwitchUNet, switch
from .unet import GraphUNet

Regions = tuple[str, ...]


@dataclass(frozen=True)
class MasksByCall(Spec):
    """Sets of regions that a UNet leaves out, and the schedule that says which set applies to a call.

    It is data: it prints as text that parses back, and `switch` makes it a UNet. A mask is a `PruneBlocks` and no
    `Bypass`, because a bypass computes the first call of a generation as a whole.

    Args:
        left_out: the module paths of the regions that each mask leaves out, in the order in which the schedule first
            names the masks; none for the whole UNet.
        schedule: the schedule that names the mask of each call.
    Raises:
        SpecError: there is not one set of regions for each name of the schedule.
    Example:
        `MasksByCall(((), ("mid_block",)), ByTimestep(("whole", "light"), (500,))).switch(pipe.unet)`
    Source:
        Yang et al., "ALTER: All-in-One Layer Pruning and Temporal Expert Routing", 2025. It learns its masks and their
        routing, as `sdgraph.tuning.LearnedRouting` does.
    """

    refusal: ClassVar[type[SdgraphError]] = SpecError

    left_out: Annotated[tuple[Regions, ...], Bounds(length=1)]
    schedule: MemberSchedule

    def __post_init__(self) -> None:
        names = tuple(dict.fromkeys(self.schedule.members))
        if len(names) != len(self.left_out):
            raise SpecError(
                f"{len(self.left_out)} sets of regions for {len(names)} masks, {', '.join(names)}",
                where="MasksByCall",
                hint="give one set for each name, () for the whole UNet",
            )

    @property
    def masks(self) -> Mapping[str, Regions]:
        """The regions that each mask leaves out, by its name."""
        return dict(zip(dict.fromkeys(self.schedule.members), self.left_out, strict=True))

    @classmethod
    @checked(SpecError)
    def in_equal_intervals(cls, *left_out: Regions, num_train_timesteps: Count = TRAINED) -> MasksByCall:
        """Return masks for equal intervals of the training timesteps.

        Args:
            left_out: the module paths of the regions that are left out in each interval, the noisiest one first.
            num_train_timesteps: the number of training timesteps.
        Raises:
            SpecError: there are more intervals than timesteps.
        Example:
            `MasksByCall.in_equal_intervals(("mid_block",), ())`
        Source:
            The intervals by hand with which ALTER compares its learned routing, which is better.
        """
        count = len(left_out)
        if not 1 <= count <= num_train_timesteps:
            raise SpecError(
                f"{count} masks for {num_train_timesteps} timesteps", where="left_out", hint="one mask or several"
            )
        names = tuple(f"mask-{number}" for number in range(count))
        starts = [-(-number * num_train_timesteps // count) for number in range(count - 1, 0, -1)]
        return cls(left_out, ByTimestep(names, tuple(map(float, starts))))

    @classmethod
    def routed(cls, left_out: Mapping[str, Regions], by_interval: tuple[str, ...], timesteps: int) -> MasksByCall:
        """Return masks whose schedule names one for each of some equal intervals of the training timesteps.

        Args:
            left_out: the regions that each mask leaves out, by its name.
            by_interval: the name of the mask of each interval, that of the noisiest one first.
            timesteps: the number of training timesteps.
        """
        count = len(by_interval)
        names, starts = [by_interval[0]], list[float]()
        for number, (before, name) in enumerate(pairwise(by_interval), 1):
            if name != before:
                names.append(name)
                starts.append(float(-(-(count - number) * timesteps // count)))
        return cls(tuple(left_out[name] for name in dict.fromkeys(names)), ByTimestep(tuple(names), tuple(starts)))

    def switch(self, unet: UNet2DConditionModel | GraphUNet) -> SwitchUNet:
        """Return the UNet with these masks, which takes the place of a pipeline's.

        Args:
            unet: the UNet: diffusers' own or a traced one. It stays as it is; weights are held once.
        Raises:
            SourceError: the UNet is a switch already, or cannot be traced.
            PathError, PreconditionError: the UNet has no such region, or it cannot be left out.
        """
        if isinstance(unet, SwitchUNet):
            raise SourceError(
                "the UNet is a switch of several already", where="unet", hint="pass one of unet.members.values()"
            )
        whole = apply(unet, ())
        members: dict[str, Any] = {
            name: apply(whole, f"PruneBlocks({paths!r})" if paths else (), verify=False)
            for name, paths in self.masks.items()
        }
        return switch(members, self.schedule, verify=False)
