"""`Bypass`: before, at the calls that compute, and at those that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import PreconditionError, ScheduleError, ShapeError, SpecError
from sdgraph.passes import Bypass, CleanUp, HoistInvariants, InheritFeatures, PruneBlocks
from sdgraph.schedules import Drift, Range, SamplingRun, Uniform, Warm

from ..models import answer, call_of

ATTENTIONS = "**.transformer_blocks.0"


def test_a_bypassed_module_is_gone_at_some_calls_and_there_at_others(unet: Any) -> None:
    bypassing = sdgraph.apply(unet, Bypass("mid_block", Uniform(2)))
    pruned = sdgraph.apply(unet, PruneBlocks(("mid_block",)))
    prompt = torch.randn(2, 5, 24)
    with torch.no_grad():
        for number in range(4):
            call = {**call_of(unet), "timestep": torch.tensor(900 - number), "encoder_hidden_states": prompt}
            wanted = answer(pruned if number % 2 else unet, call)
            assert torch.equal(counted(bypassing, call, number), wanted)
    assert bypassing.cache_bytes() == 0  # nothing is kept


def counted(unet: GraphUNet, call: dict[str, Any], number: int) -> torch.Tensor:
    """The output of one call, as call `number` of a generation."""
    reused = frozenset(n for n, s in unet.graph.sites.items() if not s.schedule.refreshes(number, 0.0, SamplingRun(4)))
    output, fresh = unet.compute({}, reused, **call)
    assert not fresh
    return output


@pytest.mark.slow
def test_in_a_pipeline(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor]) -> None:
    """Calls come in order there; what is left out at none is the source, at all but the first the pruned UNet."""
    own = pipe.unet
    assert torch.equal(run(sdgraph.apply(own, Bypass(ATTENTIONS, Uniform(1)))), run(own))
    unet = sdgraph.apply(own, Bypass("mid_block", Uniform(3)))
    table = unet.graph.timetable(5)
    assert table.row("mid_block") == "■○○■○"
    assert "○ bypassed" in str(table)
    whole, pruned = unet.graph.macs, sdgraph.apply(own, PruneBlocks(("mid_block",))).graph.macs
    assert table.macs == 2 * whole + 3 * pruned
    assert not torch.equal(run(unet), run(own))


@pytest.mark.slow
def test_by_timestep(pipe: StableDiffusionPipeline) -> None:
    """ALTER's masks: which modules are left out depends on the timestep alone."""
    unet = sdgraph.apply(pipe.unet, Bypass(ATTENTIONS, Range(200, 600, within=Uniform(1000))))
    pipe.scheduler.set_timesteps(10)
    rows = {unet.graph.timetable(pipe.scheduler).row(name) for name in unet.graph.sites}
    assert rows == {"".join("○" if 200 < t < 600 else "■" for t in pipe.scheduler.timesteps.tolist())}


@pytest.mark.slow
def test_together_with_inheriting_and_others(pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor]) -> None:
    passes = [
        CleanUp(),
        HoistInvariants(),
        Bypass("down_blocks.0.attentions.0", Uniform(2)),
        InheritFeatures.damped(3),
    ]
    unet = sdgraph.apply(pipe.unet, passes)
    assert "forecast" in str(unet.graph.timetable(9))
    assert "bypassed" in str(unet.graph.timetable(9))
    assert run(unet).isfinite().all()


@pytest.mark.slow
def test_it_is_saved_and_loaded(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    unet = sdgraph.apply(pipe.unet, [Bypass("mid_block", Uniform(3)), InheritFeatures.damped(2)])
    unet.save_pretrained(tmp_path / "unet")
    assert torch.equal(run(GraphUNet.from_pretrained(tmp_path / "unet")), run(unet))


@pytest.mark.slow
def test_bad_input(unet: Any) -> None:
    with pytest.raises(PreconditionError, match=r"No site lies within another one(.|\n)*in mid_block"):
        sdgraph.apply(unet, Bypass(("mid_block", "mid_block.resnets.0")))
    with pytest.raises(ShapeError, match="conv_in"):  # nothing that goes in has the channels of what comes out
        sdgraph.apply(unet, Bypass("conv_in"))
    with pytest.raises(ScheduleError, match="Drift measures what a site inherits"):
        sdgraph.apply(unet, Bypass("mid_block", Drift()))
    with pytest.raises(ScheduleError, match="Drift measures what a site inherits"):
        sdgraph.apply(unet, InheritFeatures("mid_block", Warm(Drift(), first=2)))
    with pytest.raises(SpecError, match="sites is"):
        Bypass()
