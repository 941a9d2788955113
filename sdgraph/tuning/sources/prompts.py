"""Prompts alone as a source: noised latents from the teacher's own trajectories."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import TuningError
from ...options import Count, Index, NotNegative, checked
from ...runtime.digest import as_number, hash_model, hash_text
from ...runtime.pipelines import without_bar
from ..noise_schedule import NoiseSchedule
from ..random_numbers import generator
from .base import Contents, Samples, Source
from .captions import Captions, as_texts, keys_of, time_ids, with_empty
from .tensor_cache import GIGABYTE, TensorCache


class Prompts(Source):
    """Prompts without images: the latents that the teacher's UNet was called with while it generated from them.

    The pipeline generates with its own scheduler and with guidance, once, and keeps some calls of every generation in
    a folder. The student then learns where it will be used, and no images are needed. A row is a call.

    Args:
        prompts: the prompts.
        pipe: the pipeline of the teacher. It generates where it is, and is left as it was.
        cache: the folder to keep the calls in. Generating that was stopped goes on there, and loses one batch at most.
        num_inference_steps: the steps of a generation.
        guidance_scale: the guidance; by default the pipeline's own.
        calls_per_prompt: the calls that are kept of a generation, drawn at random from equal parts of it.
        height: the height of the images, in pixels; by default the pipeline's own.
        width: the width of the images, in pixels; by default the pipeline's own.
        batch: the prompts of a call of the pipeline.
        seed: the seed of the initial latents and of the choice of calls.
        cache_limit: the largest size of the folder, in bytes.
    Raises:
        TuningError: there are no prompts; the scheduler noises otherwise than in training; latents are not finite; the
            folder is of another recipe, or too large.
    Example:
        `Prompts(["a bowl of fruit", "a house by the sea"], pipe, cache="trajectories")`
    Source:
        Kim et al., "Random Conditioning with Distillation for Data-Efficient Diffusion Model Compression", 2025, for
        training without images. Which latents to take is our own choice.
    """

    @checked(TuningError)
    def __init__(
        self,
        prompts: str | Iterable[str],
        pipe: Any,
        *,
        cache: str | Path,
        num_inference_steps: Count = 25,
        guidance_scale: NotNegative | None = None,
        calls_per_prompt: Count = 4,
        height: Count | None = None,
        width: Count | None = None,
        batch: Count = 8,
        seed: Index = 0,
        cache_limit: Count = 100 * GIGABYTE,
    ) -> None:
        self._prompts = as_texts(prompts, "prompts")
        if calls_per_prompt > num_inference_steps:
            raise TuningError(
                f"{calls_per_prompt} calls cannot be kept of {num_inference_steps} steps",
                where="calls_per_prompt",
                hint=f"pass 1 to {num_inference_steps}",
            )
        _check_scheduler(pipe.scheduler)
        captions = Captions(pipe)
        captions.tell_of_cut(self._prompts)
        self._empty = dict(captions.empty)
        self._calls, self._seed, self._pipe, self._captions = calls_per_prompt, seed, pipe, captions
        self._call: dict[str, Any] = {"num_inference_steps": num_inference_steps, "height": height, "width": width}
        if guidance_scale is not None:
            self._call["guidance_scale"] = guidance_scale
        scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
        recipe = {
            **captions.recipe,
            "teacher": hash_model(pipe.unet),
            "scheduler": type(pipe.scheduler).__name__,
            "options of the scheduler": hash_text(json.dumps(scheduler, sort_keys=True, default=str)),
            **{name: str(value) for name, value in self._call.items()},
            "guidance_scale": str(guidance_scale),
            "calls_per_prompt": str(calls_per_prompt),
            "seed": str(seed),
        }
        self._keys = keys_of(self._prompts)
        self.contents = Contents(recipe, self._keys, cache=Path(cache))
        self._kept = TensorCache(Path(cache), recipe, self._keys, batch, cache_limit)
        self._kept.fill(self._generated, "the teacher's trajectories")
        del self._pipe, self._captions  # so that their memory can be freed
        if "text_embeds" in self._empty:
            self._empty["time_ids"] = self._kept.rows([0], "time_ids")["time_ids"][0]  # one size for all

    def __len__(self) -> int:
        return len(self._prompts) * self._calls

    def samples(self, rows: Sequence[int], generators: Sequence[np.random.Generator]) -> Samples:
        prompts, calls = zip(*(divmod(row, self._calls) for row in rows), strict=True)
        kept = self._kept.rows(prompts, "latents", "noisy", "timesteps")
        noisy, timesteps = (kept[name][torch.arange(len(rows)), list(calls)] for name in ("noisy", "timesteps"))
        return Samples(kept["latents"].float(), noisy.float(), timesteps)

    def conditions(self, rows: Sequence[int | None]) -> dict[str, Tensor]:
        known = self._kept.rows([row // self._calls for row in rows if row is not None], *self._empty)
        return with_empty(rows, known, self._empty)

    def fingerprint(self) -> str:
        return self.contents.fingerprint()

    def _draw(self, purpose: str, row: int) -> np.random.Generator:
        """Return random numbers that follow from the prompt, so that other prompts may come and go."""
        return generator(self._seed, purpose, as_number(self._keys[row]))

    def _generated(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Generate from prompts; return the final latents, the calls that are kept of them, and their conditions."""
        prompts = [self._prompts[row] for row in rows]
        seeds = [int(self._draw("trajectory", row).integers(2**62)) for row in rows]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with without_bar(self._pipe), _recorded(self._pipe.unet, len(rows)) as calls:
            result = self._pipe(prompt=prompts, generator=generators, output_type="latent", **self._call)
        latents = result.images.cpu()
        chosen = torch.tensor([_drawn(len(calls), self._calls, self._draw("calls", row)) for row in rows])
        noisy = torch.stack([sample for sample, _ in calls], 1)[torch.arange(len(rows))[:, None], chosen]
        for prompt, final, kept in zip(prompts, latents, noisy, strict=True):
            if not (torch.isfinite(final).all() and torch.isfinite(kept).all()):
                raise TuningError(
                    "the teacher's latents are not finite",
                    where=f"prompt {prompt!r}",
                    hint="load the pipeline in bfloat16 or float32",
                )
        known = self._captions(prompts)
        if "text_embeds" in known:
            height, width = (side * self._pipe.vae_scale_factor for side in latents.shape[2:])
            known["time_ids"] = time_ids((height, width), (0, 0), (height, width)).repeat(len(rows), 1)
        return {"latents": latents, "noisy": noisy, "timesteps": torch.tensor([t for _, t in calls])[chosen], **known}


