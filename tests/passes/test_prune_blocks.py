"""PruneBlocks against plain diffusers models built from BK-SDM's own mapping, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph.compiler.runner import run_pass
from sdgraph.errors import EditError, ModeError, PathError, ShapeError, SpecError
from sdgraph.frontend.capture import capture
from sdgraph.passes import PruneBlocks

from ..models import answer, build, call_of, edits

PRESETS = ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")
ARCHITECTURES = {
    "sd15": {},
    "sd21": {"use_linear_projection": True, "attention_head_dim": [2, 2, 4, 4]},
    "inpaint": {"in_channels": 9},
    "two levels": {
        "block_out_channels": (32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}


def student(teacher: UNet2DConditionModel, preset: str) -> UNet2DConditionModel:
    """The plain model BK-SDM trains, with the weights it starts from; written from BK-SDM, not from our pass."""
    config = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
    tiny = preset == "bk-sdm-tiny"
    config["layers_per_block"] = 1
    if preset != "bk-sdm-base":
        config["mid_block_type"] = None
    if tiny:
        for key in ("block_out_channels", "down_block_types", "attention_head_dim"):
            if isinstance(config[key], list | tuple):
                config[key] = config[key][:-1]
        config["up_block_types"] = config["up_block_types"][1:]
    plain = UNet2DConditionModel.from_config(config).eval()
    weights, mapped = teacher.state_dict(), {}
    for name in plain.state_dict():
        parts = name.split(".")
        if parts[0] == "up_blocks":
            if parts[2] in ("resnets", "attentions") and parts[3] == "1":
                parts[3] = "2"
            if tiny:
                parts[1] = str(int(parts[1]) + 1)
        mapped[name] = weights[".".join(parts)]
    plain.load_state_dict(mapped)
    return plain


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return build("sd15-levels")


@pytest.fixture(scope="module")
def whole(unet: UNet2DConditionModel) -> sdgraph.Graph:
    return sdgraph.trace(unet)


def test_a_resnet_is_removed_and_its_input_goes_on(small: sdgraph.Graph) -> None:
    path = "down_blocks.0.resnets.0"
    after = sdgraph.apply(small, PruneBlocks(path)).graph
    assert edits(small, after, within="down_blocks.0") == [
        "-% = resnets.0.norm1(%)",
        "-% = resnets.0.nonlinearity(%)",
        "-% = resnets.0.conv1(%)",
        "-% = resnets.0.nonlinearity(%)",
        "-% = resnets.0.time_emb_proj(%)",
        "-% = %[:, :, None, None]",
        "-% = add(%, %)",
        "-% = resnets.0.norm2(%)",
        "-% = resnets.0.nonlinearity(%)",
        "-% = resnets.0.dropout(%)",
        "-% = resnets.0.conv2(%)",
        "-% = add(%, %)",
        "-% = div(%, 1.0)",
    ]
    assert after.region("down_blocks.0.attentions.0").main_input is after.region("conv_in").output
    assert small.parameters().keys() - after.parameters().keys() == {n for n in small.parameters() if path in n}


@pytest.mark.law("A BK-SDM preset equals the plain model of that shape, bit for bit.")
@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", [n if n == "sd15" else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES])
def test_a_preset_equals_the_plain_model_bit_for_bit(name: str, preset: str) -> None:
    teacher = build("sd15-levels", **ARCHITECTURES[name])
    expected = student(teacher, preset)
    pruned = sdgraph.apply(teacher, [PruneBlocks(preset)], verify=name == "sd15")
    back = pruned.to_diffusers()
    assert type(back) is UNet2DConditionModel
    assert back.state_dict().keys() == expected.state_dict().keys()
    for sizes in ({"B": 2, "H": 8, "W": 16}, {"B": 1, "H": 9, "W": 11, "L": 3}):
        call = call_of(teacher, **sizes)
        assert torch.equal(answer(pruned, call), answer(expected, call))
        assert torch.equal(answer(back, call), answer(expected, call))


@pytest.mark.slow
def test_a_preset_after_clean_up_still_goes_back_to_diffusers(unet: UNet2DConditionModel) -> None:
    back = sdgraph.apply(unet, "CleanUp, PruneBlocks('bk-sdm-small')").to_diffusers()
    call = call_of(unet)
    assert torch.equal(answer(back, call), answer(student(unet, "bk-sdm-small"), call))


@pytest.mark.slow
def test_the_plain_model_has_weights_of_its_own(unet: UNet2DConditionModel) -> None:
    back = sdgraph.apply(unet, [], verify=False).to_diffusers()
    with torch.no_grad():
        back.conv_in.weight.zero_()
    assert unet.conv_in.weight.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "down_blocks.0.resnets.0",
        "down_blocks.1.resnets.1",
        "down_blocks.2.resnets.0",  # its channels change: the shortcut stays
        "up_blocks.1.resnets.1",  # goes together with its skip
        "up_blocks.2.resnets.0",  # its channels change: the shortcut stays
        "up_blocks.2.resnets.2",  # goes together with its skip
        "down_blocks.1.attentions.0",
        "up_blocks.3.attentions.2",
        "mid_block.attentions.0.transformer_blocks.0",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1",
        "up_blocks.3.attentions.0.transformer_blocks.0.attn2",
        "mid_block.attentions.0.transformer_blocks.0.ff",
        "mid_block.resnets.1",
        "mid_block",
        "down_blocks.3",
    ],
)
def test_any_region_can_go_alone(unet: UNet2DConditionModel, whole: sdgraph.Graph, path: str) -> None:
    pruned = sdgraph.apply(whole, [PruneBlocks((path,))])
    left = [p for p in pruned.graph.paths() if p == path or p.startswith(f"{path}.")]
    keeps_shortcut = path in ("down_blocks.2.resnets.0", "up_blocks.2.resnets.0")
    assert left == ([path, f"{path}.conv_shortcut"] if keeps_shortcut else [])
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in unet.parameters())
    for sizes in ({"B": 2, "H": 8, "W": 16}, {"B": 1, "H": 7, "W": 9}):
        assert answer(pruned, call_of(unet, **sizes)).isfinite().all()


@pytest.mark.slow
def test_what_takes_the_place_of_a_unit_is_its_residual() -> None:
    """Pruning attn2 and the feed-forward equals zeroing the last projections of both, up to nothing."""
    unet = build("sd15")
    zeroed = build("sd15")
    block = zeroed.down_blocks[0].attentions[0].transformer_blocks[0]
    with torch.no_grad():
        for layer in (block.attn2.to_out[0], block.ff.net[2]):
            layer.weight.zero_()
            layer.bias.zero_()
    base = "down_blocks.0.attentions.0.transformer_blocks.0"
    pruned = sdgraph.apply(unet, [PruneBlocks((f"{base}.attn2", f"{base}.ff"))])
    call = call_of(unet)
    assert torch.equal(answer(pruned, call), answer(zeroed, call))


def test_a_resnet_leaves_its_shortcut_where_channels_change() -> None:
    unet, zeroed = build("sd15"), build("sd15")
    with torch.no_grad():
        zeroed.down_blocks[1].resnets[0].conv2.weight.zero_()
        zeroed.down_blocks[1].resnets[0].conv2.bias.zero_()
    pruned = sdgraph.apply(unet, [PruneBlocks("down_blocks.1.resnets.0")])
    call = call_of(unet)
    assert torch.equal(answer(pruned, call), answer(zeroed, call))
    assert "down_blocks.1.resnets.0.conv_shortcut.weight" in pruned.state_dict()


@pytest.mark.slow
def test_patterns_and_groups(unet: UNet2DConditionModel) -> None:
    pruned = sdgraph.apply(
        unet,
        "PruneBlocks(('down_blocks.*.attentions.1', 'up_blocks.0', 'down_blocks.3', "
        "'down_blocks.2.downsamplers.0', 'mid_block'))",
    )
    left = pruned.graph.paths()
    assert not [p for p in left if p.startswith(("mid_block", "up_blocks.0", "down_blocks.3"))]
    assert not [p for p in left if p.startswith("down_blocks.") and ".attentions.1" in p]
    assert answer(pruned, call_of(unet)).isfinite().all()


@pytest.mark.slow
def test_all_attention_of_a_level_gone_is_a_plain_block(unet: UNet2DConditionModel) -> None:
    pruned = sdgraph.apply(unet, "PruneBlocks(('down_blocks.1.attentions.*', 'up_blocks.2.attentions.*'))")
    back = pruned.to_diffusers()
    assert back.config.down_block_types[1] == "DownBlock2D"
    assert back.config.up_block_types[2] == "UpBlock2D"
    call = call_of(unet)
    assert torch.equal(answer(back, call), answer(pruned, call))


@pytest.mark.slow
def test_no_plain_model_says_why(unet: UNet2DConditionModel) -> None:
    pruned = sdgraph.apply(unet, "PruneBlocks('down_blocks.0.attentions.0.transformer_blocks.0.attn2')")
    with pytest.raises(ModeError, match="no plain diffusers UNet") as caught:
        pruned.to_diffusers()
    assert "down_blocks.0" in str(caught.value)


@pytest.mark.slow
def test_controlnet_residuals_go_where_they_went_before(unet: UNet2DConditionModel) -> None:
    """With a skip's down layer pruned, its residual is still added to what now flows over that skip."""
    pruned = sdgraph.apply(unet, "PruneBlocks('down_blocks.1.attentions.1')")
    shapes = {}
    for spec in pruned.graph.inputs:
        if spec.shape is None:
            node = pruned.graph.input(spec.name)
            shapes[spec.name] = node.meta["val"].shape[1:]
    down = tuple(torch.zeros(1, *shapes[f"down_block_additional_residual_{i}"]) for i in range(12))
    mid = torch.zeros(1, *shapes["mid_block_additional_residual"])
    square = call_of(unet, B=1, H=8, W=8)
    plain = answer(pruned, square)
    assert torch.equal(
        answer(pruned, square | {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}), plain
    )
    changed = [*down]
    changed[5] = torch.ones_like(down[5])
    moved = answer(
        pruned, square | {"down_block_additional_residuals": tuple(changed), "mid_block_additional_residual": mid}
    )
    assert not torch.equal(moved, plain)


