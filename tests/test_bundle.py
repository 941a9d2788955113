"""Exported UNets that inherit features: whole generations equal PyTorch's, over one file of weights."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from scenes.pipeline import load

import sdgraph
from sdgraph import GraphUNet
from sdgraph.__main__ import main
from sdgraph.errors import CallError, ModeError, SpecError
from sdgraph.evaluation import metrics as similarity
from sdgraph.exporters.bundle.external_data import SharedWeights
from sdgraph.exporters.bundle.inspect import contents
from sdgraph.exporters.onnx.export import export
from sdgraph.exporters.ort.bench import bench
from sdgraph.exporters.ort.unet import ORTUNet
from sdgraph.passes import GRIAttention, HoistInvariants, InheritFeatures, MECondConv, PruneBlocks
from sdgraph.schedules import Explicit

from .models import answer, build, call_of
from .test_pipelines import PIPELINES, make

pytestmark = pytest.mark.slow
BEFORE = Path(__file__).parent / "saved_before"
FULL = (pytest.mark.full,)  # an export takes seconds for each graph: these run with `make test-full`
RARE = ("faster diffusion", "t-gate", "image", "inpaint-9", "lcm")

PRESETS: dict[str, Any] = {
    "deep cache": [HoistInvariants(), replace(InheritFeatures.deep_cache(3), forecast=1)],
    "faster diffusion": InheritFeatures.faster_diffusion((0, 1, 3)),
    "t-gate": InheritFeatures.t_gate(3, interval=2, warm_up=1),
    "attention broadcast": InheritFeatures.attention_broadcast(),
    "layers": InheritFeatures.at_level("layer", within="{down_blocks.1,mid_block,up_blocks.0}"),
    "all passes": [
        PruneBlocks("bk-sdm-base"),
        MECondConv(experts=2),
        GRIAttention(4, pool=2),
        InheritFeatures.deep_cache(2),
    ],
}
SCHEDULERS = (
    DDIMScheduler,
    PNDMScheduler,
    HeunDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
Exported = tuple[GraphUNet, Path]


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Tiny, and deep enough for every preset."""
    return PIPELINES["text"][0]()


@pytest.fixture(scope="module")
def exported(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """A UNet with a preset and its export, each made once."""
    known: dict[str, Exported] = {}

    def of(name: str) -> Exported:
        if name not in known:
            source = build("sd15-levels") if name == "all passes" else pipe.unet
            unet = sdgraph.apply(source, PRESETS[name], verify=False)
            directory = tmp_path_factory.mktemp("bundle") / name.replace(" ", "-")
            export(unet, directory, calls=6, progress=False)
            known[name] = unet, directory
        return known[name]

    return of


def opened(directory: Path, **options: Any) -> ORTUNet:
    return ORTUNet.from_pretrained(directory, provider="CPUExecutionProvider", **options)


def latents(pipe: Any, unet: Any, scheduler: Any = None, **options: Any) -> torch.Tensor:
    """Of a generation of some steps, with the pipeline left as it was."""
    own = copy.copy(pipe)
    own.unet = unet
    if scheduler is not None:
        own.scheduler = scheduler.from_config(pipe.scheduler.config)
    call = {**PIPELINES["text"][1], "output_type": "latent", **options}
    with sdgraph.attach(own) if hasattr(unet, "generations") else contextlib.nullcontext():
        return make(own, call, steps=6, output_type="latent")


@pytest.mark.parametrize("name", [pytest.param(each, marks=FULL * (each in RARE)) for each in PRESETS])
def test_generations_equal_pytorchs(pipe: Any, exported: Callable[[str], Exported], name: str) -> None:
    """At two shapes and batches."""
    unet, directory = exported(name)
    running = opened(directory)
    for options in ({}, {"num_images_per_prompt": 1, "height": 24, "width": 40}):
        mine, theirs = latents(pipe, running, **options), latents(pipe, unet, **options)
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert running.cache_bytes() == 0  # freed with the last call
    if name != "all passes":  # something was inherited
        assert (latents(pipe, running) - latents(pipe, pipe.unet)).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_under_every_scheduler(pipe: Any, exported: Callable[[str], Exported], scheduler: Any) -> None:
    unet, directory = exported("deep cache")
    mine, theirs = (latents(pipe, each, scheduler) for each in (opened(directory), unet))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(each, marks=FULL * (each in RARE))
        for each in ("controlnet", "xl-text", "image", "inpaint-9", "lcm")
    ],
)
def test_in_other_pipelines(name: str, tmp_path: Path) -> None:
    pipe, call = PIPELINES[name][0](), PIPELINES[name][1]
    unet = sdgraph.apply(pipe.unet, "HoistInvariants, InheritFeatures.deep_cache(2)", verify=False)
    inputs = ("mid_block_additional_residual", "down_block_additional_residuals") if name == "controlnet" else ()
    export(unet, tmp_path / "bundle", calls=5, inputs=inputs, progress=False)
    images = []
    for each in (unet, opened(tmp_path / "bundle")):
        pipe.unet = each
        with sdgraph.attach(pipe):
            images.append(make(pipe, call, steps=5))
    torch.testing.assert_close(images[1], images[0], rtol=1e-3, atol=1e-3)


