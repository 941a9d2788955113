"""`DropIn`: a `UNet2DConditionModel` whose computation is a graph.

Whatever diffusers offers on a UNet besides its call does the same here, or is refused with a hint (`refused`). What
changes the computation is in `settings` and `lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from ..compiler.runner import replay
from ..errors import ModeError, SavedError
from ..frontend.capture import capture
from ..graph import Graph
from ..inheritance.generation import Generations
from .diffusers_api import REFUSED, UNetCall, refusal
from .recipe import PASSES, read_passes


class DropIn(UNetCall, UNet2DConditionModel):  # type: ignore[misc]
    """A UNet2DConditionModel whose computation is a graph. To diffusers it is a UNet like any other."""

    _graph: Graph
    generations: Generations
    _supports_gradient_checkpointing = False

    @property
    def graph(self) -> Graph:
        """The graph that runs."""
        raise NotImplementedError

    def hold(self, graph: Graph) -> None:
        """Run this graph from now on. It belongs to this module."""
        raise NotImplementedError

    def changed(self) -> None:
        """Drop what was derived from this module's submodules, because they have changed."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        kind = getattr(type(self), name, None)
        if isinstance(kind, property):  # it raised a ModeError, which is an AttributeError: once more, to hear it
            return kind.__get__(self)
        try:
            return super().__getattr__(name)
        except AttributeError:
            source = vars(self)["_graph"].source if "_graph" in vars(self) else None
            if source is None or name not in (vars(source).keys() | source._modules.keys()):
                raise
            value = getattr(source, name)
            if value is None or isinstance(value, bool | int | float | str):
                return value  # a setting, or None where the source has no such module
            raise ModeError(
                f"a traced UNet has no {name}", where="GraphUNet", hint="it was removed, or is no module of the graph"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if "_graph" in vars(self) and not hasattr(type(self), name) and name not in vars(self):
            self._graph.weights.check_attribute(name, value)
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._graph.weights.check_attribute(name, module)
        super().add_module(name, module)

    # -- loading and moving --------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any) -> Any:
        """Build the UNet of a configuration with random weights, as in diffusers, and apply the passes it lists."""
        if not isinstance(config, Mapping):
            try:
                config = UNet2DConditionModel.load_config(config)
            except (OSError, ValueError, TypeError) as error:
                hint = "pass a configuration, or the folder of a UNet"
                raise SavedError(f"no configuration can be read: {error}", where=str(config), hint=hint) from error
        passes = config.get(PASSES, ())
        plain = {name: value for name, value in config.items() if name != PASSES} | {
            "_class_name": "UNet2DConditionModel"
        }
        known = UNet2DConditionModel._get_init_keys(UNet2DConditionModel)
        own = {name: value for name, value in plain.items() if name in known or name.startswith("_")}
        source, unused = UNet2DConditionModel.from_config(own, return_unused_kwargs=True, **options)
        unused |= {name: value for name, value in plain.items() if name not in own}  # such as that of a moving average
        graph = capture(source)  # which may be on the meta device: accelerate makes empty models to look at their sizes
        unet = cls(replay(read_passes(passes), graph))
        return (unet, unused) if return_unused_kwargs else unet

    def enable_group_offload(self, onload_device: Any, *args: Any, **options: Any) -> None:
        """Offload as in diffusers, leaf by leaf.

        Raises:
            ModeError: `offload_type` asks for blocks, which a graph does not call.
        """
        if options.get("offload_type", args[1] if len(args) > 1 else "block_level") != "leaf_level":
            raise ModeError(
                "a graph calls its leaves, so blocks would never be brought in",
                where="enable_group_offload",
                hint="offload_type='leaf_level'",
            )
        super().enable_group_offload(onload_device, *args, **options)
        self.changed()

    # -- gradient checkpointing ----------------------------------------------------------------------------------

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a graph has no gradient checkpointing.

        Raises:
            ModeError: always.
        """
        raise ModeError("a traced UNet has no gradient checkpointing", hint="train in smaller batches")

    def disable_gradient_checkpointing(self) -> None:
        """Change nothing: a graph has no gradient checkpointing."""


for _name, _hint in REFUSED.items():
    setattr(DropIn, _name, refusal(_name, _hint))
