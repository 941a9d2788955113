"""FSDP: the weights, gradients, moments and averages of a student are sharded over processes.

If accelerate is launched with FSDP, the student is sharded by `torch.distributed.fsdp.fully_shard`, which is FSDP2, on
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
    """Return a context in which accelerate itself does not use FSDP; its value is whether it was launched to.

    Raises:
        TuningError: weights are to be kept in the memory of the CPU.
    """
    launched = os.environ.get(SWITCH, "")
    if launched.lower() not in ("1", "true"):
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
        os.environ[SWITCH] = launched


def shard(model: nn.Module, unet: GraphUNet) -> None:
    """Shard the weights of a model over all processes. A call of the model gathers them while it needs them.

    Large layers are gathered one by one, all others together.

    Args:
        model: the module that runs the student.
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


def gather(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Return full tensors, those that were sharded on the CPU. All processes must call this.

    Args:
        tensors: the tensors by name.
        keep: whether to return them; a process that does not keep them sends its shards, and has one tensor at a time.
    """
    result = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            result[name] = full.cpu() if isinstance(tensor, DTensor) else tensor
    return result


def distribute(tensor: Tensor, like: Any) -> Tensor:
    """Return a full tensor as it is, or the shard of it that this process keeps of a tensor like it.

    Args:
        tensor: the full tensor.
        like: the tensor whose place it takes; a sharded one has the devices and the placements.
    """
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
