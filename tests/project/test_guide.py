"""docs/writing-a-pass.md: its passes are the files they say they are, hold and come back, and its package installs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdgraph
from sdgraph.errors import NoChangeError
from sdgraph.testing import check

from ..documents import ROOT, blocks, commands, inline_code
from ..models import ONE_LEVEL, answer, build, call_of

GUIDE = ROOT / "docs" / "writing-a-pass.md"


def written(name: str) -> str:
    """The block that is the file of a name."""
    (found,) = [block.text for block in blocks(GUIDE) if block.text.startswith(f"# {name}\n")]
    return found


def test_the_passes_shown_are_the_files_they_come_from() -> None:
    shown = {block.label: block.text for block in blocks(GUIDE) if block.label}
    assert len(shown) == 3
    for name, text in shown.items():
        code = text[text.index("@dataclass") :]
        assert code in (ROOT / name).read_text(), name


@pytest.mark.long
def test_the_package_installs_and_is_known_to_the_command_line(tmp_path: Path) -> None:
    package, site = tmp_path / "package", tmp_path / "site"
    package.mkdir()
    for name in ("acme_passes.py", "pyproject.toml"):
        (package / name).write_text(written(name))
    build(**ONE_LEVEL).save_pretrained(tmp_path / "unet")
    install, export = commands(GUIDE)
    assert install == ["pip", "install", "."]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    run([sys.executable, "-m", "pip", "install", ".", *options], package)
    (without,) = [shlex.split(code) for code in inline_code(GUIDE) if code.startswith("sdgraph export unet --import")]
    for folder, command, where in (
        (tmp_path, export, {"PYTHONPATH": str(site)}),
        (package, ["../unet" if word == "unet" else word for word in without], {}),
    ):
        out = run([sys.executable, "-m", *command], folder, where)
        assert "ScaleSkips(" in out
        assert (folder / "unet-onnx" / "model.onnx").exists()


def run(command: list[str], folder: Path, variables: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | (variables or {})
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- the passes in full -----------------------------------------------------------------------------------------------


@pytest.fixture
def unloaded() -> Iterator[None]:
    """Let go of the passes afterwards: the guide, which is run in the same process, defines them again."""
    yield
    import extra_passes

    for name in ("fuse_projections", "hard_swish", "separate_convs"):
        if sys.modules.pop(f"extra_passes.{name}", None):
            delattr(extra_passes, name)


PASSES = [
    "SeparateConvs(0.8)",
    *(pytest.param(text, marks=pytest.mark.slow) for text in ("HardSwish()", "FuseProjections()", "MergeTokens()")),
]


@pytest.mark.slow
@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("text", PASSES)
def test_the_passes_hold_and_come_back(text: str, tmp_path: Path) -> None:
    from extra_passes import fuse_projections, hard_swish, merge_tokens, separate_convs  # noqa: F401

    (one,) = sdgraph.parse(text)
    unet = build(attention_head_dim=8)
    made = check(one, unet)
    assert made is not None
    assert len(made.report.passes[0].edits) > 1
    made.save_pretrained(tmp_path / "unet")
    back = sdgraph.GraphUNet.from_pretrained(tmp_path / "unet")
    for sizes in ({}, {"H": 9, "W": 7, "B": 3}):
        call = call_of(unet, **sizes)
        assert answer(back, call).equal(answer(made, call))


@pytest.mark.usefixtures("unloaded")
def test_separable_convolutions_of_full_rank_are_the_convolutions() -> None:
    from extra_passes.separate_convs import Separable, SeparateConvs

    unet = build()
    conv, call = unet.mid_block.resnets[0].conv1, call_of(unet)
    x = call["sample"].new_ones(1, 32, 5, 5).cumsum(2).sin()
    assert Separable(conv, 9)(x).allclose(conv(x), atol=1e-5)
    with pytest.raises(NoChangeError, match="rank 9 would cost more"):
        sdgraph.apply(unet, [SeparateConvs(0.9999)])
