"""Assemble: regions get the weights of another UNet in which they are the same, and nothing else changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import EditError, PathError, SavedError, ShapeError, SpecError
from sdgraph.passes import Assemble, GRIAttention, InheritFeatures, PruneBlocks, ShareWeights
from sdgraph.schedules import Uniform

from ..models import answer, build, call_of

PRUNED = PruneBlocks("up_blocks.0.resnets.1")
REGIONS = ("mid_block", "up_blocks.0.{resnets,attentions}.0")


@pytest.fixture(scope="module")
def one() -> GraphUNet:
    """A pruned UNet. Leave it as it is."""
    return sdgraph.apply(build(layers_per_block=2), PRUNED)


@pytest.fixture(scope="module")
def other() -> GraphUNet:
    """The same UNet with other weights. Leave it as it is."""
    return sdgraph.apply(build(layers_per_block=2, seed=1), PRUNED)


@pytest.fixture(scope="module")
def folder(other: GraphUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the other UNet."""
    folder = tmp_path_factory.mktemp("other") / "unet"
    other.save_pretrained(folder)
    return folder


def test_regions_have_the_other_weights_and_the_rest_its_own(one: GraphUNet, other: GraphUNet, folder: Path) -> None:
    result = sdgraph.apply(one, Assemble(REGIONS, str(folder)))
    mine, its = one.state_dict(), other.state_dict()
    for name, weight in result.state_dict().items():
        taken = name.startswith(("mid_block.", "up_blocks.0.resnets.0.", "up_blocks.0.attentions.0."))
        assert torch.equal(weight, (its if taken else mine)[name]), name
        assert not torch.equal(mine[name], its[name])
    assert result.report.passes[-1].notes[0] == f"mid_block has its weights from {folder}"


def test_weights_are_not_copied(one: GraphUNet, other: GraphUNet) -> None:
    graph = one.graph.copy()
    names = graph.take_weights("mid_block", other.graph)
    assert "mid_block.resnets.0.conv1" in names
    weight = graph.parameters()["mid_block.resnets.0.conv1.weight"]
    assert weight.data_ptr() == other.get_parameter("mid_block.resnets.0.conv1.weight").data_ptr()
    assert weight.data_ptr() != one.get_parameter("mid_block.resnets.0.conv1.weight").data_ptr()


def test_all_regions_are_the_other_unet(one: GraphUNet, other: GraphUNet, folder: Path) -> None:
    call = call_of(one)
    everything = ("conv_in", "time_embedding", "down_blocks.*", "mid_block", "up_blocks.*", "conv_norm_out", "conv_out")
    assert torch.equal(answer(sdgraph.apply(one, Assemble(everything, str(folder))), call), answer(other, call))


def test_the_result_is_loaded_without_the_folder_and_takes_other_passes(
    one: GraphUNet, folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    passes = [Assemble(REGIONS, str(source)), InheritFeatures("up_blocks.1.resnets.0", Uniform(2))]
    result = sdgraph.apply(one, passes)
    result.save_pretrained(tmp_path / "result")
    shutil.rmtree(source)
    loaded = GraphUNet.from_pretrained(tmp_path / "result")
    calls = [call_of(one, timestep=t) for t in (900, 800)]
    for call in calls:
        assert torch.equal(answer(loaded, call), answer(result, call))
    result.enable_freeu(0.9, 0.2, 1.2, 1.4)  # traces it anew, with the weights that it has
    name = "mid_block.resnets.0.conv1.weight"
    assert torch.equal(result.get_parameter(name), loaded.get_parameter(name))
    assert not torch.equal(answer(result, calls[0]), answer(loaded, calls[0]))


def test_it_is_cast_to_the_dtype_of_the_graph(folder: Path) -> None:
    half = sdgraph.apply(build(layers_per_block=2).half(), [PRUNED, Assemble("mid_block", str(folder))], verify=False)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        (("mid_block",), SpecError, "source is ''"),
        (((), "unet"), SpecError, r"regions is \(\)"),
        (("mid_block", "nowhere"), SavedError, "there is no folder nowhere"),
        (("mid_blok", "{folder}"), PathError, "mid_block"),
        (("up_blocks.0.resnets.1", "{folder}"), PathError, "no longer in the graph|no module"),
    ],
)
def test_what_is_refused(
    options: tuple[Any, ...], error: type[Exception], complaint: str, one: GraphUNet, folder: Path
) -> None:
    given = [option.format(folder=folder) if isinstance(option, str) else option for option in options]
    with pytest.raises(error, match=complaint):
        sdgraph.apply(one, Assemble(*given))


def test_regions_that_differ_are_refused(one: GraphUNet, other: GraphUNet, folder: Path) -> None:
    def refused(unet: GraphUNet, regions: Any, error: type[Exception], complaint: str) -> None:
        with pytest.raises(error, match=complaint):
            unet.graph.copy().take_weights(regions, other.graph)

    whole = sdgraph.apply(build(layers_per_block=2))
    refused(
        whole, "up_blocks.0", EditError, r"up_blocks.0 is not the same(.|\n)*PruneBlocks\('up_blocks.0.resnets.1'\)"
    )
    refused(sdgraph.apply(one, GRIAttention(4, pool=2)), "down_blocks.0", EditError, "not the same in both graphs")
    wide = sdgraph.apply(build(layers_per_block=2, cross_attention_dim=40), PRUNED)
    refused(wide, "mid_block", ShapeError, r"to_k is Linear\(in_features=40(.|\n)*Linear\(in_features=")
    refused(sdgraph.apply(build(layers_per_block=2).half(), PRUNED), "mid_block", EditError, "torch.float16 on cpu")
    shared = sdgraph.apply(one, ShareWeights((("mid_block.resnets.0", "mid_block.resnets.1"),)))
    with pytest.raises(EditError, match=r"is used outside of mid_block\.resnets\.0 as well"):
        sdgraph.apply(shared).graph.copy().take_weights("mid_block.resnets.0", shared.graph)
    with pytest.raises(EditError, match="has the weights that are there already"):
        sdgraph.apply(other, Assemble("mid_block", str(folder)))
