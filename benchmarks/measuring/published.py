"""Published methods of other authors, as schedules, forecasts, passes, or modules around a UNet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdgraph
from examples.scenes.pipeline import GUIDANCE
from sdgraph.forecasts import Forecast, Polynomial
from sdgraph.passes import InheritFeatures
from sdgraph.passes.gri_attention import self_attentions
from sdgraph.schedules import SamplingRun, Schedule


@dataclass(frozen=True)
class GrowingWindow(Schedule):
    """Spectrum's computed calls: the first ones, and then one after each of growing gaps.

    The defaults compute 14 of 50 calls and `growth=3.0` 10 of 50, as published.

    Args:
        warm_up: the number of first calls that are all computed.
        window: the first gap, in calls; gaps are rounded down.
        growth: the growth of the gap at every computed call, in calls.
    """

    warm_up: int = 5
    window: float = 2.0
    growth: float = 0.75

    def refreshes(self, call: int, timestep: float, run: SamplingRun) -> bool:
        last, window = self.warm_up - 1, self.window
        while last < call:
            last, window = last + int(window), window + self.growth
        return call < self.warm_up or call == last


@dataclass(frozen=True)
class Chebyshev(Forecast):
    """Spectrum's forecast: the mean of a line and a ridge regression on Chebyshev polynomials over all computed calls.

    Args:
        degree: the degree of the polynomials.
        ridge: the penalty of their coefficients.
        line: the share of the line through the last two computed values.
        calls: the number of calls that make up the domain of the polynomials; None takes that of the run.
    """

    degree: int = 4
    ridge: float = 0.1
    line: float = 0.5
    calls: int | None = 50

    @property
    def memory(self) -> int:
        return 100

    def weights(self, known: Any, call: int, run: SamplingRun) -> tuple[float, ...]:
        if len(known) == 1:
            return (1.0,)
        scale = 2 / (self.calls or run.calls or 50)
        basis = np.polynomial.chebyshev.chebvander(np.array([*known, call]) * scale - 1, self.degree)
        rows, wanted = basis[:-1], basis[-1]
        regression = wanted @ np.linalg.solve(rows.T @ rows + self.ridge * np.eye(self.degree + 1), rows.T)
        line = np.zeros(len(known))
        line[-2:] = Polynomial(1).weights(known[-2:], call, run)
        return tuple(float(weight) for weight in self.line * line + (1 - self.line) * regression)


def spectrum(calls: int | None = 50) -> InheritFeatures:
    """Return Spectrum: all blocks are reused at once, and a forecast call computes the output layers only.

    Args:
        calls: the domain of its polynomials, the published constant; None mends it for runs of other lengths.
    Source:
        "Spectrum", 2026, and its code: schedule, degree, ridge, share of the line, and the site of SDXL.
    """
    return InheritFeatures("up_blocks.-1", GrowingWindow(), part="value", forecast=Chebyshev(calls=calls))


class Sada(nn.Module):
    """SADA's criterion around a UNet: whole calls are skipped where the slope of the latents bends the right method.

    After every call a third-order step along the slope f of the probability flow predicts the next latents. If the
    error of that prediction and the second difference of f have a product of negative mean over the batch, the next
    call is skipped: the last noise, at the predicted latents, gives the clean image that the solver goes on with.

    The published constants are kept: calls before number 10 are computed, and at most four in a row are skipped. From
    call 24 on the published loop computes every fourth call and interpolates the others, and in computed calls it takes
    tokens from a cache; neither is here, and runs of more than 25 calls are refused. Steps have their lengths in
    training timesteps.

    Args:
        unet: the UNet, whose predictions are velocities.
        pipe: the pipeline, whose scheduler has the timesteps and noise levels.
    Raises:
        ValueError: at a call of a run of more than 25 calls.
    Source:
        Jiang et al., "SADA: Stability-guided Adaptive Diffusion Acceleration", 2025, and its code.
    """

    FIRST, END, IN_A_ROW = 10, 24, 4

    def __init__(self, unet: Any, pipe: Any) -> None:
        super().__init__()
        self.unet, self.pipe = unet, pipe
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device
        self.call = self.in_a_row = 0
        self.slopes: deque[Tensor] = deque(maxlen=3)
        self.noise = self.expected = torch.empty(0)

    def forward(self, sample: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        timesteps = self.pipe.scheduler.timesteps
        if timestep == timesteps[0]:
            self.call = self.in_a_row = 0
            self.slopes.clear()
        if len(timesteps) > self.END + 1:
            raise ValueError(f"SADA's rule for a run of {len(timesteps)} calls is not here; at most {self.END + 1}")
        alpha, sigma, beta = self._levels(timestep)
        latents = sample.chunk(2)[0]
        skips = self._skips(latents)
        if skips:
            clean = (self.expected - sigma * self.noise) / alpha
            velocity = (alpha * latents - clean) / sigma
            output = torch.cat([velocity, velocity])
        else:
            output = self.unet(sample, timestep, *args, **kwargs)[0]
            without, with_text = output.chunk(2)
            velocity = without + GUIDANCE * (with_text - without)
            self.noise = alpha * velocity + sigma * latents
        self.in_a_row = self.in_a_row + 1 if skips else 0
        self.slopes.append(0.5 * beta * (self.noise / sigma - latents))
        self.call += 1
        if self.call < len(timesteps) and len(self.slopes) == 3:
            oldest, older, newest = self.slopes
            length = float(timestep - timesteps[self.call])
            self.expected = latents - length * (0.625 * newest + 0.75 * older - 0.375 * oldest)
        return (output,)

    def _skips(self, latents: Tensor) -> bool:
        """Whether the call that is due at these latents is skipped."""
        if not self.FIRST <= self.call < self.END or self.in_a_row == self.IN_A_ROW:
            return False
        oldest, older, newest = self.slopes
        return bool(((latents - self.expected) * (newest - 2 * older + oldest)).mean() <= 0)

    def _levels(self, timestep: Tensor) -> tuple[float, float, float]:
        """Return alpha and sigma of a timestep, and the noise that a training step adds to it."""
        at = float(timestep)
        scheduler = self.pipe.scheduler
        betas, products = scheduler.betas.numpy(), scheduler.alphas_cumprod.numpy()
        square, beta = (float(np.interp(at, np.arange(len(betas)), values)) for values in (products, betas))
        return square**0.5, (1 - square) ** 0.5, beta


@dataclass(frozen=True)
class PooledKeys(sdgraph.Pass):
    """Replace the keys and values of self-attentions by their means over cells of the map.

    Args:
        pool: the side of a cell.
        levels: the levels of the UNet to change, 0 for the resolution of the latents.
    Source:
        Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images", 2024.
    """

    pool: int = 2
    levels: tuple[int, ...] = (0,)

    def run(self, graph: sdgraph.Graph) -> None:
        def pooled(x: Tensor, height: Any, width: Any) -> Tensor:
            B, heads, _, d = x.shape
            x = x.transpose(2, 3).reshape(B * heads, d, height, width)
            return F.avg_pool2d(x, self.pool).reshape(B, heads, d, -1).transpose(2, 3)

        def code(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
            height, width = tokens.shape[2], tokens.shape[3]
            return F.scaled_dot_product_attention(q, pooled(k, height, width), pooled(v, height, width))

        for node, tokens, level in self_attentions(graph):
            if level in self.levels:
                graph.replace(node, code, *node.args[:3], tokens)
