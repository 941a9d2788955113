"""The interface of diffusers: the call that all UNets of sdgraph share, and the methods that a traced UNet refuses.

What diffusers changes in a traced UNet after it was made is `Adapters`, which makes another graph. Methods of diffusers
that concern the weights of a `GraphUNet` or its folder stand beside those in `unet.py`, because they are as much ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from ..errors import CallError, ModeError
from ..frontend.call import flatten
from ..inheritance.cache import Backend, no_value
from ..inheritance.tracker import GenerationTracker
from ..ir.inputs import Input
from ..options import Count, checked
from ..schedules import SamplingRun

LARGEST = 2**24  # latents and tokens of a call to prepare
_FUSED = "leave it off: the graph calls PyTorch's fused attention, whatever the backend"
_SOURCE = "call it on the source UNet"
UPLOAD = (
    "save it, and upload the folder by huggingface_hub.upload_folder; from_pretrained takes the folder that "
    "huggingface_hub.snapshot_download(repository, local_dir=...) returns"
)
REFUSED: Mapping[str, str] = {  # hints by name
    # The graph holds the attention that the source's processors computed when they were traced.
    "enable_npu_flash_attention": _FUSED,
    "disable_npu_flash_attention": _FUSED,
    "set_use_npu_flash_attention": _FUSED,
    "enable_xla_flash_attention": _FUSED,
    "disable_xla_flash_attention": _FUSED,
    "set_use_xla_flash_attention": _FUSED,
    "enable_xformers_memory_efficient_attention": _FUSED,
    "disable_xformers_memory_efficient_attention": _FUSED,
    "set_use_memory_efficient_attention_xformers": _FUSED,
    "set_attention_backend": _FUSED,
    "reset_attention_backend": _FUSED,
    "enable_parallelism": "run one UNet per device; sequences are not split here",
    # The graph is one function; the parts of a UNet's forward are not methods of it.
    "get_time_embed": _SOURCE,
    "get_class_embed": _SOURCE,
    "get_aug_embed": _SOURCE,
    "process_encoder_hidden_states": _SOURCE,
    "compile_repeated_blocks": "unet.compile() compiles each variant whole",
    "enable_gradient_checkpointing": "train in smaller batches; a graph calls no blocks for gradient checkpointing",
    "enable_layerwise_casting": "cast all of it: unet.to(torch.float16)",
    "load_attn_procs": "use load_lora_adapter, or load them into the source UNet and call sdgraph.apply again",
    "save_attn_procs": "use save_lora_adapter, or save them from the source UNet",
    "from_single_file": "UNet2DConditionModel.from_single_file(...), then sdgraph.apply",
    # Of a name on the hub, diffusers downloads the files that it knows, without the recipe.
    "push_to_hub": UPLOAD,
    "enable_lora_hotswap": "load the adapter under a new name, then set_adapters; nothing is compiled for good here",
}


class UNetCall:
    """A UNet that diffusers' pipelines call, and whose calls may reuse features of earlier ones."""

    backend: Backend[Mapping[str, torch.Tensor], torch.Tensor]
    tracker: GenerationTracker
    call_inputs: Sequence[Input]  # those that a call may have

    def run(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the prediction of a call, (B, out_channels, H, W).

        Args:
            flat: the inputs of the call, by name.
        Raises:
            CallError: they are not covered.
        """
        raise NotImplementedError

    def foreseen(self, calls: Any) -> Iterable[tuple[Backend[Any, Any], frozenset[str]]]:
        """Return the backends that compute the calls of a generation, with each set of sites that they may reuse.

        Args:
            calls: a scheduler after `set_timesteps`, the timesteps of the calls, or their number.
        """
        raise NotImplementedError

    def random_inputs(self, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Return random values of the inputs that a call must have.

        Args:
            sizes: the sizes of the call by symbol, such as `{"B": 2, "H": 64, "W": 64, "L": 77}`.
        """
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
        """Compute one call, with diffusers' arguments.

        B is the number of samples, with guidance two for every image; H and W are the height and width of the latents,
        an eighth of those of the images; L is the length of the prompts in tokens.

        Args:
            sample: the noisy latents, (B, in_channels, H, W).
            timestep: the timestep of the call, in the scheduler's unit, such as 0 to 999; a number, a scalar tensor, or
                (B,).
            encoder_hidden_states: the embeddings of the prompts, (B, L, cross_attention_dim).
            class_labels: the classes or noise levels of a UNet with class conditions, (B,), or their embeddings,
                (B, width).
            timestep_cond: the embedding of the guidance scale for an LCM, (B, time_cond_proj_dim).
            attention_mask: None. A mask of self-attention has one length, and a UNet has several.
            cross_attention_kwargs: `{"scale": s}`, the factor of unfused LoRA layers at this call, without unit.
            added_cond_kwargs: the further conditions by name. For SDXL these are "text_embeds", (B, width), and
                "time_ids", (B, 6), in pixels; for IP-Adapters "image_embeds", a list with a tensor (B, images, width)
                or (B, images, tokens, width) for each adapter.
            down_block_additional_residuals: the residuals of a ControlNet, a tensor (B, channels, height, width) for
                each skip connection, of its size.
            mid_block_additional_residual: the residual of a ControlNet for the mid block, a tensor of its size.
            down_intrablock_additional_residuals: the residuals of a T2I-Adapter, a tensor (B, channels, height, width)
                for each down block, of its size.
            encoder_attention_mask: the mask of the tokens, (B, L), 1 where a token is attended to and 0 elsewhere. It
                needs a UNet that was traced with `inputs=("encoder_attention_mask",)`.
            return_dict: whether the result is a `UNet2DConditionOutput`, or else a tuple of one tensor.
        Returns:
            the prediction, (B, out_channels, H, W), in the dtype of the UNet.
        Raises:
            CallError: the graph does not cover a shape, dtype or argument. Nothing is ignored.
        Example:
            `unet(latents, 981, embeddings).sample`
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
        result = self.predict(call)
        return UNet2DConditionOutput(sample=result) if return_dict else (result,)

    def predict(self, call: Mapping[str, Any]) -> torch.Tensor:
        """Return the prediction of a call, (B, out_channels, H, W).

        Args:
            call: the arguments of `forward` by name, None for those that are left out.
        Raises:
            CallError: the graph does not cover a shape, dtype or argument.
        """
        return self.run(flatten(call, self.call_inputs))

    def expecting(self, calls: Any) -> AbstractContextManager[None]:
        """Return a context that announces the calls of the generations that begin in it, in this thread.

        A hand-written loop needs it for schedules that depend on the number of calls or their timesteps, and for
        forecasts along noise levels. For a pipeline, `sdgraph.attach(pipe)` does this.

        Args:
            calls: a diffusers scheduler after `set_timesteps`, the timesteps of the calls, or their number.
        Example:
            `scheduler.set_timesteps(20)`, then `with unet.expecting(scheduler): ...`
        """
        return self.tracker.expecting(SamplingRun.of(calls))

    def reset(self) -> None:
        """Empty the feature cache. The next call computes everything."""
        self.tracker.clear()

    @checked(CallError)
    def warm_up(self, height: Count, width: Count, *, batch: Count = 2, tokens: Count = 77, calls: Any = 25) -> None:
        """Prepare the calls of a generation of one size, so that the first request does not have to.

        Every variant that the generation needs is built, compiled or opened, and run once on random inputs. What is
        kept between calls stays as it is.

        Args:
            height: the height of the latents, an eighth of that of the images.
            width: the width of the latents.
            batch: the samples per call; with guidance two for every image.
            tokens: the length of the prompt's embedding.
            calls: a scheduler after `set_timesteps`, the timesteps of the calls, or their number; it decides which
                variants are needed.
        Raises:
            CallError: the UNet cannot run this size.
        Example:
            `unet.warm_up(64, 64, calls=25)` before a server takes requests for images of 512x512 in 25 steps
        """
        if batch * (height * width + tokens) > LARGEST:
            what = f"a batch of {batch} latents of {height}x{width} with {tokens} tokens is larger than any memory"
            raise CallError(what, where="warm_up", hint="height and width are those of latents")
        sizes = {"B": batch, "H": height, "W": width, "L": tokens}
        flat = self.random_inputs(sizes)
        ready = flat["sample"].shape[0], *flat["sample"].shape[2:]
        if ready != (batch, height, width):
            raise CallError(
                f"a batch of {batch} latents of {height}x{width} is not covered",
                where="warm_up",
                hint=f"the nearest larger one is {ready[0]} of {ready[1]}x{ready[2]}",
            )
        with torch.no_grad():
            computed: dict[int, Mapping[str, Any]] = {}
            for backend, reused in self.foreseen(calls):
                if id(backend) not in computed:
                    _, computed[id(backend)] = backend.compute(flat, frozenset(), no_value)
                if reused:
                    backend.compute(flat, reused, computed[id(backend)].__getitem__)

    def cache_bytes(self) -> int:
        """Return the size of the feature cache in bytes, over all generations that are under way."""
        return self.tracker.bytes()


def refusal(name: str, hint: str, what: str = "a traced UNet", where: str = "GraphUNet") -> Callable[..., Any]:
    """Return a method that refuses to be called.

    Args:
        name: name of the method.
        hint: what to do instead.
        what: the thing that has no such method, in words.
        where: its class.
    """

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ModeError(f"{what} has no {name}", where=where, hint=hint)

    refuse.__name__ = name
    return refuse
