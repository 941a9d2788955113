"""Any configuration within what is covered is traced exactly, at any sizes."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from sdgraph.errors import SdgraphError

from ..models import (
    ARCHITECTURES,
    ATTEND,
    PLAIN,
    answer,
    build,
    call_of,
    trace,
)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    levels = draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, 2, 4]))
    kinds = draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
    heads = draw(st.sampled_from([1, 2, 4]))
    config: dict[str, Any] = {
        "sample_size": draw(st.one_of(st.none(), st.integers(1, 160))),
        "in_channels": draw(st.integers(1, 9)),
        "out_channels": draw(st.integers(1, 9)),
        "block_out_channels": tuple(4 * groups * heads * draw(st.integers(1, 2)) for _ in range(levels)),
        "down_block_types": tuple(ATTEND if attend else PLAIN for attend in kinds),
        "up_block_types": tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(kinds)),
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn", None])),
        "layers_per_block": draw(st.integers(1, 2)),
        "transformer_layers_per_block": draw(st.integers(1, 2)),
        "norm_num_groups": groups,
        "attention_head_dim": heads,
        "use_linear_projection": draw(st.booleans()),
        "center_input_sample": draw(st.booleans()),
        "flip_sin_to_cos": draw(st.booleans()),
        "upcast_attention": draw(st.booleans()),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "time_cond_proj_dim": draw(st.sampled_from([None, 6])),
    }
    config |= draw(
        st.sampled_from([{}, {"num_class_embeds": 70}, *(v for k, v in ARCHITECTURES.items() if "class" in k)])
    )
    return config


@pytest.mark.law("Any configuration of a UNet is traced exactly or refused.")
@pytest.mark.slow
@hypothesis.given(
    config=configurations(),
    seed=st.integers(0, 3),
    calls=st.lists(
        st.fixed_dictionaries(
            {
                "B": st.sampled_from([1, 2, 3, 66]),
                "H": st.integers(1, 18),
                "W": st.integers(1, 18),
                "L": st.integers(1, 9),
                "timestep": st.one_of(st.integers(0, 999), st.floats(0, 999), st.just(torch.tensor(5))),
            }
        ),
        min_size=2,
        max_size=3,
    ),
)
def test_any_configuration_is_exact_or_refused(config: dict[str, Any], seed: int, calls: list[dict[str, Any]]) -> None:
    unet = build(seed=seed, **config)
    try:
        graph = trace(unet)
    except SdgraphError as error:
        raise AssertionError(f"{config} was refused") from error  # all of these are within what is covered
    assert graph.state_dict().keys() == unet.state_dict().keys()
    for sizes in calls:
        call = call_of(unet, **sizes)
        assert torch.equal(answer(unet, call), answer(graph, call))