def test_other_tools_run_the_graph_that_computes_everything(pipe: Any, exported: Callable[[str], Exported]) -> None:
    """It has one output, and its weights are those of the others."""
    _, directory = exported("deep cache")
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
    call = call_of(pipe.unet, L=77)
    feeds = {name: call[name].numpy() for name in ("sample", "encoder_hidden_states")}
    assert [output.name for output in session.get_outputs()] == ["out_sample"]
    found = session.run(None, feeds | {"timestep": np.array([500.0], np.float32)})[0]
    expected = answer(pipe.unet, {**call, "timestep": 500})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_bundles_of_earlier_versions_run(tmp_path: Path) -> None:
    """One of sdgraph 0.1.0, whose `model.onnx` had all outputs, beside the same UNet as it was saved then."""
    shutil.unpack_archive(BEFORE / "bundle.zip", tmp_path)
    running, unet = opened(tmp_path / "bundle"), GraphUNet.from_pretrained(BEFORE / "unet")
    call = call_of(unet)
    for step in range(4):
        now = {**call, "sample": call_of(unet, seed=step)["sample"], "timestep": 900 - step}
        torch.testing.assert_close(answer(running, now), answer(unet, now), rtol=1e-4, atol=1e-5)
    assert "inherit_1.onnx" in contents(tmp_path / "bundle")


def test_nothing_comes_from_another_generation(exported: Callable[[str], Exported]) -> None:
    """The driver is that of the PyTorch module; here are a batch that changes, an interruption, and another prompt."""
    unet, directory = exported("deep cache")
    running = opened(directory)
    call = call_of(unet, L=77)
    other = call_of(unet, L=77, B=1, seed=3)
    for step, given in enumerate((call, call, call, other, call, other, other, call)):
        now = {**given, "timestep": 900 - 10 * step}
        torch.testing.assert_close(answer(running, now), answer(unet, now), rtol=1e-4, atol=1e-5)
    running.reset()
    unet.reset()
    assert running.cache_bytes() == 0
    with pytest.raises(CallError):
        running(**{**call, "sample": call["sample"][:, :3]})


def test_the_weights_are_there_once(exported: Callable[[str], Exported]) -> None:
    unet, directory = exported("deep cache")
    said = json.loads((directory / "sdgraph.json").read_text())
    assert [each["file"] for each in said["models"]] == ["refresh.onnx", "inherit_1.onnx", "inherit_2.onnx"]
    size = sum(p.numel() * p.element_size() for p in unet.parameters())
    assert (directory / "model.onnx.data").stat().st_size <= 1.02 * size
    places = []
    for model in said["models"]:
        graph = onnx.load(directory / model["file"], load_external_data=False).graph
        assert {each.name for each in graph.input} >= {f"inherited.{site}" for site in model["takes"]}
        assert [each.name for each in graph.output] == ["out_sample", *(f"refreshed.{s}" for s in model["gives"])]
        places.append({t.name: {e.key: e.value for e in t.external_data}.get("offset") for t in graph.initializer})
    whole, inherit, hoisted = places
    shared = {name for name in inherit if inherit[name] is not None and name in whole}
    assert shared
    assert all(inherit[name] == whole[name] for name in shared)
    assert len(inherit) < len(hoisted) < len(whole)


