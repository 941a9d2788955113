"""A tiny teacher, a pruned student and random data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

import sdgraph
from sdgraph.passes import PruneBlocks
from sdgraph.tuning import Tensors, TuningReport

from ..models import CROSS, build

Tune = Callable[..., tuple[sdgraph.GraphUNet, TuningReport]]


def tensors(unet: Any) -> dict[str, torch.Tensor]:
    """The tensors of a UNet, as they are now."""
    return {name: value.clone() for name, value in unet.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="package")
def teacher() -> UNet2DConditionModel:
    """A tiny UNet. Leave it as it is."""
    return build("sd15", layers_per_block=2)


@pytest.fixture(scope="package")
def teaching(teacher: UNet2DConditionModel) -> sdgraph.GraphUNet:
    """Its graph. Leave it as it is."""
    return sdgraph.GraphUNet(sdgraph.trace(teacher))


@pytest.fixture(scope="package")
def student(teacher: UNet2DConditionModel) -> sdgraph.GraphUNet:
    """The teacher, pruned. Leave it as it is; `tune` does."""
    return sdgraph.apply(teacher, [PruneBlocks("bk-sdm-base")])


@pytest.fixture(scope="package")
def data() -> Tensors:
    """Ten rows, and the conditions of an empty caption."""
    draw = torch.Generator().manual_seed(0)
    empty = {"encoder_hidden_states": torch.zeros(5, CROSS)}
    captions = torch.randn(10, 5, CROSS, generator=draw)
    return Tensors(torch.randn(10, 4, 8, 8, generator=draw), {"encoder_hidden_states": captions}, empty)


@pytest.fixture
def tune(student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet, data: Tensors, tmp_path: Path) -> Iterator[Tune]:
    """`sdgraph.tune` of the student, with few steps into a new folder; other arguments replace these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = {"train_batch_size": 4, "learning_rate": 2e-3, "report_to": "none"}

    def run(**changed: Any) -> tuple[sdgraph.GraphUNet, TuningReport]:
        fixed: dict[str, Any] = {
            "max_train_steps": 4,
            "output_dir": tmp_path / "run",
            "scheduler": DDPMScheduler(),
            **settings,
        }
        fixed |= {"student": student, "teacher": teaching, "data": data}
        return sdgraph.tune(**{**fixed, **changed})

    yield run
    torch.set_num_threads(threads)
