"""The memory by which a tracker recognises the calls of a generation: its conditioning, and its latents.

Every deterministic solver computes its next latents as a linear combination of earlier latents and predictions, and
guidance is a linear combination of the predictions for one sample. So latents that lie outside of what a generation has
seen belong to another one, or a random number came between, of which only the caller knows.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch

ORDER = 4  # steps that multistep solvers look back


class ConditioningSnapshot:
    """A conditioning tensor as it was when a generation began.

    A tensor with the same contents is the same, if it was made anew. PyTorch counts edits of a tensor, but neither
    those of inference tensors nor those through NumPy or `.data`. So the contents of the very same tensor are compared
    too, where that does not make a device wait: it would at an attached pipeline on an accelerator.
    """

    def __init__(self, tensor: torch.Tensor, waits: bool) -> None:
        self._compared = waits or tensor.device.type == "cpu" or tensor.is_inference()
        self._contents = tensor.detach().clone()
        self.follow(tensor)

    def follow(self, tensor: torch.Tensor) -> None:
        """Note the tensor that has the contents now.

        Args:
            tensor: the conditioning tensor of the call under way.
        """
        self._ref, self._version = weakref.ref(tensor), _version(tensor)

    @property
    def exists(self) -> bool:
        """Whether the tensor may be passed to another call."""
        return self._ref() is not None

    def is_very(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is this very object.

        Args:
            tensor: the conditioning tensor of a call.
        """
        return self._ref() is tensor

    def still_is(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is the one of the generation, unchanged, or has its contents.

        Args:
            tensor: a tensor of the same shape and dtype.
        """
        untouched = self._ref() is tensor and self._version == _version(tensor)
        return (untouched and not self._compared) or torch.equal(self._contents, tensor)


class LatentHistory:
    """The last latents and predictions of one generation.

    Latents are the first channels of a sample; what is concatenated to them (masks, images) is the same at all calls.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[torch.Tensor, ...]] = deque(maxlen=ORDER)

    def add(self, sample: torch.Tensor, prediction: torch.Tensor) -> None:
        """Note a call, with copies: callers edit their tensors in place.

        Args:
            sample: the latents of the call, (B, C, H, W).
            prediction: the prediction of the call, (B, C, H, W) or with variances behind the noise.
        """
        channels = min(sample.shape[1], prediction.shape[1])  # a prediction may hold variances behind the noise
        self._seen.append(tuple(tensor[:, :channels].detach().clone() for tensor in (sample, prediction)))

    def repeats(self, sample: torch.Tensor) -> bool:
        """Whether the last call had these latents.

        Args:
            sample: the latents, (B, C, H, W).
        """
        last = self._seen[-1][0]
        return torch.equal(last, sample[:, : last.shape[1]])

    def leads_to(self, sample: torch.Tensor) -> bool:
        """Whether the latents of a call, of the same shape as before, are a linear combination of what was seen.

        Decided for every sample of the batch, to the rounding of its dtype. The predictions for one sample may be
        spread over two or three parts of the batch, as guidance has them.

        Args:
            sample: the latents of the call, (B, C, H, W).
        """
        latents = sample[:, : self._seen[0][1].shape[1]]
        known = []
        for before, prediction in self._seen:
            known += [before, prediction]
            for parts in (2, 3):
                if len(prediction) % parts == 0:
                    part = len(prediction) // parts
                    known += [prediction.roll(part * i, 0) for i in range(1, parts)]
        double = torch.float32 if sample.device.type == "mps" else torch.float64
        rows = torch.stack([latents, *known], 1).flatten(2).to(double)  # samples x vectors x numbers
        if rows.shape[2] <= 2 * rows.shape[1]:
            return False  # too few numbers: anything would be a combination of that many others
        rows = rows / rows.norm(dim=2, keepdim=True).clamp_min(torch.finfo(double).tiny)
        target, basis = rows[:, 0, :, None], rows[:, 1:]
        weights = torch.linalg.pinv(basis @ basis.mT, rtol=1e-10, hermitian=True) @ (basis @ target)
        unexplained = (target - basis.mT @ weights).square().sum((1, 2)).max()
        rounding = max(torch.finfo(tensor.dtype).eps for tensor in (sample, self._seen[-1][1]))
        return float(unexplained) <= max(1e-4, (8 * rounding) ** 2)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
