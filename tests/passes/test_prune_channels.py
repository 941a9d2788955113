"""PruneChannels against the source UNet with zeros in place of what is cut, and what it refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

import sdgraph
from sdgraph import Importance, WidthTimes
from sdgraph.errors import EditError, PathError, SavedError, SpecError
from sdgraph.passes import PruneChannels
from sdgraph.tuning import Tensors

from ..models import ARCHITECTURES, BASE, CROSS, KARRAS, ONE_LEVEL, answer, build, call_of, load_ip_adapter

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def unet_of(name: str) -> UNet2DConditionModel:
    if name != "karras":
        return build(name)
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**BASE, **KARRAS}).eval()


def inner(unet: UNet2DConditionModel) -> dict[str, tuple[nn.Module, int, int]]:
    """The layers inside resnets, attentions and feed-forwards that sum over their width, with slices and channels."""
    found: dict[str, tuple[nn.Module, int, int]] = {}
    for path, module in unet.named_modules():
        kind = type(module).__name__
        if "ResnetBlock" in kind:
            groups = module.norm2.num_groups
            found[path] = module.conv2, groups, module.conv2.in_channels // groups
        elif kind == "Attention":
            found[path] = module.to_out[0], module.heads, module.to_out[0].in_features // module.heads
        elif kind == "FeedForward":
            found[path] = module.net[2], module.net[2].in_features, 1
    return {path: one for path, one in found.items() if one[1] > 1}


def zeroed(unet: UNet2DConditionModel, keep: Mapping[str, tuple[int, ...]]) -> UNet2DConditionModel:
    """The same UNet whose layers do not see the slices that are cut."""
    changed = copy.deepcopy(unet)
    layers = inner(changed)
    with torch.no_grad():
        for path, slices in keep.items():
            layer, count, channels = layers[path]
            for cut in set(range(count)) - set(slices):
                layer.weight[:, cut * channels : (cut + 1) * channels] = 0
    return changed


def some(count: int) -> tuple[int, ...]:
    """Some of the numbers below a count, neither the first ones nor the last ones alone."""
    return tuple(number for number in range(count) if number % 3 != 1)


@pytest.mark.law("A UNet without some channels equals the UNet with zeros in their place, within rounding.")
@pytest.mark.parametrize(
    "name",
    [n if n in ("sd15", "sd21") else pytest.param(n, marks=pytest.mark.slow) for n in (*ARCHITECTURES, "karras")],
)
def test_the_result_equals_zeros_in_place_of_the_channels(name: str) -> None:
    unet = unet_of(name)
    keep = {path: some(count) for path, (_, count, _) in inner(unet).items()}
    pruned = sdgraph.apply(unet, PruneChannels(keep=keep), verify=False)
    expected = zeroed(unet, keep)
    assert keep
    even = {"H": 16, "W": 16} if name == "karras" else {"W": 8}  # its blocks up-sample by factors only
    odd = {"H": 16, "W": 24} if name == "karras" else {"H": 9, "W": 11}
    for sizes in (even, {"B": 1, "L": 3, **odd}):
        call = call_of(unet, **sizes)
        torch.testing.assert_close(answer(pruned, call), answer(expected, call), **CLOSE)
    assert not torch.equal(answer(pruned, call), answer(unet, call))


@pytest.mark.law(
    "Any width of the graph can be cut, also one between blocks, as if its readers had zeros for the rest."
)
@pytest.mark.parametrize("name", ["sd15", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sdxl", "upscaler"))])
def test_every_width_that_is_listed_can_be_cut(name: str) -> None:
    unet = build(name)
    whole = sdgraph.trace(unet)
    widths = whole.widths()
    assert {"time_embedding", "up_blocks.0"} <= widths.keys()
    call = call_of(unet)
    for path in widths if name == "sd15" else widths.keys() - inner(unet).keys():
        width, blind = widths[path], whole.copy()
        cut = [number for number in range(width.slices) if number not in some(width.slices)]
        for end in width.ends:
            if end.side == "in":
                layer = copy.deepcopy(blind.module(end.path))
                parts: Any = layer.weight.detach().movedim(1, 0).clone(memory_format=torch.contiguous_format)
                parts.reshape(end.copies, width.slices, -1)[:, cut] = 0
                layer.weight = nn.Parameter(parts.movedim(0, 1).contiguous())
                blind.add_module(end.path, layer)
        narrow = whole.copy()
        narrow.narrow({path: some(width.slices)})
        found, expected = (answer(sdgraph.GraphUNet(graph), call) for graph in (narrow, blind))
        torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, path=path: f"{path}: {text}")


def test_the_sizes_of_a_cut_are_those_that_were_computed_before(graph: sdgraph.Graph) -> None:
    widths = graph.widths()
    counts = {path: (width.slices + 1) // 2 for path, width in widths.items()}
    expected = widths.size(counts)
    graph.narrow({path: range(count) for path, count in counts.items()})
    assert expected == (sum(p.numel() for p in graph.parameters().values()), graph.macs)


def test_the_widths_of_a_graph_are_shown(small: sdgraph.Graph) -> None:
    widths = small.widths()
    resnet = widths["down_blocks.0.resnets.0"]
    assert (resnet.slices, resnet.kind, resnet.channels) == (4, "groups", 4)
    assert [str(end).removeprefix(f"{resnet.path}.") for end in resnet.ends] == [
        "conv1 out",
        "time_emb_proj out",
        "norm2 norm",
        "conv2 in",
    ]
    lines = {line.split("  ")[0]: line for line in str(widths).splitlines()}
    assert "4 groups of 4" in lines[resnet.path]
    assert "2 heads of 8" in lines["down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
    assert "net.0.proj out (128), net.2 in (64)" in lines["down_blocks.0.attentions.0.transformer_blocks.0.ff"]
    assert "up_blocks.0" in {one.where for one in widths.fixed if one.reason.startswith("concatenated")}
    assert sum(line.startswith("fixed: ") for line in lines) == len({one.reason for one in widths.fixed})


def test_a_budget_is_met_and_the_choice_comes_back_bit_for_bit(tmp_path: Path) -> None:
    unet = build("sd15")
    pruned = sdgraph.apply(unet, "PruneChannels(parameters=0.8, macs=0.85, multiple=4)")
    row = pruned.report.passes[0]
    assert 0.75 < row.after.parameters / row.before.parameters <= 0.8
    assert row.after.macs / row.before.macs <= 0.85
    assert "groups" in str(pruned.report.notes) + str(row.notes)
    pruned.save_pretrained(tmp_path / "unet")
    loaded = sdgraph.GraphUNet.from_pretrained(tmp_path / "unet")
    call = call_of(unet)
    assert torch.equal(answer(loaded, call), answer(pruned, call))
    assert loaded.graph.passes == pruned.graph.passes


def test_small_magnitudes_go_first() -> None:
    unet = build("sd15")
    with torch.no_grad():
        for group in (1, 2):
            for layer, dim in (("conv1", 0), ("conv2", 1)):
                weight = getattr(unet.mid_block.resnets[0], layer).weight
                weight.movedim(dim, 0)[8 * group : 8 * group + 8] *= 0.1
    pruned = sdgraph.apply(unet, "PruneChannels(parameters=0.95, where='mid_block.resnets.0')", verify=False)
    (decision,) = pruned.graph.passes[0].decisions
    assert decision.value == {"mid_block.resnets.0": "9"}


def test_what_is_left_is_a_multiple() -> None:
    pruned = sdgraph.apply(build("sd15"), "PruneChannels(parameters=0.7, multiple=16)", verify=False)
    for path, module in pruned.graph.weights.leaves():
        if path.endswith(("conv1", "to_q", "net.0.proj")):
            assert len(module.weight) % 16 == 0, path  # type: ignore[arg-type, operator]


def test_a_budget_below_the_least_possible_names_that() -> None:
    unet = build("sd15")
    with pytest.raises(SpecError, match=r"parameters=0\.1 is less than (0\.\d+), the least") as caught:
        sdgraph.apply(unet, "PruneChannels(parameters=0.1)", verify=False)
    least = float(str(caught.value).split("less than ")[1].split(",")[0])
    pruned = sdgraph.apply(unet, PruneChannels(parameters=least), verify=False)
    row = pruned.report.passes[0]
    assert row.after.parameters / row.before.parameters == pytest.approx(least, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no budget and no slices"),
        ({"macs": 0.5, "keep": {"mid_block.resnets.0": (0,)}}, "both a budget and slices"),
        ({"macs": 1.2}, "macs is 1.2"),
        ({"parameters": 0}, "parameters is 0"),
        ({"macs": 0.5, "importance": "magnitud"}, "importance is 'magnitud'"),
        ({"macs": 0.5, "multiple": 0}, "multiple is 0"),
        ({"time": 0.5}, "has no times"),
        ({"times": WidthTimes("eager"), "macs": 0.5}, "has no time"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        PruneChannels(**options)


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ({"mid_block.resnet.0": (0,)}, PathError, r"did you mean 'mid_block\.resnets\.0'"),
        ({"up_blocks.1.resnets.0.norm1": (0,)}, PathError, "cannot be cut: concatenated"),
        ({"up_blocks.1.resnets.0.conv1": (0,)}, PathError, r"part of the width 'up_blocks\.1\.resnets\.0'"),
        ({"conv_in": (0,)}, PathError, "cannot be cut: the width is that of the input sample"),
        ({"mid_block.attentions.0.proj_out": (0,)}, PathError, "cannot be cut: the width is that of the input"),
        ({"mid_block.resnets.0": (0, 4)}, EditError, "no slices of mid_block.resnets.0: 4 groups of 8"),
        ({"mid_block.resnets.0": (1, 0)}, EditError, "no slices"),
    ],
)
def test_wrong_slices_are_refused(
    graph: sdgraph.Graph, keep: dict[str, tuple[int, ...]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sdgraph.apply(graph, PruneChannels(keep=keep), verify=False)


def test_a_pruned_unet_is_no_plain_model() -> None:
    pruned = sdgraph.apply(build("sd15"), PruneChannels(keep={"mid_block.resnets.0": (0, 2)}), verify=False)
    with pytest.raises(sdgraph.errors.ModeError, match=r"no plain diffusers UNet.*mid_block\.resnets\.0"):
        pruned.to_diffusers()


# -- importance and times that were measured --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taylor(pipe: StableDiffusionPipeline) -> Importance:
    """The importance of slices of the pipeline's UNet."""
    return Importance.taylor(pipe, ["a red circle", "a blue square"], calls=2, until=600, num_inference_steps=3)


