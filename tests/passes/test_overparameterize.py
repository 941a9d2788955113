"""Overparameterize and Fold: nothing changes, all parts learn, and the folded UNet is a plain one again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

import sdgraph
from sdgraph import Contract, Findings, Graph, GraphUNet, Pass
from sdgraph.errors import EditError, ModeError, NoChangeError, PathError, PreconditionError, SpecError
from sdgraph.passes import Fold, InheritFeatures, Overparameterize, PruneBlocks, ShareWeights
from sdgraph.passes.composed import Branches, LowRank, Product, multiplied, summed, updated
from sdgraph.schedules import Uniform
from sdgraph.testing import check
from sdgraph.tuning import Output, Tensors

from ..models import CROSS, ONE_LEVEL, answer, build, call_of, edits, statements

EVERY = (
    "conv_in",
    "**.{conv,conv1,conv2,conv_shortcut}",
    "**.{to_q,to_v,time_emb_proj}",
    "**.ff.net.2",
    "**.net.0.proj",
)
KINDS = ("product", "branches", "low-rank")


def moved(unet: GraphUNet) -> GraphUNet:
    """With all parts as training might leave them."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return unet


def test_a_convolution_becomes_a_product_and_is_folded(small: Graph) -> None:
    path = "up_blocks.0.resnets.1"
    wide = sdgraph.apply(small, Overparameterize(f"{path}.conv2"))
    assert edits(small, wide.graph, within=path) == [
        "-% = conv2(%)",
        "+% = product(%, conv2.first, conv2.weight, conv2.last, conv2.bias, ((1, 1), (1, 1), (1, 1), 1))",
    ]
    assert statements(sdgraph.apply(wide, Fold()).graph) == statements(small)


def test_a_convolution_gets_branches_and_is_folded(small: Graph) -> None:
    path = "up_blocks.0.resnets.1"
    wide = sdgraph.apply(small, Overparameterize(f"{path}.{{conv1,conv2}}", kind="branches"))
    assert edits(small, wide.graph, within=path) == [
        "-% = conv1(%)",
        # conv1 has fewer outputs than inputs, which cannot be added to them
        "+% = branches(%, conv1.weight, conv1.point, None, conv1.bias, ((1, 1), (1, 1), (1, 1), 1))",
        "-% = conv2(%)",
        "+% = branches(%, conv2.weight, conv2.point, conv2.scale, conv2.bias, ((1, 1), (1, 1), (1, 1), 1))",
    ]
    assert statements(sdgraph.apply(wide, Fold()).graph) == statements(small)


def test_a_convolution_gets_an_update_of_low_rank_and_is_folded(small: Graph) -> None:
    path = "up_blocks.0.resnets.1"
    wide = sdgraph.apply(small, Overparameterize(f"{path}.conv2", kind="low-rank", rank=3))
    assert edits(small, wide.graph, within=path) == [
        "-% = conv2(%)",
        "+% = low_rank(%, conv2.weight, conv2.down, conv2.up, conv2.bias, ((1, 1), (1, 1), (1, 1), 1))",
    ]
    assert wide.graph.tensor(f"{path}.conv2.up").shape == (16, 3, 1, 1)
    assert torch.equal(answer(wide, call_of(wide)), answer(GraphUNet(small), call_of(wide)))
    assert statements(sdgraph.apply(wide, Fold()).graph) == statements(small)
    with pytest.raises(SpecError, match="has no rank"):
        Overparameterize(f"{path}.conv2", rank=3)


LAYERS: dict[str, nn.Conv2d | nn.Linear] = {
    "3x3": nn.Conv2d(4, 6, 3, padding=1),
    "square": nn.Conv2d(4, 4, 3, padding=1),
    "stride": nn.Conv2d(4, 4, 3, 2, 1),
    "no padding": nn.Conv2d(4, 4, 3),
    "1x1": nn.Conv2d(4, 4, 1, bias=False),
    "even": nn.Conv2d(4, 4, (2, 4), padding=1),
    "dilation": nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    "groups": nn.Conv2d(4, 4, 3, padding=1, groups=2),
    "wide": nn.Linear(4, 6),
    "narrow": nn.Linear(6, 4, bias=False),
    "square linear": nn.Linear(4, 4),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("module", [Product, Branches])
def test_any_layer_starts_as_it_was_and_equals_its_kernel(name: str, module: Any) -> None:
    """At the padded border too, where a bias before the convolution would be missing."""
    layer = LAYERS[name]
    x = torch.randn((5, 3, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 6, 5))
    composed = module(layer)
    exact = {"rtol": 0, "atol": 0} if module is Branches else {"rtol": 1e-5, "atol": 1e-6}  # the bias is added later
    torch.testing.assert_close(composed(x), layer(x), **exact)
    parts = [p for n, p in composed.named_parameters() if n not in ("weight", "bias")]
    assert len(parts) == (2 if isinstance(layer, nn.Conv2d) and module is Product else 1) + (
        module is Branches and name not in ("3x3", "stride", "no padding", "even", "wide", "narrow")
    )
    with torch.no_grad():
        for part in parts:
            part.add_(torch.randn(part.shape))
    groups = getattr(layer, "groups", 1)
    if module is Product:
        kernel = multiplied(composed.first, composed.weight, composed.last, groups)
    else:
        kernel = summed(composed.weight, composed.point, composed.scale, groups)
    assert not torch.allclose(kernel, layer.weight, atol=0.1)
    expected = composed(x)
    with torch.no_grad():
        found = torch.func.functional_call(layer, {"weight": kernel}, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "groups"])