@pytest.mark.parametrize("passes", ["InheritFeatures.deep_cache(2)", "HoistInvariants, InheritFeatures.deep_cache(3)"])
def test_all_kinds_of_calls_in_one_file(passes: str, tmp_path: Path) -> None:
    unet = sdgraph.apply(build(), passes, verify=False)
    report = export(unet, tmp_path / "single", layout="single", calls=4, progress=False)
    assert {path.suffix for path in (tmp_path / "single").iterdir()} == {".json", ".onnx", ".data"}
    assert len({each.model for each in report.comparisons}) == (2 if passes.startswith("Inherit") else 3)
    model = onnx.load(tmp_path / "single" / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(tmp_path / "single" / "model.onnx"))
    assert [node.op_type for node in model.graph.node] == ["Constant", "Equal", "If"]
    running = opened(tmp_path / "single")
    assert running.manifest.sites == unet.graph.sites
    for size in ({}, {"B": 1, "H": 13, "W": 10}):
        call = call_of(unet, L=77, **size)
        for step in range(4):
            now = {**call, "timestep": 900 - step}
            torch.testing.assert_close(answer(running, now), answer(unet, now), rtol=1e-4, atol=1e-5)


def test_a_kind_of_call_that_was_not_exported_computes_more(
    exported: Callable[[str], Exported], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = "down_blocks.0.resnets.0", "up_blocks.1.resnets.0"
    passes = [InheritFeatures(first, Explicit((0, 1))), InheritFeatures(second, Explicit((0, 1, 2)))]
    unet = sdgraph.apply(build(), passes, verify=False)
    export(unet, tmp_path / "short", calls=3, progress=False)  # so that there is no call that inherits both
    running = opened(tmp_path / "short")
    assert [set(model.takes) for model in running.manifest.models] == [set(), {first}]
    call = call_of(unet)
    for step in range(5):
        mine, theirs = (answer(each, {**call, "timestep": 900 - step}) for each in (running, unet))
        if step < 3:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert "inherit_1.onnx computes more" in caplog.text
    once = sdgraph.apply(build(), passes[0], verify=False)
    for step in range(5):
        expected = answer(once, {**call, "timestep": 900 - step})
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_sizes_that_are_fixed_on_loading(exported: Callable[[str], Exported]) -> None:
    unet, directory = exported("deep cache")
    running = opened(directory, free_dims={"batch": 2, "height": 8, "width": 12})
    call = call_of(unet, L=77)
    torch.testing.assert_close(answer(running, call), answer(unet, call), rtol=1e-4, atol=1e-5)
    with pytest.raises(CallError, match="height is 9, and this UNet was loaded for 8"):
        running(**call_of(unet, L=77, H=9))
    with pytest.raises(SpecError, match="did you mean 'height'"):
        opened(directory, free_dims={"heigth": 8})


def test_sessions_share_the_kernels_of_convolutions_and_products(exported: Callable[[str], Exported]) -> None:
    _, directory = exported("deep cache")
    shared = SharedWeights(directory, torch.device("cpu"))
    whole, inherit = (shared.of(directory / name) for name in ("refresh.onnx", "inherit_1.onnx"))
    assert {name for name in inherit if name in whole}
    assert all(inherit[name].data_ptr() == whole[name].data_ptr() for name in inherit if name in whole)
    graph = onnx.load(directory / "refresh.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert all((value.numpy() == stored[name]).all() for name, value in whole.items())
    assert sum(stored[name].nbytes for name in whole) > 0.9 * sum(each.nbytes for each in stored.values())
    changeable = {name for node in graph.node if node.op_type in ("Mul", "Add", "Concat") for name in node.input}
    assert not changeable & {*whole}
    assert changeable & {*stored}


def test_settings_of_sessions(exported: Callable[[str], Exported]) -> None:
    unet, directory = exported("deep cache")
    call = call_of(unet, L=77)
    own = onnxruntime.SessionOptions()
    own.intra_op_num_threads = 1
    frugal = {"session.disable_prepacking": 1, "enable_cpu_mem_arena": False}
    for settings in (own, {"intra_op_num_threads": 1}, frugal):
        running = opened(directory, session_options=settings)
        again = opened(directory, session_options=settings)  # nothing is put into options that are the caller's
        for each in (running, again):
            torch.testing.assert_close(answer(each, call), answer(unet, call), rtol=1e-4, atol=1e-5)
    with pytest.raises(SpecError, match=r"(?s)no option 'intra_op_threads'.*did you mean 'intra_op_num_threads'"):
        opened(directory, session_options={"intra_op_threads": 1})
    with pytest.raises(SpecError, match="intra_op_num_threads does not take 'two'"):
        opened(directory, session_options={"intra_op_num_threads": "two"})
    with pytest.raises(SpecError, match="str is no mapping"):
        opened(directory, session_options="disable_prepacking")
    with pytest.raises(SpecError, match="free_dims and a SessionOptions do not go together"):
        opened(directory, session_options=own, free_dims={"batch": 2})


def test_images_of_the_trained_model(tmp_path: Path) -> None:
    """At least 50 dB between ONNX Runtime's images and PyTorch's."""
    pipe = load()
    pipe.set_progress_bar_config(disable=True)
    unet = sdgraph.apply(pipe.unet, PRESETS["deep cache"], verify=False)
    export(unet, tmp_path / "trained", calls=10, progress=False)
    images = []
    for each in (unet, opened(tmp_path / "trained")):
        pipe.unet = each
        with sdgraph.attach(pipe):
            generator = torch.Generator().manual_seed(1)
            caption = "a large red circle left of a small blue square"
            images.append(pipe([caption] * 2, num_inference_steps=10, generator=generator, output_type="np").images)
    assert similarity.psnr(*images) > 50


def test_attaching_takes_what_inherits(exported: Callable[[str], Exported], pipe: Any) -> None:
    own = copy.copy(pipe)
    own.unet = opened(exported("deep cache")[1])
    with sdgraph.attach(own):
        pass
    with pytest.raises(ModeError, match="object as its unet"):
        sdgraph.attach(SimpleNamespace(unet=object(), scheduler=None))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    unet, out, figures = tmp_path / "unet", tmp_path / "out", tmp_path / "figures.json"
    build().save_pretrained(unet)
    passes = "InheritFeatures.deep_cache(3)"
    assert main(["export", str(unet), "--passes", passes, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "inherit_1.onnx" in said
    assert "OUT OF BOUNDS" not in said
    assert main(["inspect", str(out), "--calls", "10"]) == 0
    said = capsys.readouterr().out
    assert "0, 3, 6, 9" in said
    assert "1-2, 4-5, 7-8" in said
    assert "Uniform(3)" in said
    assert "batch" in said or "B, 4, H, W" in said
    arguments = ["bench", str(out), "--calls", "4", "--size", "8", "12", "--repeats", "1", "--out", str(figures)]
    assert main([*arguments, "--provider", "CPUExecutionProvider"]) == 0
    assert "4 calls" in capsys.readouterr().out
    assert set(json.loads(figures.read_text())["models"]) == {"refresh.onnx", "inherit_1.onnx"}
    config = json.loads((unet / "config.json").read_text())  # of an export that names no size
    running = opened(out)
    running.config = {**config, "sample_size": None}
    with pytest.raises(SpecError, match="no sample_size"):
        bench(running)
    assert main(["export", str(unet), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    (out / "model.onnx.data").write_bytes(b"")
    assert main(["inspect", str(out)]) == 2
    assert "not the file that was exported" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
