"""Saved folders: what comes back is the same; what is damaged or unsafe is refused before anything runs."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sdgraph
from sdgraph import Graph, GraphUNet, Pass
from sdgraph.atomic import appearing
from sdgraph.cli import main
from sdgraph.cli.sources import load_unet
from sdgraph.errors import ModeError, SavedError, SdgraphError
from sdgraph.exporters.bundle.manifest_file import digest, read_manifest
from sdgraph.ir.dims import evaluate
from sdgraph.runtime.recipe import read_recipe
from sdgraph.schedules import Uniform
from sdgraph.spec import read
from sdgraph.untrusted import read_config

from .models import answer, build, call_of, load_ip_adapter

PASSES = "CleanUp, PruneBlocks('mid_block')"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BEFORE = Path(__file__).parent / "saved_before"


@pytest.fixture(scope="module")
def pruned() -> GraphUNet:
    return sdgraph.apply(build("sd15"), PASSES, verify=False)


@pytest.fixture(scope="module")
def saved(pruned: GraphUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "unet"
    pruned.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved folder to damage."""
    return Path(shutil.copytree(saved, tmp_path / "unet"))


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


def test_trained_weights_are_what_is_saved(tmp_path: Path) -> None:
    unet = sdgraph.apply(build("sd15"), "CleanUp", verify=False).train()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.5)
    unet.save_pretrained(tmp_path / "unet")
    back = GraphUNet.from_pretrained(tmp_path / "unet")
    call = call_of(unet)
    assert torch.equal(answer(back, call), answer(unet.eval(), call))


