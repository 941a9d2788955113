"""Paths as a source: the teacher's whole generations, on which a student learns to jump from call to call."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ...errors import TuningError
from ...options import Count, Index, NotNegative, Share, check, checked
from ...runtime.digest import as_number, hash_model, hash_text
from ...runtime.recipe import CALLS, FOLDED
from ..noise_schedule import NoiseSchedule
from ..random_numbers import generator
from .base import Contents, Samples, Source
from .captions import Captions, as_texts, keys_of, time_ids
from .tensor_cache import GIGABYTE, TensorCache


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance that a student learns to predict in one call.

    Args:
        scale: the guidance scale.
        range: the first and the last share of the calls of a path between which guidance acts, 0 for the noisiest; a
            first share above 0 leaves guidance out at the noisiest calls.
    Raises:
        TuningError: the scale is negative or not finite, or the shares are not in order.
    Example:
        `Guided(7.5)`, `Guided(7.5, range=(0.2, 1.0))`
    Source:
        Meng et al., "On Distillation of Guided Diffusion Models", 2023; Kynkäänniemi et al., "Applying Guidance in a
        Limited Interval Improves Sample and Distribution Quality in Diffusion Models", 2024.
    """

    scale: NotNegative
    range: tuple[Share, Share] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check(self, TuningError)
        if self.range[0] >= self.range[1]:
            raise TuningError(
                f"the range {self.range} is empty", where="Guided", hint="pass two shares in order, such as (0.2, 1.0)"
            )

    def acts(self, call: int, calls: int) -> bool:
        """Return whether guidance acts at a call.

        Args:
            call: the number of the call, from 0.
            calls: the number of calls of the path.
        """
        return self.scale != 1 and self.range[0] <= call / calls < self.range[1]


