"""Learned gates: how long each region of a UNet stays open while a penalty closes all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SpecError
from ..plan_search.evaluator import Measurements
from ..plan_search.final_latents import Array
from ..progress import Bar
from ..runtime.apply import apply
from ..runtime.feature_extractor import FeatureExtractor
from ..runtime.unet import GraphUNet

RATE = 0.05  # the most that a gate moves at a step
PENALTIES = (1e-4, 4.0)  # at the first and the last step, relative to the largest error of a single removal
KEPT = 25  # steps between two that are kept


class GateTraining:
    """The training of one gate for each region of a UNet, all at once, while its weights are frozen.

    A gate in [0, 1] mixes what its region returns with the value that replaces it when the region is removed. Without
    labels, the gates minimise the error of the output, relative to that of the whole UNet, plus a penalty times their
    sum. The error of a gate g is about (1 - g)² times that of the removal, so that it closes when the penalty reaches
    twice the error of the removal beside all that is closed already. The penalty therefore rises, by the same factor at
    every step, and what counts is how long a gate stays open.

    Args:
        whole: the UNet, which stays as it is.
        paths: the module paths of the regions, of which none lies in another.
        calls: the flat inputs of the calls, which the steps take in turns.
        weights: the weights of the calls.
        largest: the largest error of a single removal.
        steps: the number of steps.
    """

    def __init__(
        self,
        whole: GraphUNet,
        paths: Sequence[str],
        calls: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        largest: float,
        steps: int,
    ) -> None:
        self.paths, self.steps = tuple(paths), steps
        frozen = apply(whole, (), verify=False).requires_grad_(False)
        given = frozenset(name.name for name in whole.graph.inputs if name.name in calls[0])
        self._unet = FeatureExtractor(frozen, (), given, gradient_checkpointing=True, gated=self.paths)
        self._calls, self._weights = calls, np.array(weights) / np.mean(weights)
        self._scale = largest or 1.0
        with torch.no_grad():
            self._outputs = [frozen.run(flat) for flat in calls]

    def penalty(self, step: int) -> float:
        """Return the factor of the sum of the gates at a step, relative to the largest error of a removal.

        Args:
            step: the number of the step, from 0.
        """
        first, last = PENALTIES
        return float(first * (last / first) ** (step / max(1, self.steps - 1)))

    def gradient(self, gates: Tensor, step: int) -> Tensor:
        """Return the gradient of the objective of a step, (regions,).

        Args:
            gates: the gates, (regions,).
            step: the number of the step, from 0.
        Raises:
            SpecError: it is not finite.
        """
        turn = step % len(self._calls)
        output = self._outputs[turn]
        open_gates = gates.to(output.device, output.dtype).requires_grad_(True)
        found = self._unet(dict(self._calls[turn]), open_gates)[0].float()
        off, size = ((x.square().flatten(1).mean(1)) for x in (found - output.float(), output.float()))
        error = (off / size).mean() * self._weights[turn] / self._scale
        # Times the number of values, or the gradients of half precision would vanish.
        (slope,) = torch.autograd.grad(error * output.numel(), open_gates)
        gradient = slope.to(gates) / output.numel() + self.penalty(step)
        if not torch.isfinite(gradient).all():
            raise SpecError(
                f"the gradient of the gates is not finite at step {step}", where="gates", hint="use float32 or bfloat16"
            )
        return gradient

    def run(self, known: Measurements, bar: Bar) -> Array:
        """Return the mean of each gate over all steps, from 1 for a region that is needed to 0, (regions,).

        Args:
            known: what was measured before; a training that was stopped goes on from there.
            bar: the bar, which counts steps.
        """
        state = np.concatenate([np.ones(len(self.paths)), np.zeros(3 * len(self.paths))])
        for begin in range(0, self.steps, KEPT):
            steps = range(begin, min(begin + KEPT, self.steps))
            subject = f"{' '.join(self.paths)} {self.steps} {steps.stop}"
            state = known.numbers("gates", subject, lambda state=state, steps=steps: self._advanced(state, steps))  # type: ignore[misc]
            bar.update(len(steps))
        mean: Array = state[-len(self.paths) :] / self.steps
        return mean

    def _advanced(self, state: Array, steps: range) -> Array:
        """Return the state after steps: the gates, Adam's two moments of their gradients, and the sum of the gates."""
        gates, first, second, total = torch.from_numpy(state.reshape(4, -1).copy())
        optimizer = torch.optim.Adam([gates], RATE, betas=(0.9, 0.99))
        moments: dict[str, Any] = {"step": torch.tensor(float(steps.start)), "exp_avg": first, "exp_avg_sq": second}
        optimizer.state[gates] = moments
        for step in steps:
            gates.grad = self.gradient(gates, step)
            optimizer.step()
            gates.clamp_(0, 1)
            total += gates
        return torch.cat([gates, first, second, total]).numpy()
