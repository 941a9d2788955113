"""`Importance`: what each slice of a UNet's widths is worth."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from ..atomic import written
from ..errors import EditError, SavedError, SpecError
from ..graph import Graph
from ..options import Count, Misfit, NotNegative, Seed, fitted
from ..plan_search.final_latents import check_request, final_latents
from ..runtime.apply import apply
from ..runtime.recorded_calls import CallRecorder, spread, timestep_of
from ..runtime.unet import GraphUNet
from ..spec import Spec
from ..text import json_object
from ..views.widths import Widths

Scores = Mapping[str, tuple[NotNegative, ...]]
FORMAT = 1


@dataclass(frozen=True)
class Importance(Spec):
    """The importance of the slices of a UNet's widths. It prints as its criterion, without the numbers.

    Args:
        criterion: the criterion, as text.
        scores: the importance of every slice, by the path of the width.
    """

    has_text: ClassVar[bool] = False
    criterion: str = ""
    scores: Scores = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return f"Importance({self.criterion!r})"

    @classmethod
    def magnitude(cls, graph: Graph) -> Self:
        """Measure the squared L2 norms of the weights of slices.

        Every norm is divided by the sum of those that are not smaller in the same width, which makes the norms of
        different layers comparable.

        Args:
            graph: the graph.
        Returns:
            The importance.
        Example:
            `Importance.magnitude(sdgraph.trace(unet))`
        Source:
            Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning" (LAMP), 2021.
        """
        widths = graph.widths()
        return cls("magnitude", {path: tuple(_relative(widths, path)) for path in widths})

    @classmethod
    def taylor(
        cls, pipe: Any, prompts: Sequence[str], *, calls: Count = 8, until: NotNegative = 1000.0, seed: Seed = 0,
        **call: Any,
    ) -> Self:  # fmt: skip
        """Measure how much the prediction changes without a slice, to first order, at calls of real generations.

        The score of a slice is the sum of |w·∂L/∂w| over all of its weights and over the calls. L is the product of the
        prediction with random signs: its squared derivative is on average that of all values of the prediction. Scores
        of different layers are compared as they are.

        Args:
            pipe: a diffusers pipeline; its UNet is diffusers' or a `GraphUNet`.
            prompts: the prompts to generate with.
            calls: the number of calls that are measured, spread evenly.
            until: the largest timestep of a call that is measured, because gradients at noisy timesteps are noisy.
            seed: the seed of the first image's latents; the others count up from it.
            call: further arguments of the pipeline, such as `num_inference_steps=20`.
        Returns:
            The importance.
        Raises:
            SourceError: the pipeline has no UNet, or its solver adds random numbers.
            SpecError: there are no prompts, or no call has such a timestep.
        Example:
            `Importance.taylor(pipe, prompts, until=500, num_inference_steps=20)`
        Source:
            Molchanov et al., "Importance estimation for neural network pruning", 2019; Fang et al., "Structural pruning
            for diffusion models" (Diff-Pruning), 2023, which leaves noisy timesteps out.
        """
        check_request("Importance.taylor", pipe, prompts, call)
        recorder = CallRecorder(apply(pipe.unet, ()).graph)
        final_latents(pipe, recorder, prompts, seed, call)
        late = [flat for flat in recorder.calls if timestep_of(flat) <= until]
        if not late:
            hint = "raise it, or generate in more steps"
            raise SpecError(f"no call of the generation has a timestep of {until:g} or less", where="until", hint=hint)
        unet = GraphUNet(recorder.graph.copy()).requires_grad_(True)
        widths = unet.graph.widths()
        scores = {path: [0.0] * width.slices for path, width in widths.items()}
        draw = torch.Generator().manual_seed(seed)
        for flat in spread(late, calls):
            with torch.enable_grad():
                output = unet.run(flat)
                signs = torch.randint(0, 2, output.shape, generator=draw).to(output) * 2 - 1
                parameters = list(unet.parameters())
                found = torch.autograd.grad(
                    (output * signs).sum() / output.numel() ** 0.5, parameters, allow_unused=True
                )
            gradients = {id(parameter): gradient for parameter, gradient in zip(parameters, found, strict=True)}
            for path in widths:
                parts = widths.parts(path, functools.partial(_change, gradients))
                total: Any = sum(part.detach().double().sum(1) for part in parts)
                scores[path] = [before + new for before, new in zip(scores[path], total.tolist(), strict=True)]
        return cls(
            f"first-order change at {min(calls, len(late))} calls of {len(prompts)} prompts",
            {path: tuple(each) for path, each in scores.items()},
        )

    def of(self, path: str, slices: int) -> tuple[float, ...]:
        """Return the importance of the slices of a width.

        Args:
            path: the path of the width.
            slices: the number of its slices.
        Raises:
            EditError: the width was not measured, or had another number of slices.
        """
        found = self.scores.get(path, ())
        if len(found) != slices:
            raise EditError(
                f"{self} has {len(found) or 'no'} scores of {path}, which has {slices} slices",
                where=path,
                hint="pass Importance.taylor(pipe, prompts) of this UNet, or Importance.load(path)",
            )
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the importance to a JSON file.

        Args:
            path: the file.
        """
        plain = {"format": FORMAT, "criterion": self.criterion, "scores": self.scores}
        with written(path) as file:
            file.write_text(json.dumps(plain) + "\n")

    @classmethod
    def load(cls, path: str) -> Self:
        """Read a file that `save` wrote.

        Args:
            path: the file.
        Returns:
            The importance.
        Raises:
            SavedError: the file is missing or damaged.
        """
        hint = "pass a file that Importance.save wrote"
        plain = json_object(Path(path), SavedError, hint=hint, format=FORMAT)
        try:
            return cls(fitted(plain["criterion"], str), fitted(plain["scores"], Scores))
        except (KeyError, Misfit) as error:
            raise SavedError(f"this is no importance: {error}", where=path, hint=hint) from error


def _change(gradients: Mapping[int, torch.Tensor | None], parameter: torch.Tensor) -> torch.Tensor:
    """Return the first-order change of each element of a parameter, zero where the output does not depend on it."""
    gradient = gradients.get(id(parameter))
    return torch.zeros_like(parameter) if gradient is None else (parameter * gradient).abs()


def _relative(widths: Widths, path: str) -> list[float]:
    """Return the squared L2 norms of the slices of a width, each relative to those that are not smaller."""
    with torch.no_grad():
        squares: Any = sum(part.double().square().sum(1) for part in widths.parts(path))
    order = squares.argsort()
    rest = squares[order].flip(0).cumsum(0).flip(0)
    relative = (squares[order] / rest.clamp_min(math.ulp(0.0))).nan_to_num()
    return torch.empty_like(squares).index_copy(0, order, relative).tolist()