class Paths(Source):
    """The teacher's guided paths from noise to images, on which a student learns to jump.

    Every prompt has a path: the latents before and after each of `grid` calls of DDIM with trailing timesteps. Paths
    are generated once and kept in a folder, whatever the student's number of calls is. A row is one of the student's
    `calls` calls, with the point of the path that it should arrive at, for the losses `Trajectory` and `Phased`.

    The student needs one call where the teacher needs two, because the guidance is in the path. It cannot be guided
    further: a call with guidance is refused, and negative prompts with it. The folder of the run gets the scheduler of
    the student, a DDIM with trailing timesteps, beside its weights.

    Args:
        prompts: the prompts.
        pipe: the pipeline of the teacher. It generates where it is, and is left as it was.
        cache: the folder to keep the paths in. Generating that was stopped goes on there, and loses one batch at most.
        calls: the calls of the student, which divide the grid. As many as the grid fold the guidance in alone.
        grid: the calls of the teacher.
        guidance: the guidance that is folded in.
        points: "edges" for rows at the student's calls alone, or "grid" for rows at all points of the grid, as
            `Phased` reads them.
        height: the height of the images, in pixels; by default the pipeline's own.
        width: the width of the images, in pixels; by default the pipeline's own.
        batch: the prompts of a call of the UNet.
        seed: the seed of the initial latents.
        cache_limit: the largest size of the folder, in bytes.
    Raises:
        TuningError: there are no prompts; `calls` does not divide the grid, or the timesteps of its scheduler are none
            of the grid; the scheduler has no schedule of training; the teacher has an embedding of the guidance; paths
            are not finite; the folder is of another teacher, scheduler or guidance, or too large.
    Example:
        `Paths(prompts, pipe, cache="paths", calls=2, guidance=Guided(7.5))`
    Source:
        Luhman and Luhman, "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed", 2021,
        for paths of a teacher as targets. One record for all numbers of calls is our own.
    """

    @checked(TuningError)
    def __init__(
        self,
        prompts: str | Iterable[str],
        pipe: Any,
        *,
        cache: str | Path,
        calls: Count,
        grid: Count = 24,
        guidance: Guided = Guided(7.5),
        points: str = "edges",
        height: Count | None = None,
        width: Count | None = None,
        batch: Count = 8,
        seed: Index = 0,
        cache_limit: Count = 100 * GIGABYTE,
    ) -> None:
        self._prompts = as_texts(prompts, "prompts")
        if grid % calls:
            fitting = [count for count in range(1, grid + 1) if grid % count == 0]
            raise TuningError(
                f"{calls} calls do not divide the {grid} calls of the teacher",
                where="calls",
                hint=f"pass one of {', '.join(map(str, fitting))}, or another grid",
            )
        if points not in ("edges", "grid"):
            raise TuningError(f"there are no points {points!r}", where="points", hint="pass 'edges' or 'grid'")
        self._scheduler = trailing(pipe.scheduler, grid)
        self.scheduler = trailing(pipe.scheduler, calls)
        self._stride = grid // calls
        self._timesteps = self._scheduler.timesteps.tolist()
        if self.scheduler.timesteps.tolist() != self._timesteps[:: self._stride]:
            raise TuningError(
                f"the timesteps of {calls} calls are none of those of {grid}",
                where="calls",
                hint="pass a grid that the timesteps of training divide better, such as 8 or 20",
            )
        self.entries = {FOLDED: {"scale": guidance.scale, "range": list(guidance.range)}, CALLS: calls}
        captions = Captions(pipe)
        captions.tell_of_cut(self._prompts)
        self._names, self._guidance, self._seed, self._grid = [*captions.empty], guidance, seed, grid
        self._pipe, self._captions = pipe, captions
        sides = (height, width)
        self._size = tuple(
            (side or pipe.unet.config.sample_size * pipe.vae_scale_factor) // pipe.vae_scale_factor for side in sides
        )
        config = {name: value for name, value in self._scheduler.config.items() if not name.startswith("_")}
        recipe = {
            **captions.recipe,
            "teacher": hash_model(pipe.unet),
            "scheduler": hash_text(json.dumps(config, sort_keys=True, default=str)),
            "grid": str(grid),
            "guidance": str(guidance),
            "latents": f"{self._size[0]}x{self._size[1]}",
            "seed": str(seed),
        }
        self._keys = keys_of(self._prompts)
        self._kept = TensorCache(Path(cache), recipe, self._keys, batch, cache_limit)
        self._kept.fill(self._generated, "the teacher's paths")
        self._places = range(0, grid, self._stride) if points == "edges" else range(grid)
        of_rows = {**recipe, "calls": str(calls), "points": points}
        self.contents = Contents(of_rows, self._keys, cache=Path(cache))
        del self._pipe, self._captions  # so that their memory can be freed

    def __len__(self) -> int:
        return len(self._prompts) * len(self._places)

    def samples(self, rows: Sequence[int], generators: Sequence[np.random.Generator]) -> Samples:
        prompts, numbers = zip(*(divmod(row, len(self._places)) for row in rows), strict=True)
        places = [self._places[number] for number in numbers]
        edges = [(place // self._stride + 1) * self._stride for place in places]
        paths, each = self._kept.rows(prompts, "path")["path"].float(), torch.arange(len(rows))
        following = [place + 1 for place in places]
        return Samples(
            paths[:, -1],
            paths[each, places],
            torch.tensor([self._timesteps[place] for place in places]),
            target=paths[each, edges],
            target_alphas=torch.tensor([self._alpha(edge) for edge in edges]),
            following=paths[each, following],
            following_timesteps=torch.tensor([self._timesteps[min(p, self._grid - 1)] for p in following]),
        )

    def conditions(self, rows: Sequence[int | None]) -> dict[str, Tensor]:
        if None in rows:
            raise TuningError(
                "the paths are those of their captions, and none is left out",
                where="data",
                hint="pass proportion_empty_prompts=0",
            )
        known = [row // len(self._places) for row in rows if row is not None]
        names = [*self._names, *(["time_ids"] if "text_embeds" in self._names else [])]
        return {name: tensor.float() for name, tensor in self._kept.rows(known, *names).items()}

    def fingerprint(self) -> str:
        return self.contents.fingerprint()

    def check_schedule(self, noise_schedule: NoiseSchedule) -> None:
        """Refuse a noise schedule that is not that of the paths.

        Args:
            noise_schedule: the noise schedule of a run.
        Raises:
            TuningError: the prediction types or the noise levels differ.
        """
        mine = NoiseSchedule.of(self.scheduler)
        if mine.prediction != noise_schedule.prediction:
            raise TuningError(
                f"the paths are of a teacher with {mine.prediction}, the scheduler says {noise_schedule.prediction}",
                where="scheduler",
                hint="pass the scheduler of the pipeline that the paths come from",
            )
        if mine.alphas.shape != noise_schedule.alphas.shape or not torch.allclose(
            mine.alphas, noise_schedule.alphas, rtol=1e-4
        ):
            raise TuningError(
                "the noise schedule is not that of the paths",
                where="scheduler",
                hint="pass the scheduler of the pipeline that the paths come from",
            )

    def _alpha(self, edge: int) -> float:
        """Return the cumulative product of 1 - beta at a point of the grid that the student's own scheduler ends at."""
        after = self._timesteps[edge - self._stride] - len(self._scheduler.alphas_cumprod) * self._stride // self._grid
        last = edge == self._grid or after < 0
        return float(self.scheduler.final_alpha_cumprod if last else self.scheduler.alphas_cumprod[after])

    @torch.no_grad()
    def _generated(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Generate from prompts; return their paths (rows, grid + 1, C, H, W) and conditions."""
        pipe, unet = self._pipe, self._pipe.unet
        prompts = [self._prompts[row] for row in rows]
        known = self._captions(prompts)
        if "text_embeds" in known:
            height, width = (side * pipe.vae_scale_factor for side in self._size)
            known["time_ids"] = time_ids((height, width), (0, 0), (height, width)).repeat(len(rows), 1)
        empty = {name: known[name] for name in known}
        empty |= {name: value.expand(len(rows), *value.shape) for name, value in self._captions.empty.items()}
        draws = [generator(self._seed, "path", as_number(self._keys[row])) for row in rows]
        shape = (unet.config.in_channels, *self._size)
        noise = np.stack([draw.standard_normal(shape, np.float32) for draw in draws])
        point = torch.from_numpy(noise) * self._scheduler.init_noise_sigma
        device, dtype, path = unet.device, unet.dtype, [point]
        for call, timestep in enumerate(self._scheduler.timesteps):

            def predict(conditions: Mapping[str, Tensor], sample: Tensor, timestep: Tensor = timestep) -> Tensor:
                inputs = {name: value.to(device, dtype) for name, value in conditions.items()}
                text = inputs.pop("encoder_hidden_states")
                more = {"added_cond_kwargs": inputs} if inputs else {}
                found: Tensor = unet(sample.to(device, dtype), timestep, text, return_dict=False, **more)[0]
                return found.float().cpu()

            prediction = predict(known, point)
            if self._guidance.acts(call, self._grid):
                unguided = predict(empty, point)
                prediction = unguided + self._guidance.scale * (prediction - unguided)
            point = self._scheduler.step(prediction, timestep, point, return_dict=False)[0]
            path.append(point)
        paths = torch.stack(path, 1)
        for prompt, one in zip(prompts, paths, strict=True):
            if not torch.isfinite(one).all():
                raise TuningError(
                    "the teacher's path is not finite",
                    where=f"prompt {prompt!r}",
                    hint="load the pipeline in bfloat16 or float32",
                )
        return {"path": paths, **{name: value.cpu() for name, value in known.items()}}


def trailing(scheduler: Any, calls: int) -> DDIMScheduler:
    """Return DDIM with trailing timesteps, which ends where a path does, of the schedule of another scheduler.

    Args:
        scheduler: the scheduler of a pipeline.
        calls: the number of calls.
    Raises:
        TuningError: it has no schedule of training, its first timestep has no signal while the noise is predicted, or
            it has fewer timesteps.
    """
    schedule = NoiseSchedule.of(scheduler)
    if scheduler.config.get("use_flow_sigmas"):
        raise TuningError(
            f"{type(scheduler).__name__} with use_flow_sigmas mixes latents and noise otherwise than in training",
            where="pipe.scheduler",
            hint="generate with a scheduler of the same model without use_flow_sigmas",
        )
    if calls > len(schedule):
        raise TuningError(
            f"{calls} calls are more than the {len(schedule)} timesteps of training", where="calls", hint="pass fewer"
        )
    found = DDIMScheduler.from_config(
        scheduler.config, timestep_spacing="trailing", clip_sample=False, thresholding=False
    )
    if schedule.prediction == "epsilon" and float(found.alphas_cumprod[-1]) < 1e-7:
        raise TuningError(
            "the last timestep has no signal, and nothing follows from predicted noise there",
            where="pipe.scheduler",
            hint="leave out rescale_betas_zero_snr, or take a teacher with v_prediction",
        )
    found.set_timesteps(calls)
    return found