@pytest.mark.slow
def test_the_first_order_change_is_that_of_the_weights(pipe: StableDiffusionPipeline, taylor: Importance) -> None:
    """Slices whose weights are zero change nothing; the sums over slices are those of plain autograd."""
    assert {len(taylor.scores[path]) for path in taylor.scores if "attn" in path} == {2}
    assert all(score > 0 for scores in taylor.scores.values() for score in scores)
    silent = copy.copy(pipe)
    silent.unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        silent.unet.down_blocks[0].resnets[0].conv2.weight[:, :8] = 0
        for name in ("weight", "bias"):
            getattr(silent.unet.down_blocks[0].resnets[0].norm2, name)[:8] = 0
        for layer in ("conv1", "time_emb_proj"):
            getattr(silent.unet.down_blocks[0].resnets[0], layer).weight[:8] = 0
            getattr(silent.unet.down_blocks[0].resnets[0], layer).bias[:8] = 0
    changed = Importance.taylor(silent, ["a red circle"], calls=1, num_inference_steps=2)
    channels = sdgraph.trace(silent.unet).widths()["down_blocks.0.resnets.0"].channels
    scores = changed.scores["down_blocks.0.resnets.0"]
    assert not any(scores[: 8 // channels])
    assert all(scores[8 // channels :])


@pytest.mark.slow
def test_measured_importance_chooses_and_the_result_loads_without_it(
    whole: sdgraph.Graph, taylor: Importance, tmp_path: Path
) -> None:
    taylor.save(tmp_path / "scores.json")
    assert Importance.load(str(tmp_path / "scores.json")).scores == taylor.scores
    one = PruneChannels(parameters=0.9, importance=taylor)
    assert sdgraph.parse(str(one)) == (one,)
    text = f"PruneChannels(parameters=0.9, importance=Importance.load({str(tmp_path / 'scores.json')!r}))"
    pruned, read = (sdgraph.apply(whole, passes, verify=False) for passes in (one, text))
    assert pruned.graph.passes[0].decisions == read.graph.passes[0].decisions
    plain = sdgraph.apply(whole, "PruneChannels(parameters=0.9)", verify=False)
    assert pruned.graph.passes[0].decisions != plain.graph.passes[0].decisions
    pruned.save_pretrained(tmp_path / "unet")
    recipe = (tmp_path / "unet" / "sdgraph.json").read_text()
    assert "scores.json" not in recipe
    assert sdgraph.GraphUNet.from_pretrained(tmp_path / "unet").graph.passes == pruned.graph.passes


@pytest.mark.slow
def test_wrong_measurements_are_refused(pipe: StableDiffusionPipeline, taylor: Importance, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no call of the generation has a timestep of 0"):
        Importance.taylor(pipe, ["a red circle"], until=0, num_inference_steps=2)
    with pytest.raises(EditError, match=r"4 slices"):
        sdgraph.apply(build("sd15"), PruneChannels(macs=0.9, importance=taylor), verify=False)
    with pytest.raises(EditError, match=r"WidthTimes\('eager'\) has no times of down_blocks"):
        sdgraph.apply(build("sd15"), PruneChannels(time=0.9, times=WidthTimes("eager")), verify=False)
    (tmp_path / "file.json").write_text('{"format": 1, "criterion": 3, "scores": {}}')
    for kind in (Importance, WidthTimes):
        with pytest.raises(SavedError, match=r"this is no importance|these are no times|format"):
            kind.load(str(tmp_path / "file.json"))
        with pytest.raises(SavedError):
            kind.load(str(tmp_path / "none.json"))


def test_a_budget_of_time_follows_the_measured_steps() -> None:
    """Only one layer is faster, and only with 32 pairs or fewer: these are cut at once."""
    unet = build("sd15")
    graph = sdgraph.trace(unet)
    fast = "mid_block.attentions.0.transformer_blocks.0.ff"
    table = {
        path: {str(count): 1.0 - 0.5 * (path == fast and count <= 32) for count in (1, 32, 33, width.slices)}
        for path, width in graph.widths().items()
        if path.endswith(".ff")
    }
    times = WidthTimes("by hand", 10.0, table)
    pruned = sdgraph.apply(graph, PruneChannels(time=0.95, times=times, where="**.ff"), verify=False)
    (decision,) = pruned.graph.passes[0].decisions
    assert {path: bin(int(bits, 16)).count("1") for path, bits in decision.value.items()} == {fast: 32}
    with pytest.raises(SpecError, match=r"time=0\.9 is less than 0\.95"):
        sdgraph.apply(graph, PruneChannels(time=0.9, times=times, where="**.ff"), verify=False)


@pytest.mark.slow
def test_times_are_measured_for_each_region_and_saved(tmp_path: Path) -> None:
    unet = build("sd15")
    times = WidthTimes.measure(unet, points=2, turns=1, progress=False, H=8, W=8)
    widths = sdgraph.trace(unet).widths()
    assert times.table.keys() >= inner(unet).keys()
    assert all(
        {int(count) for count in each} == {(widths[path].slices + 1) // 2, widths[path].slices}
        for path, each in times.table.items()
    )
    times.save(tmp_path / "times.json")
    loaded = WidthTimes.load(str(tmp_path / "times.json"))
    assert (loaded, loaded.whole, loaded.table) == (times, times.whole, times.table)
    assert str(times) == "WidthTimes('eager on cpu at B=1, H=8, W=8, L=77')"


# -- together with the rest of sdgraph --------------------------------------------------------------------------------

SOME = PruneChannels(
    keep={
        "mid_block.resnets.0": (0, 2),
        "down_blocks.0.resnets.0": (1, 3),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1": (1,),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2": (0,),
        "up_blocks.1.attentions.0.transformer_blocks.0.ff": tuple(range(0, 64, 3)),
    }
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        "CleanUp",
        "HoistInvariants",
        "InheritFeatures('mid_block.resnets.0')",
        "InheritFeatures.deep_cache(2)",
        "Bypass('mid_block', Uniform(2))",
        "PruneBlocks('up_blocks.1.attentions.1')",
        "MECondConv('up_blocks.0.resnets.0.conv2', donors='copies')",
    ],
)
def test_orders_of_passes_give_one_result(unet: UNet2DConditionModel, other: str) -> None:
    call = call_of(unet)
    before, after = (sdgraph.apply(unet, [*order], verify=False) for order in ((other, SOME), (SOME, other)))
    for timestep in (900, 600):
        torch.testing.assert_close(
            answer(before, {**call, "timestep": timestep}), answer(after, {**call, "timestep": timestep}), **CLOSE
        )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("MECondConv('mid_block.resnets.0.conv2', donors='copies')", "is not followed"),
        ("Overparameterize('mid_block.resnets.0.conv1')", "product is not followed"),
        ("ShareWeights((('mid_block.resnets.0', 'mid_block.resnets.1'),))", "has no width for itself"),
    ],
)
def test_layers_that_another_pass_rewrote_are_refused(graph: sdgraph.Graph, other: str, message: str) -> None:
    one = PruneChannels(keep={"mid_block.resnets.0": (0, 2)})
    with pytest.raises(PathError, match=rf"mid_block\.resnets\.0.*{message}"):
        sdgraph.apply(graph, [other, one], verify=False)


def test_layers_with_one_set_of_weights_are_cut_together(graph: sdgraph.Graph) -> None:
    shared = sdgraph.apply(graph, "ShareWeights((('mid_block.resnets.0', 'mid_block.resnets.1'),))", verify=False)
    (end,) = [end for end in shared.graph.widths()["mid_block"].ends if end.path == "mid_block.resnets.0.conv2"]
    assert end.side == "in"
    both = sdgraph.apply(shared, PruneChannels(keep={"mid_block": (0, 3)}), verify=False)
    apart = sdgraph.apply(
        graph,
        [
            PruneChannels(keep={"mid_block.resnets.0": (0, 3), "mid_block.resnets.1": (0, 3)}),
            "ShareWeights((('mid_block.resnets.0', 'mid_block.resnets.1'),))",
        ],
        verify=False,
    )
    sample = call_of(build("sd15"))
    torch.testing.assert_close(answer(both, sample), answer(apart, sample), **CLOSE)


def test_one_tensor_of_two_layers_is_refused() -> None:
    unet = build("sd15")
    unet.mid_block.resnets[1].conv2.weight = unet.mid_block.resnets[0].conv2.weight
    with pytest.raises(PathError, match=r"one tensor is the weight of mid_block\.resnets\.0\.conv2\.weight and"):
        sdgraph.apply(unet, PruneChannels(keep={"mid_block.resnets.0": (0,)}), verify=False)


@pytest.mark.slow
def test_a_folded_layer_is_cut_again(graph: sdgraph.Graph) -> None:
    one = PruneChannels(keep={"mid_block.resnets.0": (0, 2)})
    folded = sdgraph.apply(graph, ["Overparameterize('mid_block.resnets.0.conv1')", "Fold", one], verify=False)
    wide = sdgraph.apply(graph, [one, "Overparameterize('mid_block.resnets.0.conv1')"], verify=False)
    call = call_of(build("sd15"))
    torch.testing.assert_close(answer(folded, call), answer(wide, call), **CLOSE)


@pytest.mark.slow
def test_residuals_of_a_controlnet_are_added_where_they_were(unet: UNet2DConditionModel) -> None:
    pruned, square = sdgraph.apply(unet, SOME, verify=False), call_of(unet, B=1, H=8, W=8)
    down = [torch.randn(1, *s) for s in ((16, 8, 8), (16, 8, 8), (16, 4, 4), (32, 4, 4))]
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": torch.randn(1, 32, 4, 4)}
    expected = zeroed(unet, SOME.keep or {})
    torch.testing.assert_close(answer(pruned, square | residuals), answer(expected, square | residuals), **CLOSE)


@pytest.mark.slow
def test_a_pipeline_runs_with_fewer_channels(whole: sdgraph.Graph, run: Callable[..., torch.Tensor]) -> None:
    pruned = sdgraph.apply(whole, "PruneChannels(parameters=0.8), InheritFeatures.deep_cache(2)", verify=False)
    assert run(pruned).isfinite().all()


@pytest.mark.slow
def test_an_image_prompt_meets_the_heads_that_are_left(unet: UNet2DConditionModel) -> None:
    """The adapter's own projections lose the heads that the attention has lost."""
    prompted = load_ip_adapter(copy.deepcopy(unet), "base")
    pruned, expected = sdgraph.apply(prompted, SOME, verify=False), zeroed(prompted, SOME.keep or {})
    call = call_of(unet) | {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 14)]}}
    torch.testing.assert_close(answer(pruned, call), answer(expected, call), **CLOSE)


