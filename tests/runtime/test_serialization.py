"""Saved folders: what comes back is the same; what cannot come back is not saved."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from torch import nn

import sdgraph
from sdgraph import Graph, GraphUNet, Pass
from sdgraph.errors import ModeError, SavedError
from sdgraph.runtime import serialization
from sdgraph.schedules import Uniform

from ..models import answer, build, call_of, load_ip_adapter


@pytest.mark.law("A saved UNet comes back with the same outputs, bit for bit.")
@pytest.mark.slow
def test_round_trip(pruned: GraphUNet, folder: Path) -> None:
    back = GraphUNet.from_pretrained(folder)
    assert {p.name for p in folder.iterdir()} == {"config.json", "sdgraph.json", WEIGHTS}
    assert [str(p) for p in back.graph.passes] == ["CleanUp()", "PruneBlocks('mid_block')"]
    call = call_of(pruned)
    assert torch.equal(answer(back, call), answer(pruned, call))
    assert back.config.in_channels == pruned.config.in_channels
    half = GraphUNet.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "lcm", "class-timestep", "upscaler"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    unet = sdgraph.apply(build(name).to(torch.bfloat16), "CleanUp", verify=False)
    unet.save_pretrained(tmp_path / "unet")
    back = GraphUNet.from_pretrained(tmp_path / "unet")
    call = call_of(unet)
    assert back.dtype == torch.bfloat16
    assert torch.equal(answer(back, call), answer(unet, call))


@pytest.mark.slow
def test_a_pass_that_changes_only_weights_comes_back(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class HalveConvIn(Pass):
        def run(self, graph: Graph) -> None:
            old = graph.module("conv_in")
            new = copy.deepcopy(old)
            with torch.no_grad():
                new.weight = nn.Parameter(old.weight / 2)
            graph.add_module("conv_in", new)

    unet = sdgraph.apply(build("sd15"), [HalveConvIn()])
    unet.save_pretrained(tmp_path / "unet")
    back = GraphUNet.from_pretrained(tmp_path / "unet")
    call = call_of(unet)
    assert torch.equal(answer(back, call), answer(unet, call))
    assert not torch.equal(answer(back, call), answer(build("sd15"), call))


@pytest.mark.slow
def test_trained_weights_are_what_is_saved(tmp_path: Path) -> None:
    unet = sdgraph.apply(build("sd15"), "CleanUp", verify=False).train()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.5)
    unet.save_pretrained(tmp_path / "unet")
    back = GraphUNet.from_pretrained(tmp_path / "unet")
    call = call_of(unet)
    assert torch.equal(answer(back, call), answer(unet.eval(), call))


@pytest.mark.slow
def test_saving_again_replaces_and_leaves_nothing_else(pruned: GraphUNet, folder: Path) -> None:
    pruned.save_pretrained(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["unet"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SavedError, match="holds other files: notes"):
        pruned.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_graph_saved_again_is_not_traced_again(
    pruned: GraphUNet, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other numbers are; another graph is, and a graph with other inputs."""
    real, traced = serialization.counterpart, []
    monkeypatch.setattr(serialization, "counterpart", lambda graph: traced.append(graph) or real(graph))
    trained = copy.deepcopy(pruned)
    with torch.no_grad():
        trained.get_parameter("conv_in.bias").add_(1)
    trained.save_pretrained(tmp_path / "again")
    assert traced == []
    monkeypatch.setattr(serialization, "_found", deque())
    trained.save_pretrained(tmp_path / "first")
    assert len(traced) == 1
    again, first = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("again", "first"))
    assert again == first
    assert again[WEIGHTS] != (folder / WEIGHTS).read_bytes()
    source = build()
    for number, inputs in ((2, []), (3, ["encoder_attention_mask"])):
        graph = sdgraph.trace(source, inputs=inputs)
        GraphUNet(graph).save_pretrained(tmp_path / "other")
        assert len(traced) == number


@pytest.mark.law("A save that fails leaves the old folder.")
def test_a_failed_save_leaves_the_old_folder(pruned: GraphUNet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        pruned.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["unet"]


def test_what_cannot_come_back_is_not_saved(tmp_path: Path) -> None:
    adapted = sdgraph.apply(load_ip_adapter(build("sd15"), "base"), [], verify=False)
    with pytest.raises(ModeError, match="save the source UNet"):
        adapted.save_pretrained(tmp_path / "unet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_options_that_would_be_ignored_are_refused(pruned: GraphUNet, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SavedError, match=r"(?s)push_to_hub.*upload_folder"):
        pruned.save_pretrained(tmp_path / "other", push_to_hub=True)
    with pytest.raises(ModeError, match=r"(?s)push_to_hub.*upload_folder.*snapshot_download"):
        pruned.push_to_hub("owner/name")
    with pytest.raises(SavedError, match="quantization_config"):
        GraphUNet.from_pretrained(folder, quantization_config={"load_in_8bit": True})
    with pytest.raises(SavedError, match="no folder"):
        GraphUNet.from_pretrained("someone/nothing")
    pruned.save_pretrained(tmp_path / "variant", variant="fp16")
    assert (tmp_path / "variant" / "diffusion_pytorch_model.fp16.safetensors").exists()
    GraphUNet.from_pretrained(tmp_path / "variant", variant="fp16")


@pytest.mark.slow
def test_edits_that_no_operation_shows_are_not_lost_in_silence(tmp_path: Path) -> None:
    """A schedule or a module changed outside of passes: loading and retracing would bring the old one back."""
    unet = sdgraph.apply(build(), "InheritFeatures('mid_block', Uniform(2))", verify=False)
    rescheduled, swapped = unet.graph.copy(), unet.graph.copy()
    rescheduled.reschedule("mid_block", Uniform(5))
    swapped.add_module("conv_act", torch.nn.Hardswish())
    for graph in (rescheduled, swapped):
        edited = sdgraph.GraphUNet(graph)
        with pytest.raises(ModeError, match="cannot be rebuilt"):
            edited.save_pretrained(tmp_path / "unet")
        with pytest.raises(ModeError, match="edits outside of passes"):
            edited.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    unet.save_pretrained(tmp_path / "unet")