@pytest.mark.slow
def test_unknown_paths_name_the_nearest(unet: UNet2DConditionModel) -> None:
    with pytest.raises(PathError, match=r"did you mean 'up_blocks\.1\.resnets\.0'"):
        sdgraph.apply(unet, "PruneBlocks('up_blocks.1.resnet.0')", verify=False)
    with pytest.raises(PathError, match="no module matches"):
        sdgraph.apply(unet, "PruneBlocks('up_blocks.*.attention.0')", verify=False)
    with pytest.raises(SpecError, match="did you mean 'bk-sdm-tiny'"):
        PruneBlocks("bk-sdm-tinny")
    with pytest.raises(SpecError, match=r"blocks is \(\)"):
        PruneBlocks(())


@pytest.mark.slow
def test_inconsistent_shapes_are_refused_with_both_and_where(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ShapeError) as caught:
        sdgraph.apply(unet, "PruneBlocks('up_blocks.0.upsamplers.0')", verify=False)
    message = str(caught.value)
    assert "B×32×H/8×W/8" in message
    assert "B×32×H/4×W/4" in message
    assert "up_blocks.1" in message
    with pytest.raises(ShapeError, match=r"conv_in.*B×16×H×W"):
        sdgraph.apply(unet, "PruneBlocks('conv_in')", verify=False)


