"""Conditions of a pass on the sizes of a call: calls that have others are refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph import Chain, Contract, Graph, GraphUNet, Pass
from sdgraph.errors import (
    CallError,
    EditError,
    ShapeError,
    SpecError,
)
from sdgraph.exporters import onnx, ort

from ..models import ONE_LEVEL, answer, build, call_of
from .sample_passes import Scale


@dataclass(frozen=True)
class Squares(Pass):
    """Cuts the map into squares of 2 by 2 and joins them again, which only even sizes allow."""

    contract: ClassVar[Contract] = Contract.EXACT
    required: bool = True

    def run(self, graph: Graph) -> None:
        if self.required:
            graph.require("H % 2 == 0", "squares are of 2 by 2")
            graph.require("W % 2 == 0", "squares are of 2 by 2")
        graph.insert_after(graph.region("conv_in").output, self.squares)

    def squares(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        squares = x.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 1, 2, 4, 3, 5)
        return squares.permute(0, 1, 2, 4, 3, 5).reshape(B, C, H, W)


@dataclass(frozen=True)
class Requires(Pass):
    conditions: tuple[str, ...] = ()

    def run(self, graph: Graph) -> None:
        for condition in self.conditions:
            graph.require(condition)
        Scale().run(graph)


@pytest.fixture(scope="module")
def squares(unet: UNet2DConditionModel) -> GraphUNet:
    return sdgraph.apply(unet, [Squares()])


@pytest.mark.slow
def test_a_pass_requires_sizes_and_calls_that_have_others_are_refused(
    unet: UNet2DConditionModel, graph: Graph, squares: GraphUNet, tmp_path: Path
) -> None:
    with pytest.raises(ShapeError, match="cannot take"):
        sdgraph.apply(graph, [Squares(required=False)])
    squares.save_pretrained(tmp_path / "unet")
    loaded = GraphUNet.from_pretrained(tmp_path / "unet")
    chained = sdgraph.apply(copy.deepcopy(loaded), [Chain((Scale(2.0), Scale(0.5)))])
    for made in (squares, loaded, chained):
        for sizes in ({}, {"H": 10, "W": 6, "B": 3}):
            call = call_of(unet, **sizes)
            assert torch.equal(answer(made, call), answer(unet, call))
        for sizes in ({"H": 9}, {"W": 7}):
            with pytest.raises(CallError, match=r"where:.*Squares\(\): squares are of 2 by 2"):
                made(**call_of(unet, **sizes))
    assert "H/2" in squares.graph.text(within="conv_in")
    assert graph.guards == sdgraph.trace(unet).guards  # the graph that came in requires nothing
    assert graph.dims.symbols != squares.graph.dims.symbols


@pytest.mark.law("The sizes that a pass requires are required of calls of the exported UNet as well.")
@pytest.mark.slow
def test_what_a_pass_requires_is_exported(tmp_path: Path) -> None:
    unet = build(**ONE_LEVEL)
    onnx.export(sdgraph.apply(unet, [Squares()]), tmp_path / "bundle")
    exported = ort.ORTUNet.from_pretrained(tmp_path / "bundle", provider="CPUExecutionProvider")
    call = call_of(unet, H=10, W=6)
    assert torch.allclose(answer(exported, call), answer(unet, call), atol=1e-4)
    with pytest.raises(CallError, match=r"Squares\(\): squares are of 2 by 2"):
        exported(**call_of(unet, H=9))


@pytest.mark.parametrize(
    ("conditions", "error", "words"),
    [
        (("H % 2",), SpecError, "is no comparison"),
        (("H % 2 == 0 and W % 2 == 0",), SpecError, "is no comparison"),
        (("X % 2 == 0",), SpecError, "there is no size 'X'"),
        (("__import__('os').getpid() == 0",), SpecError, "may not be in a condition"),
        (("H ** 9999999 == 0",), SpecError, "may not be in a condition"),
        (("H % W == 0",), SpecError, "may divide by 0"),
        (("H % == 0",), SpecError, "cannot read the condition"),
        (("H % 2 == 0", "H % 2 == 1"), EditError, "does not hold at the model's own size"),
        (("H % 8 == 0", "H < 65"), EditError, "satisfy H % 8 == 0 and H < 65"),
    ],
)
def test_what_cannot_be_required(graph: Graph, conditions: tuple[str, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        sdgraph.apply(graph, [Requires(conditions)])
    assert "test_requirements.py:" in str(caught.value)


def test_verification_runs_at_sizes_that_are_required(graph: Graph) -> None:
    made = sdgraph.apply(graph, [Requires(("H % 8 == 0", "W == H"))])
    assert made.graph.allowed(H=3, W=9) == {"H": 16, "W": 16}
    assert made.report.passes[0].difference is not None
