"""Weights that are spread over processes: a process keeps a share of all weights, gradients, moments and averages.

Where accelerate is told to use FSDP, the student is spread by `torch.distributed.fsdp.fully_shard`, which is FSDP2, on
GPUs and CPUs alike. accelerate's own FSDP wraps classes of layers, and a traced UNet has one class.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import TuningError
from ..runtime.unet import GraphUNet

SWITCH, OFFLOAD = "ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS"
LARGE = 2**20  # numbers in a layer that is gathered by itself


@contextmanager
def enabled() -> Iterator[bool]:
    """Say whether accelerate was told to use FSDP, and keep it from doing so within this context.

    Raises:
        TuningError: weights are to be kept in the memory of the CPU.
    """
    told = os.environ.get(SWITCH, "")
    if told.lower() not in ("1", "true"):
        yield False
        return
    if os.environ.get(OFFLOAD, "").lower() in ("1", "true"):
        raise TuningError(
            "weights are not kept in the memory of the CPU", where=OFFLOAD, hint="--fsdp_offload_params false"
        )
    os.environ[SWITCH] = "false"
    try:
        yield True
    finally:
        os.environ[SWITCH] = told


def shard(model: nn.Module, unet: GraphUNet) -> None:
    """Spread the weights of a model over all processes. A call of the model gathers them while it needs them.

    Large layers are gathered one by one, all others together.

    Args:
        model: runs the student.
        unet: the student, whose weights the model reads.
    """
    # It is about code that works in place, of which a graph has none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    model.unet = unet  # or a weight that the code reads by itself would stay whole here
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        alone = not list(module.children()) and all(owners[parameter] == 1 for parameter in own)
        if alone and sum(parameter.numel() for parameter in own) >= LARGE:
            fully_shard(module)
    fully_shard(model)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor as it is, or the whole one of which this process has a share. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Return tensors whole, those that were spread on the CPU. All processes must call this.

    Args:
        tensors: the tensors by name.
        keep: return them; a process that does not keep them takes part, and has one of them at a time.
    """
    result = {}
    for name, tensor in tensors.items():
        complete = full_tensor(tensor)
        if keep:
            result[name] = complete.cpu() if isinstance(tensor, DTensor) else tensor
    return result


def distribute(tensor: Tensor, like: Any) -> Tensor:
    """Return a whole tensor as it is, or the share of it that this process keeps of a tensor like it."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