def test_a_layer_with_an_update_of_low_rank_equals_its_kernel(name: str) -> None:
    layer = LAYERS[name]
    x = torch.randn((5, 3, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 6, 5))
    composed = LowRank(layer, 2)
    assert torch.equal(composed(x), layer(x))
    with torch.no_grad():
        composed.up.normal_()
    kernel = updated(composed.weight, composed.down, composed.up, 1)
    assert torch.linalg.matrix_rank((kernel - layer.weight).flatten(1), atol=1e-4) == 2
    found = torch.func.functional_call(layer, {"weight": kernel}, x)
    torch.testing.assert_close(found, composed(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_folded_to_a_plain_unet(kind: str, tmp_path: Path) -> None:
    source = build()
    pruned = sdgraph.apply(source, PruneBlocks("mid_block"))
    wide = check(Overparameterize(EVERY, kind), pruned)
    assert wide is not None
    draw = torch.Generator().manual_seed(0)
    data = Tensors(torch.randn(4, 4, 8, 8, generator=draw), {"encoder_hidden_states": torch.randn(4, 5, CROSS)})
    tuned, _ = sdgraph.tune(
        wide, source, data, scheduler=DDPMScheduler(), max_train_steps=3, output_dir=tmp_path / "run",
        losses=(Output(),),
        train_batch_size=2, learning_rate=1e-3, report_to="none",
    )  # fmt: skip
    before, after = wide.state_dict(), tuned.state_dict()
    assert not [name for name in before if torch.equal(before[name], after[name])]
    with pytest.raises(ModeError, match=kind.removesuffix("es").replace("-", "_")):
        tuned.to_diffusers()

    folded = sdgraph.apply(tuned, Fold())
    call = call_of(source)
    expected = answer(tuned, call)
    torch.testing.assert_close(answer(folded, call), expected, rtol=1e-4, atol=1e-5)
    assert {n: t.shape for n, t in folded.state_dict().items()} == {n: t.shape for n, t in pruned.state_dict().items()}
    folded.to_diffusers().save_pretrained(tmp_path / "plain")
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(answer(plain, call), expected, rtol=1e-4, atol=1e-5)
    for number, unet in enumerate((tuned, folded)):
        unet.save_pretrained(tmp_path / str(number))
        assert torch.equal(answer(GraphUNet.from_pretrained(tmp_path / str(number)), call), answer(unet, call))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_exported_inherits_and_is_pruned(kind: str, tmp_path: Path) -> None:
    source = build(**ONE_LEVEL)
    wide = moved(sdgraph.apply(source, Overparameterize(EVERY[1:], kind)))
    call = call_of(source)
    folded = sdgraph.apply(wide, Fold())
    for name, unet in (("wide", wide), ("folded", folded)):
        sdgraph.exporters.onnx.export(unet, tmp_path / name)
        running = sdgraph.exporters.ort.ORTUNet.from_pretrained(tmp_path / name, provider="CPUExecutionProvider")
        torch.testing.assert_close(answer(running, call), answer(wide, call), rtol=1e-3, atol=1e-4)
    inheriting = sdgraph.apply(wide, InheritFeatures("up_blocks.0.resnets.0", Uniform(2)))
    one = sdgraph.apply(sdgraph.apply(inheriting, Fold()), PruneBlocks("down_blocks.0.attentions.0"))
    other = sdgraph.apply(folded, [PruneBlocks("down_blocks.0.attentions.0")])
    torch.testing.assert_close(answer(one, call), answer(other, call), rtol=1e-4, atol=1e-5)


def test_shared_layers_are_folded_to_shared_layers() -> None:
    source = build("sd15", layers_per_block=2)
    pair = ("up_blocks.1.resnets.1", "up_blocks.1.resnets.2")
    wide = sdgraph.apply(source, [Overparameterize("up_blocks.1.**.{conv1,conv2}"), ShareWeights((pair,))])
    moved(wide)
    folded = sdgraph.apply(wide, Fold())
    plain = sdgraph.apply(source, ShareWeights((pair,)))
    assert {n: t.shape for n, t in folded.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}
    torch.testing.assert_close(answer(folded, call_of(source)), answer(wide, call_of(source)), rtol=1e-4, atol=1e-5)


class Halve(Pass):
    """Halve a parameter."""

    contract = Contract.APPROXIMATE

    def run(self, graph: Graph) -> Findings:
        node = next(n for n in graph.nodes if n.target == "mid_block.resnets.0.conv1.first")
        graph.insert_after(node, lambda weight: weight / 2)
        return Findings()


def test_what_cannot_be_folded_or_composed() -> None:
    source = build()
    with pytest.raises(NoChangeError, match=r"Fold\(\) changed nothing"):
        sdgraph.apply(source, Fold())
    with pytest.raises(PreconditionError, match=r"(?s)of mid_block.resnets.0.conv1.*hint:  apply Fold before the pass"):
        sdgraph.apply(source, [Overparameterize(), Halve(), Fold()])
    with pytest.raises(SpecError, match="kind is 'sum'"):
        Overparameterize(kind="sum")
    with pytest.raises(PathError, match="no module matches"):
        sdgraph.apply(source, Overparameterize("**.conv9"))
    for where, found in (("mid_block.resnets.0", "ResnetBlock2D"), ("**.norm1", "GroupNorm")):
        with pytest.raises(EditError, match=f"no layer with separate weights, but {found}"):
            sdgraph.apply(source, Overparameterize(where))
    with pytest.raises(EditError, match="conv1 is no layer with separate weights, but Product"):
        sdgraph.apply(source, [Overparameterize(), Overparameterize()])
    source.conv_in.padding_mode = "reflect"
    with pytest.raises(EditError, match="conv_in pads with other than zeros"):
        sdgraph.apply(source, Overparameterize("conv_in"), verify=False)
