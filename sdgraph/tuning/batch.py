"""The batch of a step: which rows, which noise, which timesteps and captions, all as functions of the step."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import TuningError
from ..options import Count, Index, NotNegative, Share, check
from .noise_schedule import NoiseSchedule
from .random_numbers import generator
from .settings import Settings
from .sources import MoreCaptions, Samples, Source

PATH = ("target", "target_alphas", "following", "following_timesteps")  # what a row of a path has beside its point
STEEPNESS = 5.0  # of random conditioning: p = 1 at the last timestep, 0.08 in the middle


@dataclass(frozen=True)
class Batch:
    """The inputs of a training step.

    Args:
        clean: clean latents, (B, C, H, W).
        noise: the noise that was added to them, (B, C, H, W); None on a teacher's trajectory.
        noisy: noised latents, (B, C, H, W).
        timesteps: the timesteps, (B,), whole numbers.
        conditions: the other inputs of the UNet, by name.
        own: (B,), whether the caption of a row is that of its image, or left out; None if all are.
        pairs: whether two rows each are the same but for the caption, which every second row leaves out.
        target: the latents (B, C, H, W) that a call of the student should arrive at; None if the data have no paths.
        target_alphas: the cumulative products of 1 - beta at `target`, (B,).
        following: the next recorded point of the path, (B, C, H, W).
        following_timesteps: the timesteps of `following`, (B,).
    Example:
        `unet(**batch.inputs)`
    """

    clean: Tensor
    noise: Tensor | None
    noisy: Tensor
    timesteps: Tensor
    conditions: dict[str, Tensor]
    own: Tensor | None = None
    pairs: bool = False
    target: Tensor | None = None
    target_alphas: Tensor | None = None
    following: Tensor | None = None
    following_timesteps: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The inputs of the UNet, by name."""
        return {"sample": self.noisy, "timestep": self.timesteps, **self.conditions}

    @property
    def following_inputs(self) -> dict[str, Tensor]:
        """The inputs of the UNet at the next point of a path, by name."""
        assert self.following is not None
        assert self.following_timesteps is not None
        return {"sample": self.following, "timestep": self.following_timesteps, **self.conditions}

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device.

        Args:
            device: the device.
        """
        moved = {name: getattr(self, name).to(device) for name in ("clean", "noisy", "timesteps")}
        for name in ("noise", "own", *PATH):
            moved[name] = None if getattr(self, name) is None else getattr(self, name).to(device)
        return replace(self, **moved, conditions={n: c.to(device) for n, c in self.conditions.items()})


@dataclass(frozen=True)
class Batches:
    """The batches of a training run. Each follows from the seed and the number of its step.

    Args:
        source: the data.
        noise_schedule: the noise schedule.
        size: the number of samples per step, of all processes and accumulated batches together.
        seed: the seed of the run.
        proportion_empty_prompts: the share of rows whose caption is left out, for classifier-free guidance.
        random_conditioning: give noisy rows another caption of the source, with a probability that rises exponentially
            with the timestep. The teacher's answer then teaches captions of which there are no images, those of
            `MoreCaptions` among them, and `Denoising` leaves these rows out.
        timestep_intervals: every batch draws its timesteps from one of so many equal parts of the schedule, and as many
            batches in a row draw from all of them. Experts that are routed by the timestep then learn in turn.
        guidance_pairs: every noisy latent fills two rows, the second without its caption, as a pipeline calls the UNet
            for classifier-free guidance.
        noise_offset: the factor of a random number per sample and channel that is added to the noise.
    Raises:
        TuningError: there are captions without images, and no random conditioning.
    Example:
        `Batches(data, NoiseSchedule.of(pipe.scheduler), size=16, seed=0).batch(step, range(16))`
    Source:
        Kim et al., "Random Conditioning with Distillation for Data-Efficient Diffusion Model Compression", 2025; one
        interval per batch: Fang et al., "Remix-DiT: Mixing Diffusion Transformers for Multi-Expert Denoising", 2024.
    """

    source: Source
    noise_schedule: NoiseSchedule
    size: Count
    seed: Index = 0
    proportion_empty_prompts: Share = 0.0
    random_conditioning: bool = False
    timestep_intervals: Count = 1
    guidance_pairs: bool = False
    noise_offset: NotNegative = 0.0

    @classmethod
    def of(cls, source: Source, noise_schedule: NoiseSchedule, settings: Settings, processes: int) -> Batches:
        """Return the batches of a run.

        Args:
            source: the data.
            noise_schedule: the noise schedule.
            settings: the settings of the run.
            processes: the number of processes that share a step.
        """
        return cls(
            source,
            noise_schedule,
            settings.train_batch_size * settings.gradient_accumulation_steps * processes,
            settings.seed,
            settings.proportion_empty_prompts or 0.0,
            settings.random_conditioning,
            settings.timestep_intervals,
            settings.guidance_pairs,
            settings.noise_offset,
        )

    def __post_init__(self) -> None:
        check(self, TuningError)
        if not len(self.source):
            raise _unusable("the data have no rows", "pass at least one")
        if isinstance(self.source, MoreCaptions) and not self.random_conditioning:
            raise TuningError(
                "captions without images are read with random conditioning only",
                where="random_conditioning",
                hint="pass random_conditioning=True, or the source without more captions",
            )

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """Return rows of the batch of a step, on the CPU.

        Args:
            step: the number of the step, from 0.
            rows: numbers below `size`.
        Raises:
            TuningError: latents are not finite, or are a trajectory's own, which no noise is added to, and the noise
                has an offset.
        """
        numbers = [row // self._copies for row in rows]
        indices = [self._index(step * self.latents + number) for number in numbers]
        draws = [generator(self.seed, "row", step, number) for number in numbers]
        samples = self.source.samples(indices, draws)
        _check_samples(samples, len(rows), len(self.noise_schedule))
        clean = samples.latents.float()
        if not torch.isfinite(clean).all():
            raise TuningError(
                f"latents of the rows {indices} have values that are not finite",
                where="data",
                hint="leave them out, or encode them in float32",
            )
        noise, noisy, timesteps = None, samples.noisy, samples.timesteps
        if noisy is None or timesteps is None:
            timesteps = self._timesteps(step)[numbers]
            shape = clean.shape[1:]
            drawn = [generator(self.seed, "noise", step, number) for number in numbers]
            noise = torch.from_numpy(np.stack([draw.standard_normal(shape, np.float32) for draw in drawn]))
            if self.noise_offset:
                drawn = [generator(self.seed, "offset", step, number) for number in numbers]
                offset = np.stack([draw.standard_normal((shape[0], 1, 1), np.float32) for draw in drawn])
                noise = noise + self.noise_offset * torch.from_numpy(offset)
            noisy = self.noise_schedule.noised(clean, noise, timesteps)
        elif self.noise_offset:
            raise TuningError(
                "the data are a teacher's own trajectories, where no noise is added that could have an offset",
                where="noise_offset",
                hint="leave it out",
            )
        captions = [
            None if row % self._copies else self._caption(index, int(t), generator(self.seed, "caption", step, number))
            for row, number, index, t in zip(rows, numbers, indices, timesteps, strict=True)
        ]
        own = torch.tensor([caption in (None, index) for caption, index in zip(captions, indices, strict=True)])
        conditions = {**self.source.conditions(captions), **samples.conditions}
        _check_conditions(conditions, len(rows))
        conditions = {name: c.float() if c.is_floating_point() else c for name, c in conditions.items()}
        noisy = (
            noisy.float().contiguous()
        )  # or the layout in which a VAE encoded would decide which kernels a UNet runs
        of_path = {name: getattr(samples, name) for name in PATH}
        return Batch(clean, noise, noisy, timesteps, conditions, own, self.guidance_pairs, **of_path)

    @property
    def _copies(self) -> int:
        """The number of rows that a noisy latent fills."""
        return 2 if self.guidance_pairs else 1

    @property
    def latents(self) -> int:
        """The number of noisy latents per step, which is that of the rows of the source that it reads."""
        return self.size // self._copies

    def _index(self, count: int) -> int:
        """Return the row of the data that is read as the given one since the beginning. Every epoch has its order."""
        epoch, position = divmod(count, len(self.source))
        return int(_order(self.seed, epoch, len(self.source))[position])

    def _timesteps(self, step: int) -> Tensor:
        """Draw a timestep from each of as many equal parts of the interval, which varies less than drawing from all."""
        parts = generator(self.seed, "parts", step).permutation(self.latents)
        inside = generator(self.seed, "timestep", step).random(self.latents)
        turn, place = divmod(step, self.timestep_intervals)
        interval = generator(self.seed, "interval", turn).permutation(self.timestep_intervals)[place]
        drawn = (interval + (parts + inside) / self.latents) / self.timestep_intervals * len(self.noise_schedule)
        return torch.from_numpy(drawn.astype(np.int64))

    def _caption(self, index: int, timestep: int, draw: np.random.Generator) -> int | None:
        captions = self.source.captions if isinstance(self.source, MoreCaptions) else len(self.source)
        empty, swapped, other = draw.random(), draw.random(), int(draw.integers(captions))
        if empty < self.proportion_empty_prompts:
            return None
        probability = math.expm1(STEEPNESS * timestep / (len(self.noise_schedule) - 1)) / math.expm1(STEEPNESS)
        return other if self.random_conditioning and swapped < probability else index


def _check_samples(samples: Samples, rows: int, timesteps: int) -> None:
    """Refuse what a source of others returns where PyTorch would compute something else from it."""
    if not isinstance(samples, Samples):
        raise _unusable(f"samples() returns a {type(samples).__name__}", "return sdgraph.tuning.Samples")
    own = {name: getattr(samples, name) for name in ("noisy", "timesteps")}
    own |= {name: getattr(samples, name) for name in PATH}
    given = {name: tensor for name, tensor in own.items() if tensor is not None}
    for name, tensor in {"latents": samples.latents, **given}.items():
        if not isinstance(tensor, Tensor) or tensor.ndim == 0 or len(tensor) != rows:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise _unusable(f"{name} of {rows} rows are {shape}", f"return as many rows as were asked for, {rows}")
    if samples.noisy is not None and samples.noisy.shape != samples.latents.shape:
        raise _unusable(
            f"noisy latents have shape {tuple(samples.noisy.shape)}, and clean ones {tuple(samples.latents.shape)}",
            "return both in one shape",
        )
    if samples.noisy is not None and not torch.isfinite(samples.noisy).all():
        raise _unusable("noisy latents have values that are not finite", "leave them out")
    if any(tensor is not None and not torch.isfinite(tensor).all() for tensor in (samples.target, samples.following)):
        raise _unusable("points of a path have values that are not finite", "leave them out")
    if samples.timesteps is not None and not ((samples.timesteps >= 0) & (samples.timesteps < timesteps)).all():
        raise _unusable(f"there are timesteps beyond 0 to {timesteps - 1}", "return those of the noise schedule")


def _check_conditions(conditions: Mapping[str, Tensor], rows: int) -> None:
    for name, tensor in conditions.items():
        if name in ("sample", "timestep"):
            raise _unusable(f"there is a condition {name!r}, which is no condition", "leave it out")
        if not isinstance(tensor, Tensor) or tensor.ndim == 0 or len(tensor) != rows:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise _unusable(f"{name} of {rows} rows are {shape}", f"return as many rows as were asked for, {rows}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise _unusable(f"{name} has values that are not finite", "leave these rows out, or encode in float32")


def _unusable(what: str, hint: str) -> TuningError:
    return TuningError(what, where="data", hint=hint)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return generator(seed, "order", epoch).permutation(count)
