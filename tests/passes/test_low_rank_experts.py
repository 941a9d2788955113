"""ME-CondConv with experts of low rank: exact at first, for every sample, and nearly free."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sdgraph
from sdgraph import Graph, GraphUNet
from sdgraph.errors import ModeError
from sdgraph.passes import InheritFeatures, MECondConv, PruneBlocks
from sdgraph.passes.low_rank_conv import LowRankConv2d, truncated
from sdgraph.schedules import Uniform

from ..models import ONE_LEVEL, answer, build, call_of, edits

PRUNE = PruneBlocks("bk-sdm-base")
WHERE = "**.{conv1,conv2}"


def moved(unet: GraphUNet) -> GraphUNet:
    """With routing as training might leave it."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".routing." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return unet


def test_experts_are_two_small_convolutions(small: Graph) -> None:
    after = sdgraph.apply(small, MECondConv("up_blocks.0.resnets.1.conv2", donors="copies", rank=2)).graph
    assert edits(small, after, within="up_blocks.0.resnets.1") == [
        "-% = conv2(%)",
        "+% = silu(%, inplace=False)",
        "+% = conv2.routing(%)",
        "+% = div(%, conv2.temperature)",
        "+% = softmax(%, dim=1, _stacklevel=3)",
        "+% = sub(%, 0.25)",
        "+% = %[:, 1:, None]",
        "+% = expand(%, -1, -1, 2)",
        "+% = flatten(%, 1)",
        "+% = %[:, :, None, None]",
        "+% = conv2d(%, conv2.down, None, (1, 1), (1, 1), (1, 1), 1)",
        "+% = mul(%, %)",
        "+% = conv2d(%, conv2.weight, conv2.bias, (1, 1), (1, 1), (1, 1), 1)",
        "+% = conv2d(%, conv2.up)",
        "+% = add(%, %)",
    ]


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_it_is_the_mixture_of_experts_of_which_parts_are_kept(gate: str) -> None:
    """At full rank that is all of a donor; at first nothing changes, and the gates and then the experts learn."""
    convs = [nn.Conv2d(4, 6, 3, stride=2, padding=1) for _ in range(2)]
    module = LowRankConv2d(convs, 3, 8, gate, 2.0, rank=3)
    x, embedding = torch.randn(2, 4, 9, 7), torch.randn(2, 8)
    assert torch.equal(module(x, embedding), convs[0](x))
    with torch.no_grad():
        nn.init.normal_(module.routing.weight)
        z = module.routing(F.silu(embedding)) / 2.0
        gates = z.softmax(1) - 1 / 3 if gate == "softmax" else z.sigmoid() - 0.5
        own, donor = (conv.weight.flatten(1) for conv in convs)
        parts = [truncated(donor - own, 3), truncated(own, 3)]
        for sample in range(2):
            kernel = own + sum(a * up @ down for a, (up, down) in zip(gates[sample, 1:], parts, strict=True))
            expected = F.conv2d(x[sample : sample + 1], kernel.reshape(6, 4, 3, 3), convs[0].bias, 2, 1)
            torch.testing.assert_close(module(x, embedding)[sample : sample + 1], expected, rtol=1e-4, atol=1e-5)


def test_a_truncated_matrix_is_the_best_approximation() -> None:
    matrix = torch.randn(6, 20)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    up, down = truncated(matrix, 2)
    torch.testing.assert_close(up @ down, u[:, :2] * s[:2] @ v[:2], rtol=1e-4, atol=1e-5)
    up, down = truncated(matrix, 6)
    torch.testing.assert_close(up @ down, matrix, rtol=1e-4, atol=1e-5)


def test_training_equals_that_of_the_kernel_that_is_never_formed() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    module = LowRankConv2d([conv], 3, 8, "softmax", 1.0, rank=2)
    x, embedding, target = torch.randn(2, 4, 8, 8), torch.randn(2, 8), torch.randn(2, 4, 8, 8)
    before, plain = [p.detach().clone() for p in module.parameters()], copy.deepcopy(module)

    def formed() -> torch.Tensor:
        gates, rows = plain.gates(F.silu(embedding)), []
        ups, downs = plain.up.flatten(1).split(2, 1), plain.down.flatten(1).split(2)
        for sample in range(2):
            parts = [gate * up @ down for gate, up, down in zip(gates[sample, 1:], ups, downs, strict=True)]
            kernel = plain.weight + sum(parts).reshape(plain.weight.shape)
            rows.append(F.conv2d(x[sample : sample + 1], kernel, plain.bias, padding=1))
        return torch.cat(rows)

    for trained, forward in ((module, lambda: module(x, embedding)), (plain, formed)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(forward(), target).backward()
            optimizer.step()
    for (name, value), expected, old in zip(module.named_parameters(), plain.parameters(), before, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)
        assert not torch.equal(value, old), name


@pytest.mark.parametrize("routing", ["timestep", "input"])
def test_nothing_changes_at_first_and_every_sample_has_its_own_kernel(routing: str, tmp_path: Path) -> None:
    source = build("sd15", layers_per_block=2)
    pruned = sdgraph.apply(source, PRUNE)
    unet = sdgraph.apply(source, [PRUNE, MECondConv(routing=routing, experts=3, rank=2)])
    assert unet.report.passes[-1].contract == "EXACT"
    assert "experts from" in " ".join(unet.report.passes[-1].notes)
    call = call_of(source, B=3, timestep=torch.tensor([3, 500, 900]))
    assert torch.equal(answer(unet, call), answer(pruned, call))
    with pytest.raises(ModeError):
        unet.to_diffusers()
    together = answer(moved(unet), call)
    assert not torch.allclose(together, answer(pruned, call), rtol=1e-2, atol=1e-3)
    for i, timestep in enumerate((3, 500, 900)):
        one = {name: call[name][i : i + 1] for name in ("sample", "encoder_hidden_states")}
        torch.testing.assert_close(
            answer(unet, {**one, "timestep": timestep}), together[i : i + 1], rtol=1e-4, atol=1e-5
        )
    unet.save_pretrained(tmp_path / "saved")
    assert torch.equal(answer(GraphUNet.from_pretrained(tmp_path / "saved"), call), together)


def test_it_costs_its_share_of_the_channels(small: Graph) -> None:
    path = "up_blocks.0.resnets.1.conv2"
    after = sdgraph.apply(small, MECondConv(path, donors="copies", rank=2)).graph
    added = after.region(path).macs / small.region(path).macs - 1
    assert added == pytest.approx(3 * 2 / 16 * (1 + 1 / 9), rel=0.05)  # and 1/9 of it for the way back to all channels


@pytest.mark.slow
def test_it_is_exported_for_any_timesteps_and_inherits(tmp_path: Path) -> None:
    source = build(**ONE_LEVEL)
    unet = moved(sdgraph.apply(source, MECondConv(WHERE, donors="copies", rank=2)))
    unet = sdgraph.apply(unet, InheritFeatures("up_blocks.0.resnets.0", Uniform(2)))
    sdgraph.exporters.onnx.export(unet, tmp_path / "onnx", calls=2, progress=False)
    running = sdgraph.exporters.ort.ORTUNet.from_pretrained(tmp_path / "onnx", provider="CPUExecutionProvider")
    call = call_of(source, timestep=torch.tensor([400]))
    for _ in range(2):
        torch.testing.assert_close(answer(running, call), answer(unet, call), rtol=1e-3, atol=1e-4)
