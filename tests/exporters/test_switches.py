"""An exported switch of several UNets: who computes when is the same as in PyTorch, over one file of weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sdgraph
from sdgraph import SwitchUNet, errors
from sdgraph.cli import main
from sdgraph.exporters.bundle.manifest_file import digest
from sdgraph.exporters.onnx import export
from sdgraph.exporters.ort.providers import CPU
from sdgraph.exporters.ort.unet import ORTUNet

from ..models import ONE_LEVEL, answer, build, call_of
from ..pipelines import PROMPT, SIZE, make, plain
from .exports import CLOSE

pytestmark = pytest.mark.slow  # the export of three graphs
SITES = "InheritFeatures('up_blocks.-1.resnets.-1', Uniform(3), part='entry')"


@pytest.fixture(scope="module")
def switch() -> SwitchUNet:
    """A UNet that inherits, and itself without a block, in turns of three calls."""
    whole = build(**ONE_LEVEL)
    members = {
        "large": sdgraph.apply(whole, SITES),
        "small": sdgraph.apply(whole, "PruneBlocks('down_blocks.0.attentions.0')"),
    }
    return sdgraph.switch(members, "InTurns(('large', 'small'), (3, 2))", guidance_scale={"small": 3.0})


@pytest.fixture(scope="module")
def bundle(switch: SwitchUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("switch") / "bundle"
    export(switch, folder, calls=6, progress=False)
    return folder


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "damaged")


def loaded(folder: Path, **options: Any) -> ORTUNet:
    return ORTUNet.from_pretrained(folder, provider=CPU, **options)


def generation(
    unet: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[torch.Tensor], list[tuple[str, frozenset[str]]]]:
    """The predictions of a generation of the same inputs, and the member and the reused sites of each call."""
    made: list[tuple[str, frozenset[str]]] = []
    seen: list[torch.Tensor] = []

    def noting(name: str, member: Any) -> None:
        backend = member.backend if isinstance(unet, SwitchUNet) else member
        compute = backend.compute
        monkeypatch.setattr(
            backend, "compute", lambda flat, reused, read: (made.append((name, reused)), compute(flat, reused, read))[1]
        )

    for name, member in unet.members.items():
        noting(name, member)
    run = unet.run
    monkeypatch.setattr(unet, "run", lambda flat: (lambda found: (seen.append(found.clone()), found)[1])(run(flat)))
    pipe = plain("StableDiffusionPipeline", build(**ONE_LEVEL))
    pipe.unet = unet
    with sdgraph.attach(pipe):
        make(pipe, {**PROMPT, **SIZE}, steps=6, guidance_scale=5.0, output_type="latent")
    return seen, made


@pytest.mark.law("An exported switch names the member and the reused sites of every call that the switch names.")
def test_a_generation(switch: SwitchUNet, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, who = generation(switch, monkeypatch)
    found, same = generation(loaded(bundle), monkeypatch)
    assert same == who
    assert [name for name, _ in who] == ["large"] * 3 + ["small"] * 2 + ["large"]
    assert len({reused for _, reused in who}) == 2
    assert len(found) == len(wanted) == 6
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_weights_are_written_once(bundle: Path) -> None:
    sizes = loaded(bundle).backend.open_sessions.sizes
    largest = bundle / "large-variant_0.onnx"
    of_large = sizes[largest.name] - largest.stat().st_size
    written = (bundle / "model.onnx.data").stat().st_size
    assert of_large <= written < 1.1 * of_large, "all weights of the small one are weights of the large one"
    assert {path.name for path in bundle.glob("*.onnx")} == {
        "large-model.onnx", "large-variant_0.onnx", "large-variant_1.onnx", "small-model.onnx",
    }  # fmt: skip


def test_a_bound_on_memory(bundle: Path, switch: SwitchUNet) -> None:
    free = loaded(bundle)
    assert len(free.backend.open_sessions) == 0, "sessions open when they are first needed"
    sizes = free.backend.open_sessions.sizes
    with pytest.raises(errors.SpecError, match=rf"do not hold the largest model[\s\S]*at least {max(sizes.values())}"):
        loaded(bundle, memory=max(sizes.values()) - 1)
    bound = loaded(bundle, memory=max(sizes.values()))
    call = call_of(switch.members["large"])
    for unet, most in ((free, 2), (bound, 1)):
        unet.rota.schedule = sdgraph.schedules.ByTimestep(("large", "small"), (500,))
        unet.rota.guidance_scale = {}
        for timestep in (900, 100, 800):
            unet.reset()
            switch.members["large"].reset()
            name = "large" if timestep >= 500 else "small"
            given = {**call, "timestep": timestep}
            torch.testing.assert_close(answer(unet, given), answer(switch.members[name], given), **CLOSE)
            assert len(unet.backend.open_sessions) <= most
            assert unet.members[name].manifest.variants[0].file in unet.backend.open_sessions
    assert len(free.backend.open_sessions) == 2


def test_inspect(switch: SwitchUNet, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(bundle), "--calls", "6"])
    shown = capsys.readouterr().out
    assert f"schedule: {switch.schedule}" in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    assert rows["large"] == ["0-2,", "5", "4"]
    assert rows["small"] == ["3-4", "2"]


def test_the_command_exports_a_saved_switch(switch: SwitchUNet, tmp_path: Path) -> None:
    switch.save_pretrained(tmp_path / "saved")
    command = ["export", str(tmp_path / "saved"), "--out", str(tmp_path / "bundle"), "--calls", "6"]
    assert main([*command, "--passes", "CleanUp"]) != 0
    assert not (tmp_path / "bundle").exists()


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, with a right checksum."""
    plain = json.loads((folder / "sdgraph.json").read_text())
    plain.pop("sha256")
    change(plain)
    (folder / "sdgraph.json").write_text(json.dumps({**plain, "sha256": digest(plain)}))


