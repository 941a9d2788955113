"""`sdgraph apply`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scenes.pipeline import MODEL

import sdgraph
from sdgraph.__main__ import main

from ..models import answer, build, call_of

PRUNE = "PruneBlocks('mid_block')"


@pytest.mark.slow
def test_apply_prints_a_report_and_saves(unet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made" / "pruned"
    assert main(["apply", str(unet), f"CleanUp, {PRUNE}", "--save", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "\nPruneBlocks('mid_block')  " in said
    assert f"saved in {folder}" in said
    source, saved = build(), sdgraph.GraphUNet.from_pretrained(folder)
    assert saved.graph.removed == {"mid_block": PRUNE}
    call = call_of(source)
    assert torch.equal(answer(saved, call), answer(sdgraph.apply(source, ["CleanUp", PRUNE]), call))
    # what was saved is a source again, and is never written over
    assert main(["apply", str(folder), "PruneBlocks('up_blocks.1.attentions.1')", "--save", str(folder)]) == 2
    again = ["apply", str(folder), "PruneBlocks('up_blocks.1.attentions.1')", "--overwrite", "--save"]
    assert main([*again, str(folder)]) == 2
    assert main([*again, str(tmp_path / "again")]) == 0
    assert set(sdgraph.GraphUNet.from_pretrained(tmp_path / "again").graph.removed) == {
        "mid_block",
        "up_blocks.1.attentions.1",
    }


def test_apply_may_only_try(unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["apply", str(unet), PRUNE, "--dtype", "bfloat16", "--no-verify"]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("passes", "complaint"),
    [("PruneBlock('mid_block')", "did you mean 'PruneBlocks'"), ("CleanUp(", "cannot read the spec")],
)
@pytest.mark.usefixtures("nothing_loads")
def test_passes_are_read_before_anything_is_loaded(
    passes: str, complaint: str, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in (
        ["apply", str(MODEL), passes],
        ["export", str(MODEL), "--passes", passes, "--out", str(tmp_path / "out")],
        ["evaluate", str(MODEL), passes, "--prompts", str(prompts)],
        ["search", str(MODEL), passes, "--prompts", str(prompts), "--budget", "0.5"],
    ):
        assert main(given) == 2
        assert complaint in capsys.readouterr().err


def test_a_pass_that_fails_is_said_in_lines(unet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", str(unet), "CleanUp, PruneBlocks('mid_blocks.0')"]) == 2
    said = capsys.readouterr().err
    assert "mid_block" in said
    assert "Traceback" not in said


def test_a_folder_without_a_unet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", str(tmp_path), "CleanUp"]) == 2
    assert "neither a pipeline nor a UNet" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["apply", str(tmp_path), "CleanUp"]) == 2
    assert f"{tmp_path} cannot be loaded: " in capsys.readouterr().err
    (tmp_path / "model.onnx").write_text("")
    assert main(["apply", str(tmp_path), "CleanUp"]) == 2
    assert "is exported already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_budget_is_met_and_saved_as_plain_removals(
    unet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = sdgraph.trace(build())
    found = sdgraph.analyse_unet(whole, levels=["block"], calls=1)
    found.save(tmp_path / "analysis.json")
    passes = f"PruneToBudget(macs={1 - found.removals[0].macs / 2}, analysis='{tmp_path / 'analysis.json'}')"
    assert main(["apply", str(unet), passes, "--save", str(tmp_path / "pruned")]) == 0
    assert f"chosen by {passes}" in capsys.readouterr().out
    saved = sdgraph.GraphUNet.from_pretrained(tmp_path / "pruned").graph
    (recorded,) = saved.passes
    assert str(recorded).startswith("PruneBlocks((")
    assert saved.macs <= (1 - found.removals[0].macs / 2) * whole.macs
    assert main(["apply", str(unet), "PruneToBudget(macs=0.01, analysis='none.json')"]) == 2
    assert "none.json" in capsys.readouterr().err