@pytest.mark.slow
def test_pruned_twice_is_refused(unet: UNet2DConditionModel) -> None:
    once = sdgraph.apply(unet, "PruneBlocks('bk-sdm-base')", verify=False)
    with pytest.raises(PathError, match="pruned already"):
        sdgraph.apply(once, "PruneBlocks('bk-sdm-base')", verify=False)
    with pytest.raises(PathError, match=r"removed by PruneBlocks\('bk-sdm-base'\)"):
        sdgraph.apply(once, "PruneBlocks('down_blocks.0.resnets.1')", verify=False)
    twice = sdgraph.apply(once, "PruneBlocks('mid_block')", verify=False)
    call = call_of(unet)
    assert torch.equal(answer(twice, call), answer(student(unet, "bk-sdm-small"), call))


def test_a_preset_needs_two_layers_per_block() -> None:
    with pytest.raises(EditError, match="two layers per block"):
        sdgraph.apply(build("sd15"), "PruneBlocks('bk-sdm-base')", verify=False)


@pytest.mark.slow
def test_tiny_needs_two_inner_levels_of_one_width() -> None:
    """As SD's are: the level that becomes innermost must give what the removed one gave."""
    unet = build("sd15", layers_per_block=2)  # 16 and 32 channels
    with pytest.raises(ShapeError, match=r"down_blocks\.1"):
        sdgraph.apply(unet, "PruneBlocks('bk-sdm-tiny')", verify=False)


@pytest.mark.slow
def test_the_report_counts(unet: UNet2DConditionModel) -> None:
    report = sdgraph.apply(unet, "PruneBlocks('bk-sdm-base')").report
    (row,) = report.passes
    assert row.after.parameters == sum(p.numel() for p in student(unet, "bk-sdm-base").parameters())
    assert row.after.macs < row.before.macs
    assert row.difference is not None
    assert row.difference > 0
    assert "erased down_blocks.0.resnets.1" in map(str, row.edits)
    assert "bk-sdm-base" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "millions"), [("bk-sdm-base", 579.4), ("bk-sdm-small", 482.4), ("bk-sdm-tiny", 323.4)]
)
def test_parameters_at_full_size(preset: str, millions: float) -> None:
    """BK-SDM's published parameter counts, on the SD-1.5 configuration (without numbers, on the meta device)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280))
    graph, _ = run_pass(PruneBlocks(preset), capture(unet), verify=False)
    assert sum(p.numel() for p in graph.parameters().values()) / 1e6 == pytest.approx(millions, abs=0.1)
