"""`sdgraph show`."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenes.pipeline import MODEL

from sdgraph.__main__ import main

CACHE = "InheritFeatures.deep_cache(3)"


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_loads")
def test_show_prints_regions_and_calls_at_the_users_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet, calls = tmp_path / "made" / "unet.svg", tmp_path / "made" / "calls.png"
    given = ["show", str(MODEL), f"PruneBlocks('mid_block'), {CACHE}", "--calls", "10"]
    assert main([*given, "--height", "128", "--depth", "2", "--picture", str(unet), "--timetable", str(calls)]) == 0
    said = capsys.readouterr().out
    assert "at B=1, H=32, W=16" in said  # 128 x 64 pixels, of which a latent has 4
    assert "\nremoved\n  mid_block" in said
    assert "10 calls: " in said
    assert "calls 0, 3, 6, 9" in said
    assert "DDIMScheduler" in said
    assert unet.read_text().startswith("<?xml")
    assert calls.read_bytes().startswith(b"\x89PNG")
    assert main([*given, "--scheduler", "EulerDiscreteScheduler", "--depth", "1"]) == 0
    said = capsys.readouterr().out
    assert "at B=1, H=16, W=16" in said
    assert "EulerDiscreteScheduler" in said


def test_show_without_passes_and_of_a_saved_unet(reusing_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(MODEL / "unet"), "--depth", "2"]) == 0
    assert "nothing is reused" in capsys.readouterr().out
    assert main(["show", str(reusing_folder), "--calls", "4", "--scheduler", "DDIMScheduler"]) == 0
    said = capsys.readouterr().out
    assert "passes: CleanUp(), InheritFeatures" in said
    assert "4 calls: " in said


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--calls", "10", "--scheduler", "HeunDiscreteScheduler"], "9 or 11 calls"),
        (["--picture", "unet.jpg"], "cannot draw a .jpg"),
        (["--timetable", "calls"], "cannot draw a file without suffix"),
    ],
)
@pytest.mark.usefixtures("nothing_loads")
def test_what_is_not_shown(given: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(MODEL), CACHE, *given]) == 2
    assert complaint in capsys.readouterr().err


def test_passes_that_look_at_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(MODEL / "unet"), "ShareWeights.similar", "--depth", "1"]) == 0
    said = capsys.readouterr()
    assert "loading" in said.err
    assert "passes: ShareWeights" in said.out
