"""ME-CondConv: nothing changes at first, training moves it, and the experts are what pruning took out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import EditError, ModeError, PathError, PreconditionError, SpecError
from sdgraph.passes import InheritFeatures, MECondConv, PruneBlocks
from sdgraph.passes.conditional_conv import ConditionalConv2d, Mixture, conditional_conv2d, convolve
from sdgraph.schedules import Uniform

from ..models import ONE_LEVEL, answer, build, call_of, edits

PRUNE = PruneBlocks("bk-sdm-base")


def moved(unet: GraphUNet, seed: int = 0) -> GraphUNet:
    """With experts and routing as training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".routing." in name or ".mix." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return unet


def test_a_kernel_is_mixed_from_experts_by_the_timestep(small: sdgraph.Graph) -> None:
    after = sdgraph.apply(small, MECondConv("up_blocks.0.resnets.1.conv2", donors="copies")).graph
    assert edits(small, after, within="up_blocks.0.resnets.1") == [
        "-% = conv2(%)",
        "+% = per_call(%, timestep)",  # the embedding of the timestep, for the whole batch
        "+% = silu(%, inplace=False)",
        "+% = conv2.routing(%)",
        "+% = div(%, conv2.temperature)",
        "+% = softmax(%, dim=1, _stacklevel=3)",
        "+% = sub(%, 0.25)",  # nothing at first: four experts have equal shares
        "+% = %[:, :1]",
        "+% = flatten(conv2.weight)",
        "+% = mul(%, %)",
        "+% = %[:, 1:]",
        "+% = matmul(%, conv2.mix.weight)",
        "+% = add(%, %)",
        "+% = reshape(%, -1, 16, 16, 3, 3)",
        "+% = %[:, :1]",
        "+% = flatten(conv2.bias)",
        "+% = mul(%, %)",
        "+% = %[:, 1:]",
        "+% = matmul(%, conv2.mix.bias)",
        "+% = add(%, %)",
        "+% = reshape(%, -1, 16)",
        "+% = convolve(%, conv2.weight, conv2.bias, %, %, ((1, 1), (1, 1), (1, 1), 1))",
    ]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "kernel", "bias"), [(1, 3, True), (2, 3, True), (1, 1, False)])