@pytest.mark.slow
def test_an_export_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from sdgraph.exporters import onnx
    from sdgraph.exporters.ort import ORTUNet

    unet = build(**ONE_LEVEL)
    pruned = sdgraph.apply(unet, "PruneChannels(parameters=0.7, multiple=4)", verify=False)
    onnx.export(pruned, tmp_path / "bundle", progress=False)
    loaded = ORTUNet.from_pretrained(tmp_path / "bundle", provider="CPUExecutionProvider")
    call = call_of(unet)
    torch.testing.assert_close(torch.as_tensor(answer(loaded, call)), answer(pruned, call), **CLOSE)


@pytest.mark.slow
def test_it_is_tuned(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    data = Tensors(
        torch.randn(4, 4, 8, 8, generator=draw),
        {"encoder_hidden_states": torch.randn(4, 5, CROSS, generator=draw)},
        {"encoder_hidden_states": torch.zeros(5, CROSS)},
    )
    student = sdgraph.apply(unet, "PruneChannels(parameters=0.8)", verify=False)
    tuned, _ = sdgraph.tune(
        student, unet, data, scheduler=DDPMScheduler(), max_train_steps=2, train_batch_size=2, report_to="none",
        output_dir=tmp_path / "run", learning_rate=1e-3,
    )  # fmt: skip
    assert tuned.graph.passes == student.graph.passes
    assert not torch.equal(answer(tuned, call_of(unet)), answer(student, call_of(unet)))


@pytest.mark.full
def test_stable_diffusion_is_pruned_at_full_size() -> None:
    """With the text of the decision below 16 kB."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280))
    unet = unet.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(0, 0.02).add_(parameter.ndim == 1)
    pruned = sdgraph.apply(unet, "PruneChannels(macs=0.7)", verify=False)
    (decision,) = pruned.graph.passes[0].decisions
    assert len(json.dumps(decision.value)) < 16_000
    row = pruned.report.passes[0]
    assert 0.69 < row.after.macs / row.before.macs <= 0.7
    call = {"sample": torch.randn(1, 4, 16, 16), "timestep": 7, "encoder_hidden_states": torch.randn(1, 5, 768)}
    found, layers = answer(pruned, call), inner(unet)
    with torch.no_grad():
        for path, bits in decision.value.items():
            layer, count, channels = layers[path]
            for cut in (number for number in range(count) if not int(bits, 16) >> number & 1):
                layer.weight[:, cut * channels : (cut + 1) * channels] = 0
    torch.testing.assert_close(found, answer(unet, call), rtol=1e-3, atol=1e-4)
