"""`extra_passes.merge_tokens`, a pass that decides by values: what it computes, and that it exports."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import tomesd.merge
import torch
from extra_passes.merge_tokens import MergeTokens, unmerge

import sdgraph
from sdgraph import progress, testing
from sdgraph.errors import EditError, SpecError
from sdgraph.exporters.onnx import export, translate
from sdgraph.exporters.ort.unet import ORTUNet

from ..models import answer, build, call_of, edits


def test_attention_reads_fewer_tokens_and_gives_all(small: sdgraph.Graph) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    after = sdgraph.apply(small, [MergeTokens()]).graph
    found = edits(small, after, within=path)
    assert all(line.startswith("+") for line in found)
    assert [line for line in found if "scatter" in line] == [
        "+% = scatter_reduce(%, 1, %, %, 'mean', include_self=False)"
    ]
    assert found[-1] == "+% = gather(%, 1, %)"
    tokens = [graph.region(f"{path}.to_q").output.meta["val"].shape for graph in (small, after)]
    assert tokens == [(1, 64, 16), (1, 32, 16)]
    assert after.region(path).output.meta["val"].shape == (1, 64, 16)


@pytest.mark.parametrize("ratio", [0.5, 0.2])
def test_merges_what_the_authors_merge(ratio: float) -> None:
    """Their code, without its random choice of targets, for sizes that it does not round."""
    tokens, H, W = torch.randn(2, 6 * 10, 8), 6, 10
    merged, places = MergeTokens(ratio).merge(tokens, torch.empty(2, 1, H, W))
    gone = int(ratio * H * W)
    merge, back = tomesd.merge.bipartite_soft_matching_random2d(tokens, W, H, 2, 2, gone, no_rand=True)
    assert merged.shape[1] == H * W - gone
    # theirs counts the target that tokens are merged into as one of them, as ours does
    torch.testing.assert_close(unmerge(merged, places), back(merge(tokens)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_only_the_largest_maps_of_any_size() -> None:
    unet = build("sd15-levels")
    result = sdgraph.apply(unet, [MergeTokens()])
    edits = [edit for edit in result.report.passes[0].edits if edit.kind == "replaced"]
    assert len(edits) == 5  # two going down, three going up
    assert all(edit.path.startswith(("down_blocks.0.", "up_blocks.3.")) for edit in edits)
    for sizes in ({"B": 1, "H": 13, "W": 9}, {"B": 3, "H": 1, "W": 5}):
        call = call_of(unet, **sizes)
        difference = (answer(result, call) - answer(unet, call)).abs().max()
        assert 1e-4 < difference < 1


def test_declares_what_it_does(traced: Any) -> None:
    testing.check(MergeTokens(0.3), traced("sd15")[0])
    assert str(MergeTokens(0.3)) == "MergeTokens(0.3)"
    with pytest.raises(SpecError, match=r"ratio is 0\.75"):
        MergeTokens(0.75)
    plain = build("no-mid", down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    with pytest.raises(EditError, match="no self-attention"):
        MergeTokens().run(sdgraph.trace(plain))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.long)])
def test_exports_in_seconds_and_runs_at_any_size(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decompose(*args: Any, **options: Any) -> Any:
        raise AssertionError("the program is traced anew, with all its sizes, which takes as long as the rest")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", decompose)
    refreshed, refresh, capture = threading.Event(), progress.Bar.refresh, translate.capture

    def refreshing(bar: progress.Bar, *args: Any, **options: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            refreshed.set()
        return refresh(bar, *args, **options)

    def captured(*args: Any) -> Any:
        refreshed.clear()
        assert refreshed.wait(60), "the bar does not move within a stage"
        return capture(*args)

    monkeypatch.setattr(progress.Bar, "refresh", refreshing)
    monkeypatch.setattr(translate, "capture", captured)
    unet = sdgraph.apply(build().to(dtype), [MergeTokens()], verify=False)
    export(unet, tmp_path / "merged")
    assert refreshed.is_set()
    running = ORTUNet.from_pretrained(tmp_path / "merged", provider="CPUExecutionProvider")
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for sizes in ({"B": 1, "H": 13, "W": 9}, {"B": 3, "H": 1, "W": 6}):
        call = call_of(unet, **sizes)
        torch.testing.assert_close(answer(running, call), answer(unet, call), **tolerance)