def test_kernels_are_sums_of_the_experts(stride: int, kernel: int, bias: bool, groups: int) -> None:
    """Against convolving with each expert, sample by sample."""
    convs = [nn.Conv2d(4, 6, kernel, stride, kernel // 2, groups=groups, bias=bias) for _ in range(3)]
    x, gates = torch.randn(5, 4, 9, 7), torch.randn(5, 3)
    first, options = convs[0], (convs[0].stride, convs[0].padding, convs[0].dilation, groups)
    expected = first(x) + sum(gates[:, k, None, None, None] * conv(x) for k, conv in enumerate(convs))
    mix = Mixture(convs, 3)
    given = (first.weight, first.bias)
    torch.testing.assert_close(
        conditional_conv2d(x, gates, *given, mix.weight, mix.bias, options), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(convolve(x, *given, *mix(gates, *given), options), expected, rtol=1e-4, atol=1e-5)
    one = first(x) + sum(gates[0, k] * conv(x) for k, conv in enumerate(convs))
    torch.testing.assert_close(convolve(x, *given, *mix(gates[:1], *given), options), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("experts", "donors"), [(2, 0), (4, 0), (4, 1), (4, 3)])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_it_starts_as_the_convolution_itself(gate: str, experts: int, donors: int) -> None:
    """Bit for bit, and training equals that of separate convolutions: the routing moves, and then the experts."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    module = ConditionalConv2d([conv, *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(donors))], experts, 8, gate, 2.0)
    x, embedding, timestep = torch.randn(2, 4, 8, 8), torch.randn(2, 8), torch.tensor([7])
    assert torch.equal(module(x, embedding, timestep), conv(x))
    target, before, plain = torch.randn(2, 4, 8, 8), module.mix.weight.clone(), copy.deepcopy(module)

    def separate() -> torch.Tensor:
        assert plain.mix.bias is not None
        gates = plain.gates(F.silu(embedding[:1]))[0]
        kernels = [plain.weight, *plain.mix.weight.unflatten(1, conv.weight.shape)]
        parts = [F.conv2d(x, *each, padding=1) for each in zip(kernels, [plain.bias, *plain.mix.bias], strict=True)]
        return parts[0] + sum(gate * part for gate, part in zip(gates, parts, strict=True))

    for trained, forward in ((module, lambda: module(x, embedding, timestep)), (plain, separate)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(forward(), target).backward()
            optimizer.step()
    for (name, value), expected in zip(module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)
    assert module.routing.weight.abs().max() > 0
    assert not torch.equal(module.mix.weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["timestep", "input"])
def test_nothing_changes_at_first_and_all_calls_agree_later(routing: str) -> None:
    source = build("sd15-levels")
    pruned = sdgraph.apply(source, PRUNE)
    unet = sdgraph.apply(source, [PRUNE, MECondConv(routing=routing)])
    call = call_of(source, B=3)
    torch.testing.assert_close(answer(unet, call), answer(pruned, call), rtol=1e-4, atol=1e-5)
    if routing == "timestep":
        assert torch.equal(answer(unet, call), answer(pruned, call))
    moved(unet)
    together = answer(unet, call)
    assert not torch.allclose(together, answer(pruned, call), rtol=1e-2, atol=1e-3)
    for i in range(3):
        one = {**call, **{name: call[name][i : i + 1] for name in ("sample", "encoder_hidden_states")}}
        torch.testing.assert_close(answer(unet, one), together[i : i + 1], rtol=1e-4, atol=1e-5)


CONVOLUTIONS = ("conv_in", "conv_out", "**.conv", "**.conv1", "**.conv2", "**.conv_shortcut", "**.proj_in")
TIMESTEPS = {"one": 7, "the same for each sample": (7, 7, 7), "of each sample": (3, 500, 900)}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 8, *(pytest.param(count, marks=pytest.mark.long) for count in (4, 7, 9))])
def test_by_timestep_nothing_changes_at_first_whatever_the_model(
    channels: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Bit for bit: a convolution with more groups rounds otherwise for some numbers of channels."""
    source = build(in_channels=channels, out_channels=min(channels, 4))
    nn.Module.to(source, dtype=dtype, memory_format=layout)
    unet = sdgraph.apply(source, MECondConv(CONVOLUTIONS, 3 + channels % 2, donors="copies"))  # which verifies it
    assert unet.report.passes[0].contract == "EXACT"
    for B, (H, W) in ((1, (8, 12)), (2, (7, 5)), (3, (2, 4))):
        for timestep in TIMESTEPS.values():
            each = torch.tensor(timestep[:B]) if isinstance(timestep, tuple) else timestep
            call = call_of(source, B=B, H=H, W=W, timestep=each)
            assert torch.equal(answer(unet, call), answer(source, call)), (B, H, W, timestep)


def test_nothing_changes_at_first_where_products_are_rounded() -> None:
    """Matrix products in a lower precision, as users of tensor cores set it, round no kernel."""
    source = build(in_channels=9)
    torch.set_float32_matmul_precision("medium")
    try:
        report = sdgraph.apply(source, MECondConv(CONVOLUTIONS, donors="copies")).report
    finally:
        torch.set_float32_matmul_precision("highest")
    assert report.passes[0].difference is not None  # it was compared, and is within the bounds of the contract


def test_no_plain_model_has_its_experts() -> None:
    """Although it computes the same at first."""
    unet = sdgraph.apply(build(), MECondConv("mid_block.resnets.0.conv1", donors="copies"))
    with pytest.raises(ModeError, match=r"no place for 'mid_block.resnets.0.conv1.(mix|routing).weight'"):
        unet.to_diffusers()


def test_it_may_be_laid_out_otherwise() -> None:
    source = build()
    unet = moved(sdgraph.apply(source, MECondConv(CONVOLUTIONS, donors="copies")))
    call = call_of(source)
    expected = answer(unet, call)
    unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(answer(unet, call), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_sample_may_have_its_own_timestep() -> None:
    """As in training; then every sample has its own kernel."""
    source = build()
    unet = moved(sdgraph.apply(source, MECondConv("**.conv2", donors="copies")))
    call = call_of(source, B=3, timestep=torch.tensor([3, 500, 900]))
    together = answer(unet, call)
    for i, timestep in enumerate((3, 500, 900)):
        one = {name: call[name][i : i + 1] for name in ("sample", "encoder_hidden_states")}
        torch.testing.assert_close(
            answer(unet, {**one, "timestep": timestep}), together[i : i + 1], rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_experts_are_what_was_pruned() -> None:
    source = build("sd15-levels")
    unet = sdgraph.apply(source, [PRUNE, MECondConv()])
    pruned = sdgraph.apply(source, PRUNE)
    kept = {name for name, _ in pruned.named_parameters()}
    removed = {n: m for n, m in source.named_modules() if isinstance(m, nn.Conv2d) and f"{n}.weight" not in kept}
    used = 0
    for name, parameter in unet.named_parameters():
        if name.endswith(".mix.weight"):
            own = unet.get_parameter(name.replace(".mix.", "."))
            assert torch.equal(own, pruned.get_parameter(name.replace(".mix.", ".")))
            for expert in parameter:
                inherited = [n for n, m in removed.items() if torch.equal(m.weight.flatten(), expert)]
                used += bool(inherited)
                assert inherited or torch.equal(expert[expert != 0], own.flatten()[expert != 0])
    assert used >= 4
    told = " ".join(unet.report.passes[1].notes)
    assert "experts from" in told
    assert "slices of its kernel" in told


@pytest.mark.slow
def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    source = build("sd15-levels")
    unet = moved(sdgraph.apply(source, [PRUNE, MECondConv(experts=3, gate="sigmoid")]))
    unet.save_pretrained(tmp_path / "saved")
    again = GraphUNet.from_pretrained(tmp_path / "saved")
    call = call_of(source)
    assert torch.equal(answer(again, call), answer(unet, call))


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["timestep", "input"])
def test_it_is_exported(routing: str, tmp_path: Path) -> None:
    """With parity at every batch; one timestep for a call, which the exported model insists on."""
    source = build(**ONE_LEVEL)
    unet = moved(sdgraph.apply(source, MECondConv("**.conv2", routing=routing, donors="copies")))
    sdgraph.exporters.onnx.export(unet, tmp_path / "onnx")
    running = sdgraph.exporters.ort.ORTUNet.from_pretrained(tmp_path / "onnx", provider="CPUExecutionProvider")
    for B in (1, 3):
        call = call_of(source, B=B, timestep=torch.tensor([400]))
        torch.testing.assert_close(answer(running, call), answer(unet, call), rtol=1e-3, atol=1e-4)
    if routing == "timestep":
        with pytest.raises(sdgraph.errors.CallError, match="timestep"):
            answer(running, call_of(source, B=2, timestep=torch.tensor([3, 900])))


@pytest.mark.slow
def test_a_call_that_does_not_need_it_does_not_mix_it() -> None:
    unet = sdgraph.apply(
        build("sd15-levels"), [MECondConv("down_blocks.2.**.conv2", donors="copies"), InheritFeatures.deep_cache(2, 0)]
    )
    (site,) = unet.graph.sites
    given = frozenset(i.name for i in unet.graph.inputs if not i.optional)
    mixing = [
        n for n in unet.variant(given, frozenset([site])).graph.nodes if n.target is convolve or ".mix." in str(n)
    ]
    assert len(mixing) == 0
    assert sum(n.target is convolve for n in unet.variant(given).graph.nodes) == 2


def test_kernels_may_be_mixed_at_some_calls_only() -> None:
    """A mixture is a site like any other; the calls between take over its kernels, and compute all else."""
    source = build()
    mixed = sdgraph.apply(source, MECondConv("**.conv2", donors="copies"))
    unet = sdgraph.apply(moved(mixed), InheritFeatures("**.mix", Uniform(2)))
    assert all(".mix" in site for site in unet.graph.sites)
    call = call_of(source, timestep=torch.tensor([900]))
    first = answer(unet, call)
    torch.testing.assert_close(first, answer(mixed, call))
    later = {**call, "timestep": torch.tensor([100])}
    inherited = answer(unet, later)
    assert not torch.allclose(inherited, answer(mixed, later), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        answer(unet, {**later, "timestep": torch.tensor([90])}),
        answer(mixed, {**later, "timestep": torch.tensor([90])}),
    )
    kernels = sum(p[0].numel() for name, p in unet.named_parameters() if ".mix." in name)
    assert unet.cache_bytes() == 4 * kernels


@pytest.mark.slow
def test_inherited_kernels_are_exported(tmp_path: Path) -> None:
    """They are for the call, whatever its batch."""
    passes = [MECondConv("**.conv2", donors="copies"), InheritFeatures("**.mix", Uniform(2))]
    unet = moved(sdgraph.apply(build(**ONE_LEVEL), passes, verify=False))
    sdgraph.exporters.onnx.export(unet, tmp_path / "onnx", calls=4, progress=False)
    running = sdgraph.exporters.ort.ORTUNet.from_pretrained(tmp_path / "onnx", provider="CPUExecutionProvider")
    for B in (1, 3):
        call = call_of(unet, B=B)
        for step in range(4):
            now = {**call, "timestep": torch.tensor([900 - 100 * step])}
            torch.testing.assert_close(answer(running, now), answer(unet, now), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"routing": "both"}, SpecError, "routing is 'both'"),
        ({"experts": 1}, SpecError, "experts is 1"),
        ({"rank": -1}, SpecError, "rank is -1"),
        ({"where": "**.conv2", "donors": "copies", "rank": 6}, EditError, "16x144 in 1 group.* rank 18 together"),
        ({"temperature": 0.0}, SpecError, "temperature is 0.0"),
        ({}, PreconditionError, "Convolutions were pruned from the graph, where(.|\\n)*after it; or set donors="),
        ({"donors": "copies"}, EditError, "nothing was pruned"),
        ({"where": "**.conv9", "donors": "copies"}, PathError, "no module matches"),
        ({"where": "mid_block.resnets.0", "donors": "copies"}, EditError, "is a ResnetBlock2D"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        sdgraph.apply(build(), MECondConv(**options))
