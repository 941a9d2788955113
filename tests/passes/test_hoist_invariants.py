"""`HoistInvariants`: what depends on the conditioning alone is computed once for each generation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from diffusers import (
    StableDiffusionPipeline,
)

import sdgraph
from sdgraph import Graph
from sdgraph.errors import NoChangeError
from sdgraph.passes import HoistInvariants
from sdgraph.schedules import Once

from ..models import answer, build, call_of, edits


def test_keys_and_values_of_the_text_are_inherited_from_the_first_call(small: Graph) -> None:
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    after = sdgraph.apply(small, HoistInvariants()).graph
    assert edits(small, after, within=attention) == [
        f"+% = inherit(%, '{attention}.to_k')",
        f"+% = inherit(%, '{attention}.to_v')",
    ]
    assert {site.schedule for site in after.sites.values()} == {Once()}


@pytest.mark.slow
def test_invariants_are_computed_once(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], whole: Graph
) -> None:
    """Bit for bit the same, and keys and values of the text only at the first call of a generation."""
    own = pipe.unet
    unet = sdgraph.apply(whole, HoistInvariants())
    names = [name for name, _ in own.named_modules()]
    assert set(unet.graph.sites) == {name for name in names if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert torch.equal(run(unet), run(own))
    assert torch.equal(run(unet, prompt="a blue star"), run(own, prompt="a blue star"))
    full, later = unet.graph.timetable(5).variants
    assert (full.calls, later.calls) == ((0,), (1, 2, 3, 4))
    text = sum(m.in_features * m.out_features for n, m in own.named_modules() if n in unet.graph.sites)
    tokens = next(symbol.nominal for symbol in unet.graph.dims.symbols if symbol.name == "L")
    assert full.macs - later.macs == text * tokens
    with pytest.raises(NoChangeError):
        sdgraph.apply(unet, HoistInvariants())


@pytest.mark.slow
def test_all_conditioning_is_constant() -> None:
    """Also what SDXL adds; a generation ends when another tensor comes, whichever, or one is edited."""
    source = build("sdxl")
    unet = sdgraph.apply(source, HoistInvariants())
    assert "add_embedding.linear_2" in unet.graph.sites
    given = call_of(source)
    added = given["added_cond_kwargs"]
    other = {**added, "time_ids": added["time_ids"] + 1}
    with torch.no_grad():
        for step, conditioning in enumerate((added, added, other, other, added, added)):
            if step == 5:
                added["text_embeds"] *= 2
            now = {**given, "timestep": 900 - step, "added_cond_kwargs": conditioning}
            assert torch.equal(answer(unet, now), answer(source, now))