def schedule(text: str) -> Callable[[Path], None]:
    return lambda folder: forge(folder, lambda plain: plain.update(schedule=text))


def file_of_large(name: str) -> Callable[[Path], None]:
    return lambda folder: forge(folder, lambda plain: plain["members"]["large"]["variants"][0].update(file=name))


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a graph is missing": (
        "small-model.onnx, of member small, is missing",
        lambda d: (d / "small-model.onnx").unlink(),
    ),
    "a graph is damaged": (
        "large-variant_1.onnx, of member large, is not the file",
        lambda d: (d / "large-variant_1.onnx").write_bytes(b"no"),
    ),
    "no weights": (r"model.onnx.data, of member large, is missing", lambda d: (d / "model.onnx.data").unlink()),
    "weights cut": (
        "model.onnx.data, of member large, is not the file",
        lambda d: (d / "model.onnx.data").write_bytes(b"no"),
    ),
    "no schedule": ("damaged: .*schedule", schedule("sys.exit()")),
    "a schedule of another": ("names a UNet 'huge'", schedule("ByTimestep(('large', 'huge'), (500,))")),
    "a schedule of one": ("never names small", schedule("ByTimestep(('large',))")),
    "another version": ("has format 99", lambda d: forge(d, lambda plain: plain.update(format=99))),
    "a path": ("another form, which may lead out", file_of_large("../large-model.onnx")),
    "a file of another": ("is of another member", file_of_large("small-model.onnx")),
    "a hostile name": (
        "is damaged",
        lambda d: forge(d, lambda plain: plain["members"].update({"../x": plain["members"]["small"]})),
    ),
    "no members": ("is damaged", lambda d: forge(d, lambda plain: plain.update(members={}))),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_bundles(damaged: Path, name: str) -> None:
    message, damage = DAMAGES[name]
    damage(damaged)
    with pytest.raises(errors.SavedError, match=message):
        loaded(damaged)


def test_refusals(switch: SwitchUNet, tmp_path: Path) -> None:
    member = switch.members["small"]
    both = sdgraph.switch({"a": member, "A": member}, boundary_ratio=0.5)
    with pytest.raises(errors.ExportError, match="a and A would have one name"):
        export(both, tmp_path / "bundle", progress=False)
    with pytest.raises(errors.SpecError, match=r"no optional input[\s\S]*member large"):
        export(switch, tmp_path / "bundle", inputs=("other",), calls=6, progress=False)
    half = sdgraph.switch({"a": member, "b": member}, boundary_ratio=0.5).to(torch.bfloat16)
    with pytest.raises(errors.ExportError, match=r"bfloat16[\s\S]*member a"):
        export(half, tmp_path / "bundle", progress=False)
    assert not (tmp_path / "bundle").exists()