def test_saving_again_replaces_and_leaves_nothing_else(pruned: GraphUNet, folder: Path) -> None:
    pruned.save_pretrained(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["unet"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SavedError, match="holds other files: notes"):
        pruned.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failed_save_leaves_the_old_folder(pruned: GraphUNet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        pruned.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["unet"]


def recipe(folder: Path, **changes: Any) -> None:
    file = folder / "sdgraph.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop(folder: Path, field: str) -> None:
    file = folder / "sdgraph.json"
    said = json.loads(file.read_text())
    del said[field]
    file.write_text(json.dumps(said))


def config(folder: Path, **changes: Any) -> None:
    """Change the configuration, and the recipe's hash of it, as somebody who means harm would."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    files = json.loads((folder / "sdgraph.json").read_text())["files"]
    recipe(folder, files=files | {"config.json": hashlib.sha256(file.read_bytes()).hexdigest()})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: truncate(f / WEIGHTS), "not the one that was saved"),
        (lambda f: flip(f / WEIGHTS), "not the one that was saved"),
        (lambda f: flip(f / "config.json"), "not the one that was saved"),
        (lambda f: (f / WEIGHTS).unlink(), "the file is missing"),
        (lambda f: (f / "config.json").unlink(), "the file is missing"),
        (lambda f: (f / "sdgraph.json").unlink(), "cannot be read"),
        (lambda f: truncate(f / "sdgraph.json"), "is not JSON"),
        (lambda f: (f / "sdgraph.json").write_text("[]"), "not a JSON object"),
        (lambda f: recipe(f, weights="../../etc/passwd"), "weights: a name of another form"),
        (lambda f: recipe(f, weights="/etc/passwd"), "weights: a name of another form"),
        (lambda f: recipe(f, weights=".."), "weights: a name of another form"),
        (lambda f: recipe(f, files={"../x": "0" * 64}), "files: a name of another form"),
        (lambda f: recipe(f, files=None), "files: expected `object`, got `null`"),
        (lambda f: recipe(f, files=[WEIGHTS]), "files: expected `object`, got `array`"),
        (lambda f: recipe(f, format=True), "format: expected `int`, got `bool`"),
        (lambda f: recipe(f, format=-1), "format: expected `int` >= 1"),
        (lambda f: recipe(f, models=[]) or drop(f, "passes"), "an exported directory"),
        (lambda f: drop(f, "passes"), "missing required field `passes`"),
        (lambda f: config(f, in_channels="x"), "in_channels: expected `int`, got `str`"),
        (lambda f: config(f, block_out_channels=[10**9]), "block_out_channels.*expected `int` <="),
        (lambda f: config(f, layers_per_block=10**9), "layers_per_block: expected `int` <= 1000"),
        (lambda f: config(f, act_fn=3), "do not give a graph"),
        (lambda f: recipe(f, files={}), "no checksum of"),
        (lambda f: recipe(f, format=99), "upgrade sdgraph"),
        (lambda f: recipe(f, passes="CleanUp()"), "passes: expected `array`, got `str`"),
        (lambda f: recipe(f, passes=["Unheard()"]), "no pass named 'Unheard'"),
        (lambda f: recipe(f, passes=["CleanUp()"]), "gives another graph"),
        (lambda f: recipe(f, dtype="load"), "dtype: invalid enum value 'load'"),
    ],
)
def test_damage_is_refused(folder: Path, damage: Any, words: str) -> None:
    damage(folder)
    with pytest.raises(SavedError, match=words) as caught:
        GraphUNet.from_pretrained(folder)
    assert caught.value.where
    assert caught.value.hint


def test_fields_of_a_newer_version_are_ignored(folder: Path) -> None:
    recipe(folder, colour="green")
    GraphUNet.from_pretrained(folder)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 10**30, 1e300, "", "x", "../x", "H" * 5000, "1<<999999999", "(" * 500, [], {}, [[]]]),
    st.recursive(st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
)


def mutated(plain: Any, data: st.DataObject) -> Any:
    """A copy in which one place holds something else, or nothing."""
    plain = copy.deepcopy(plain)
    inner, steps = plain, data.draw(st.integers(1, 4))
    for step in range(steps):
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if step == steps - 1 or not isinstance(inner[key], dict | list):
            if data.draw(st.integers(0, 4)) == 0:
                del inner[key]
            else:
                inner[key] = data.draw(JUNK)
            break
        inner = inner[key]
    return plain


def forged(folder: Path, name: str, data: st.DataObject, read: Callable[[], Any], digest: Any = None) -> None:
    """Whatever a file holds, reading it either works or raises our error, and soon."""
    kept = (folder / name).read_text()
    try:
        plain = mutated(json.loads(kept), data)
        if digest is not None:
            plain.pop("sha256", None)
            plain["sha256"] = digest(plain)
        (folder / name).write_text(json.dumps(plain))
        start = time.process_time()
        with contextlib.suppress(SavedError):
            read()
        assert time.process_time() - start < 5
    finally:
        (folder / name).write_text(kept)


@given(data=st.data())
@settings(max_examples=200)
def test_forged_recipes(saved: Path, data: st.DataObject) -> None:
    forged(saved, "sdgraph.json", data, functools.partial(read_recipe, saved))


@given(data=st.data())
@settings(max_examples=200)
def test_forged_configurations(saved: Path, data: st.DataObject) -> None:
    forged(saved, "config.json", data, functools.partial(read_config, saved / "config.json", "save again"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    shutil.unpack_archive(BEFORE / "bundle.zip", folder)
    return folder / "bundle"


@given(data=st.data())
@settings(max_examples=400)
def test_forged_manifests(bundle: Path, data: st.DataObject) -> None:
    """What is read can be asked for the sizes of a call, which are refused or not."""
    flat = {
        "sample": torch.zeros(2, 2, 8, 12),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(2, 5, 24),
    }

    def read() -> None:
        manifest = read_manifest(bundle)
        with contextlib.suppress(SdgraphError):
            sizes = manifest.check(flat)
            for model in manifest.models:
                for spec in (*manifest.session_inputs(model), *manifest.session_outputs(model)):
                    for dim in spec.shape or ():
                        assert isinstance(dim if isinstance(dim, int) else evaluate(dim, sizes), int)

    forged(bundle, "sdgraph.json", data, read, digest)


@pytest.mark.parametrize("power", [1e300, 1, "x"])
def test_a_schedule_that_would_never_end_is_refused(power: Any) -> None:
    with pytest.raises(SdgraphError):
        read(f"DenseEarly(2, power={power!r})")


def test_folders_of_earlier_versions_load(tmp_path: Path) -> None:
    """One that sdgraph 0.1.0 saved before its recipe had a schema."""
    unet = GraphUNet.from_pretrained(BEFORE / "unet")
    assert [str(one) for one in unet.graph.passes] == ["CleanUp()", "InheritFeatures('up_blocks.-1.resnets.-1')"]
    call = call_of(unet)
    again = tmp_path / "again"
    unet.save_pretrained(again)
    assert torch.equal(answer(GraphUNet.from_pretrained(again), call), answer(unet, call))


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SavedError, match="a link out of its folder"):
        GraphUNet.from_pretrained(folder)


def test_what_cannot_come_back_is_not_saved(tmp_path: Path) -> None:
    adapted = sdgraph.apply(load_ip_adapter(build("sd15"), "base"), [], verify=False)
    with pytest.raises(ModeError, match="save the source UNet"):
        adapted.save_pretrained(tmp_path / "unet")
    assert list(tmp_path.iterdir()) == []


def test_options_that_would_be_ignored_are_refused(pruned: GraphUNet, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SavedError, match=r"(?s)push_to_hub.*unet.push_to_hub"):
        pruned.save_pretrained(tmp_path / "other", push_to_hub=True)
    with pytest.raises(SavedError, match="quantization_config"):
        GraphUNet.from_pretrained(folder, quantization_config={"load_in_8bit": True})
    with pytest.raises(SavedError, match="no folder"):
        GraphUNet.from_pretrained("nobody/nothing")
    pruned.save_pretrained(tmp_path / "variant", variant="fp16")
    assert (tmp_path / "variant" / "diffusion_pytorch_model.fp16.safetensors").exists()
    GraphUNet.from_pretrained(tmp_path / "variant", variant="fp16")


KILLED = """
import os, signal, sys
from pathlib import Path
from sdgraph.errors import SavedError
from sdgraph.atomic import appearing

with appearing(sys.argv[1], lambda path: None, SavedError) as folder:
    (folder / "half").write_text("written")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "t"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".t-")
    (left / "old").mkdir()  # as if it had been killed between putting the old away and the new in its place
    others = [tmp_path / name for name in (".t-mine", ".t-12345678", ".t-x-12345678", ".u-12345678")]
    for other in others:
        other.mkdir()
    seen = []
    with appearing(target, lambda path: seen.append(path.exists()), SavedError) as folder:
        running = folder.parent
        assert not left.exists()
        with appearing(target, lambda path: None, SavedError):
            assert running.exists()  # another process's, or thread's
    assert seen[0]  # what was put away is back
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


def test_exports_are_refused_before_the_model_is_loaded(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "no/such/model", "--out", str(bundle)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", str(bundle), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "is exported already" in said
    assert "sdgraph inspect" in said


def test_the_command_loads_in_the_dtype_that_is_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """diffusers' `to` warns of "modules that should be kept in float32: []"."""
    build("sd15").save_pretrained(tmp_path / "unet")
    for folder in (tmp_path / "unet", BEFORE / "unet"):
        assert load_unet(str(folder), "float16").dtype == torch.float16
    assert "float32" not in capfd.readouterr().err


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
