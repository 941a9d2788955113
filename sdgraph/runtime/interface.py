"""The diffusers calling convention, over flat inputs: what torch modules and exported models have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from ..frontend.call import flatten
from ..inheritance.generation import Generations
from ..ir.inputs import Input
from ..schedules import Run


class UNetCall:
    """A UNet whose computation is `run(flat inputs)`, and whose calls may inherit from earlier ones."""

    generations: Generations

    def run(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The noise prediction for flat inputs, by name.

        Raises:
            CallError: they are not covered.
        """
        raise NotImplementedError

    def whole(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`run` without bookkeeping between calls: what `torch.export` exports."""
        raise NotImplementedError

    def call_inputs(self) -> Sequence[Input]:
        """The inputs that a call may have."""
        raise NotImplementedError

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: list[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The noise prediction, with diffusers' arguments.

        Args:
            sample: latents, `(batch, in_channels, height, width)`; any height and width.
            timestep: a number, a 0-d tensor, or one per sample.
            encoder_hidden_states: `(batch, sequence, features)`.
        Returns:
            `UNet2DConditionOutput`, or a tuple with `return_dict=False`.
        Raises:
            CallError: the graph does not cover the call: a shape, dtype or argument; nothing is ignored.
        """
        call = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs,
            "added_cond_kwargs": added_cond_kwargs,
            "down_block_additional_residuals": down_block_additional_residuals,
            "mid_block_additional_residual": mid_block_additional_residual,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
            "encoder_attention_mask": encoder_attention_mask,
        }
        flat = flatten(call, self.call_inputs())
        result = self.whole(flat) if torch.compiler.is_exporting() else self.run(flat)
        return UNet2DConditionOutput(sample=result) if return_dict else (result,)

    def expecting(self, calls: Any) -> AbstractContextManager[None]:
        """Return a context that tells what calls the generations that begin in it, in this thread, will make.

        Loops of one's own need it for schedules that depend on the number of calls or their timesteps, and for
        forecasts along noise levels. With a pipeline, `sdgraph.attach(pipe)` sees to it.

        Args:
            calls: a diffusers scheduler after `set_timesteps`, the timesteps of the calls, or their number.
        Example:
            `scheduler.set_timesteps(20)`, then `with unet.expecting(scheduler): ...`
        """
        return self.generations.expecting(Run.of(calls))

    def reset(self) -> None:
        """Forget what was kept between calls: whatever comes next is computed anew."""
        self.generations.clear()

    def cache_bytes(self) -> int:
        """Bytes kept between calls, of all generations that are under way."""
        return self.generations.bytes()


def no_value(site: str) -> torch.Tensor:
    """The value of a site at a call that inherits nothing: there is none.

    Raises:
        KeyError: always.
    """
    raise KeyError(site)