def _check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler whose latents are not those of training, noised = sqrt(alpha) clean + sqrt(1 - alpha) noise.

    Those with other units, such as Euler's, scale what the UNet is called with to this form.
    """
    NoiseSchedule.of(scheduler)
    if scheduler.config.get("use_flow_sigmas"):
        raise TuningError(
            f"{type(scheduler).__name__} with use_flow_sigmas mixes latents and noise otherwise than in training",
            where="pipe.scheduler",
            hint="generate with a scheduler of the same model without use_flow_sigmas",
        )


def _drawn(count: int, parts: int, draw: np.random.Generator) -> list[int]:
    """Return calls of a generation, one at random from each of equal parts of it."""
    return [int((part + draw.random()) * count / parts) for part in range(parts)]


@contextmanager
def _recorded(unet: Any, count: int) -> Iterator[list[tuple[Tensor, int]]]:
    """A context with the calls of a UNet so far: what it sees of the last `count` samples, and the timestep.

    With guidance the samples come twice. Some schedulers have timesteps between those of training, which are rounded.
    """
    calls: list[tuple[Tensor, int]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample, timestep = (*args, kwargs.get("sample"), kwargs.get("timestep"))[:2]
        calls.append((sample[-count:].cpu(), round(float(timestep))))

    handle = unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
