"""diffusers' options of saving and loading, moving averages, and torch.export."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import CallError, SavedError

from ..models import INHERITING, answer, assert_same, build, call_of
from ..pipelines import PIPELINES


@pytest.mark.slow
def test_pickle_is_not_written_and_that_is_said(pair: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair[1].save_pretrained(tmp_path / "unet", safe_serialization=False)
    assert "safe_serialization=False" in caplog.text
    assert {p.suffix for p in (tmp_path / "unet").iterdir()} == {".json", ".safetensors"}
    assert_same(pair[0], GraphUNet.from_pretrained(tmp_path / "unet"))


@pytest.mark.slow
def test_shards(pair: Any, tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    pair[1].save_pretrained(folder, max_shard_size="200KB", variant="fp16")
    shards = sorted(folder.glob("diffusion_pytorch_model.fp16-*-of-*.safetensors"))
    assert len(shards) > 1
    assert (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    assert_same(pair[0], GraphUNet.from_pretrained(folder, variant="fp16"))
    with pytest.raises(SavedError, match=r"no variant 'bf16'"):
        GraphUNet.from_pretrained(folder, variant="bf16")
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1] + b"x")
    with pytest.raises(SavedError, match="not the one that was saved"):
        GraphUNet.from_pretrained(folder)


def test_pipelines_pass_the_options_on(tmp_path: Path) -> None:
    pipe = PIPELINES["text"][0]()
    pipe.unet = sdgraph.apply(pipe.unet)
    pipe.save_pretrained(tmp_path, safe_serialization=False, variant="fp16", max_shard_size="200KB")
    names = {path.name for path in (tmp_path / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names
    assert not any(name.endswith(".bin") for name in names)


@pytest.mark.slow
def test_an_index_that_names_a_foreign_file_is_refused(pair: Any, tmp_path: Path) -> None:
    import hashlib
    import json

    folder = tmp_path / "unet"
    pair[1].save_pretrained(folder, max_shard_size="200KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"] = dict.fromkeys(found["weight_map"], "../other.safetensors")
    index.write_text(json.dumps(found))
    recipe = json.loads((folder / "sdgraph.json").read_text())
    recipe["files"][index.name] = hashlib.sha256(index.read_bytes()).hexdigest()
    (folder / "sdgraph.json").write_text(json.dumps(recipe))
    with pytest.raises(SavedError, match=r"without a checksum|may lead out of the folder"):
        GraphUNet.from_pretrained(folder)


@pytest.fixture(scope="module")
def in_one_file(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pair's graph, saved without options. To be read only."""
    folder = tmp_path_factory.mktemp("saved") / "unet"
    pair[1].save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("device_map", ["auto", "balanced", "cpu", torch.device("cpu"), {"": "cpu"}], ids=str)
def test_device_maps_of_one_device(pair: Any, in_one_file: Path, device_map: Any) -> None:
    assert_same(pair[0], GraphUNet.from_pretrained(in_one_file, device_map=device_map))


@pytest.mark.slow
def test_device_maps_of_several_devices_are_refused(in_one_file: Path) -> None:
    with pytest.raises(SavedError, match=r"(?s)cpu, meta.*one device"):
        GraphUNet.from_pretrained(in_one_file, device_map={"conv_in": "cpu", "conv_out": "meta"})


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["", "PruneBlocks('mid_block')"])
def test_moving_averages(passes: str, tmp_path: Path) -> None:
    graph = sdgraph.apply(build(), passes)
    average = EMAModel(graph.parameters(), model_cls=GraphUNet, model_config=graph.config)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.add_(0.1)
    average.step(graph.parameters())
    average.step(graph.parameters())
    average.save_pretrained(tmp_path / "average")
    back = EMAModel.from_pretrained(tmp_path / "average", GraphUNet)
    assert back.optimization_step == 2
    assert len(back.shadow_params) == len(list(graph.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(average.shadow_params, back.shadow_params, strict=True))
    average.copy_to(graph.parameters())
    call = call_of(graph)
    assert torch.equal(answer(graph, call), answer(GraphUNet.from_pretrained(tmp_path / "average"), call))


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["", "HoistInvariants", INHERITING])
def test_torch_export(passes: str) -> None:
    graph = sdgraph.apply(build(), passes)
    call = call_of(graph, timestep=torch.tensor([7]))
    free = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim.AUTO}
    sizes = {0: free[0], 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(
        graph,
        tuple(call.values()),
        dynamic_shapes={"sample": sizes, "timestep": None, "encoder_hidden_states": free},
    )
    other = call_of(graph, B=3, H=16, W=8, L=9, timestep=torch.tensor([3]))
    assert torch.equal(program.module()(*other.values()).sample, answer(graph, other))


def test_torch_export_of_one_timestep_per_call() -> None:
    graph = sdgraph.apply(build(), "MECondConv(where='up_blocks.*.resnets.*.conv1', experts=2, donors='copies')")
    call = call_of(graph, timestep=torch.tensor([7, 3]))
    with pytest.raises(CallError, match=r"(?s)one timestep per call.*shape \(1,\)"):
        torch.export.export(graph, tuple(call.values()))


def test_group_offloading_by_leaves() -> None:
    cpu = torch.device("cpu")
    unet, graph = build(), sdgraph.apply(build())
    try:
        build().enable_group_offload(cpu, offload_device=cpu, offload_type="leaf_level")
    except AttributeError:
        pytest.skip("this diffusers offloads groups only where there is an accelerator")
    graph.enable_group_offload(cpu, offload_device=cpu, offload_type="leaf_level")
    assert_same(unet, graph)


@pytest.mark.slow
def test_loggers_are_quiet_by_default(pair: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pair[1].save_pretrained(tmp_path / "unet")
        GraphUNet.from_pretrained(tmp_path / "unet")
    assert not [r for r in caplog.records if r.name == "sdgraph"]
