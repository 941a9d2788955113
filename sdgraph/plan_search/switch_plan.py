"""`SwitchPlan`: the UNet that computes each call and the passes of each UNet, as a search over several finds them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from ..atomic import written
from ..compiler.passes import Pass, parse
from ..errors import SavedError, SdgraphError, SpecError, did_you_mean
from ..options import Count, Misfit, Text, checked, fitted
from ..runtime.apply import apply
from ..runtime.switch import SwitchUNet, switch
from ..schedules import MemberSchedule
from ..spec import read
from ..text import json_object
from . import PLAN_FORMAT

SEARCH_AGAIN = "give a file of SwitchPlan.save, or of `sdgraph search --unet NAME=FOLDER --save`"


@dataclass(frozen=True)
class SwitchPlan:
    """The UNet that computes each call of a generation, and the passes of each UNet. Prints as text.

    Args:
        schedule: the schedule that names the UNet of each call.
        passes: the passes of each UNet that the schedule names, with their schedules and forecasts; none if it computes
            everything.
        steps: the number of steps of the generations that the plan was found for.
        solver: the class name of the scheduler that it was found with.
        configs: the configuration of each of these UNets, which `switch` compares.
    Example:
        `pipe.unet = sdgraph.SwitchPlan.load("plan.json").switch({"large": large, "small": small})`
    """

    schedule: MemberSchedule
    passes: Mapping[str, tuple[Pass, ...]]
    steps: int
    solver: str
    configs: Mapping[str, Mapping[str, Any]] = field(repr=False)

    def __str__(self) -> str:
        named = ((name, _text(passes) or "everything computed") for name, passes in self.passes.items())
        return "\n".join([str(self.schedule), *(f"{name}: {text}" for name, text in named)])

    @checked(SpecError)
    def switch(self, unets: Annotated[Mapping[str, Any], Any], *, verify: bool = True) -> SwitchUNet:
        """Return the switch of the plan: `sdgraph.switch` with its schedule, of the UNets with its passes.

        Args:
            unets: the UNets by name, as they were given to the search. Those that the plan does not use are left out.
            verify: whether the traces of UNets of diffusers are compared with them.
        Returns:
            a UNet for the pipeline that was searched on. It needs `sdgraph.attach(pipe)`.
        Raises:
            SpecError: a UNet is missing, or is another one than the search had.
            SourceError: the UNets take different latents or conditioning.
        """
        members = {}
        for name, passes in self.passes.items():
            if not isinstance(unets, Mapping) or name not in unets:
                known = list(map(str, unets)) if isinstance(unets, Mapping) else []
                hint = did_you_mean(name, known) or f"pass unets by these names: {', '.join(self.passes)}"
                raise SpecError(f"there is no UNet {name!r}, which the plan uses", where="unets", hint=hint)
            unet = unets[name].unet if hasattr(unets[name], "scheduler") else unets[name]
            check_model(self.configs[name], getattr(unet, "config", {}), f"unets[{name!r}]")
            members[name] = apply(unet, passes, verify=verify)
        return switch(members, self.schedule, verify=verify)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, which `load` reads from a file."""
        return {
            "format": PLAN_FORMAT,
            "schedule": str(self.schedule),
            "passes": {name: _text(passes) for name, passes in self.passes.items()},
            "steps": self.steps,
            "solver": self.solver,
            "unets": {name: plain_config(config) for name, config in self.configs.items()},
        }

    @checked(SavedError)
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON.

        Args:
            path: the file.
        """
        with written(path) as file:
            file.write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    @classmethod
    @checked(SavedError)
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote, or `sdgraph search --save` for several UNets.

        Args:
            path: the file.
        Returns:
            the plan.
        Raises:
            SavedError: the file cannot be read, has another format, is damaged, or is a plan of one UNet.
        """
        plain = json_object(Path(path), SavedError, hint=SEARCH_AGAIN, format=PLAN_FORMAT)
        if "unet" in plain and "schedule" not in plain:
            hint = "apply its passes: sdgraph.apply(unet, plan['passes'])"
            raise SavedError("this is a plan of one UNet", where=str(path), hint=hint)
        try:
            schedule = read(fitted(plain.get("schedule"), Text), MemberSchedule)
            texts = fitted(plain.get("passes"), dict[str, str])
            passes = {name: parse(text) if text else () for name, text in texts.items()}
            configs = fitted(plain.get("unets"), dict[str, dict[str, Any]])
            steps, solver = fitted(plain.get("steps"), Count), fitted(plain.get("solver"), Text)
        except (Misfit, SdgraphError) as error:
            what = error.what if isinstance(error, SdgraphError) else str(error)
            raise SavedError(f"the plan is damaged: {what}", where=str(path), hint=SEARCH_AGAIN) from error
        if not isinstance(schedule, MemberSchedule) or not set(schedule.members) == passes.keys() == configs.keys():
            what = "the plan is damaged: its schedule, passes and UNets name different UNets"
            raise SavedError(what, where=str(path), hint=SEARCH_AGAIN)
        return cls(schedule, passes, steps, solver, configs)


def _text(passes: tuple[Pass, ...]) -> str:
    return ", ".join(map(str, passes))


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a UNet as plain data, without private entries.

    Args:
        config: the configuration.
    """
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(public, default=str))
    return plain


def check_model(there: Mapping[str, Any], here: Mapping[str, Any], where: str) -> None:
    """Refuse another model than that of a plan.

    Args:
        there: the configuration of the UNet of the plan.
        here: the configuration of the UNet that is given.
        where: the place of the UNet or of the plan, for the message.
    Raises:
        SpecError: the configurations differ; the error names the differences.
    """
    there, here = plain_config(there), plain_config(here)
    off = [name for name in {**there, **here} if name != "sample_size" and there.get(name) != here.get(name)]
    if off:
        more = f", and {', '.join(off[1:4])}" if off[1:] else ""
        raise SpecError(
            f"the plan is of another model: there {off[0]} is {_short(there.get(off[0]))}, here "
            f"{_short(here.get(off[0]))}{more}",
            where=where,
            hint="search for a plan of this model, or give the model that the plan was found for",
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
