"""Plain diffusers reads the same UNet from a saved folder, or refuses it; never another one in silence."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

import sdgraph
from sdgraph import Contract, Graph, GraphUNet, Pass
from sdgraph.errors import SavedError

from ..models import answer, build, call_of
from ..pipelines import PIPELINES

# By passes, whether a plain model computes the same.
STUDENTS = {
    "": True,
    "CleanUp, HoistInvariants": True,
    "PruneBlocks('mid_block')": True,
    "PruneBlocks('bk-sdm-base')": True,
    "CleanUp, PruneBlocks('{down_blocks.0.attentions.1,up_blocks.1.attentions.0}')": False,
    "GRIAttention(4, pool=2)": False,
    "InheritFeatures.deep_cache(2)": False,
    "PruneBlocks('bk-sdm-base'), MECondConv(experts=2)": False,
    "ShareWeights((('mid_block.resnets.0', 'mid_block.resnets.1'),))": False,
}


def with_options(**options: Any) -> Callable[[GraphUNet, Path], dict[str, Any]]:
    def save(unet: GraphUNet, folder: Path) -> dict[str, Any]:
        unet.save_pretrained(folder, **options)
        return {"variant": options.get("variant")}

    return save


def by_a_moving_average(unet: GraphUNet, folder: Path) -> dict[str, Any]:
    average = EMAModel(unet.parameters(), model_cls=GraphUNet, model_config=unet.config)
    average.save_pretrained(folder)
    return {}


WAYS: dict[str, Callable[[GraphUNet, Path], dict[str, Any]]] = {
    "as it is": with_options(),
    "a variant": with_options(variant="fp16"),
    "shards": with_options(max_shard_size="40KB"),
    "shards of a variant": with_options(max_shard_size="40KB", variant="fp16"),
    "a moving average": by_a_moving_average,
}


def check(unet: GraphUNet, folder: Path, plain_exists: bool, **options: Any) -> None:
    call = call_of(unet)
    again = GraphUNet.from_pretrained(folder, **options)
    assert torch.equal(answer(again, call), answer(unet, call))
    assert again.graph.passes == unet.graph.passes
    if plain_exists:
        plain = UNet2DConditionModel.from_pretrained(folder, **options)
        assert torch.equal(answer(plain, call), answer(unet, call))
        assert not (folder / "README.md").exists()
    else:
        with pytest.raises(OSError, match="no file named"):
            UNet2DConditionModel.from_pretrained(folder, **options)
        assert "sdgraph.GraphUNet.from_pretrained" in (folder / "README.md").read_text()


@pytest.mark.law("diffusers without sdgraph reads the same UNet from a saved folder, or none.")
@pytest.mark.slow
@pytest.mark.parametrize("passes", STUDENTS)
def test_diffusers_reads_the_same_unet_or_none(passes: str, tmp_path: Path) -> None:
    unet = sdgraph.apply(build(layers_per_block=2), passes, verify=False)
    for parameter in unet.train().parameters():
        parameter.data.mul_(1.01)
    unet.eval().save_pretrained(tmp_path / "unet")
    check(unet, tmp_path / "unet", STUDENTS[passes])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_however_the_folder_is_written(way: str, tmp_path: Path) -> None:
    """Each folder in the place of the former, so that nothing of that stays behind."""
    for passes in ("GRIAttention(4, pool=2)", "PruneBlocks('bk-sdm-base')"):
        unet = sdgraph.apply(build(layers_per_block=2), passes, verify=False)
        options = WAYS[way](unet, tmp_path / "unet")
        check(unet, tmp_path / "unet", STUDENTS[passes], **options)


@pytest.mark.slow
def test_settings_that_a_configuration_does_not_hold(tmp_path: Path) -> None:
    unet = sdgraph.apply(build(), verify=False)
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    unet.save_pretrained(tmp_path / "unet")
    check(unet, tmp_path / "unet", plain_exists=False)


@pytest.mark.slow
def test_an_exact_pass_that_computes_weights_anew_has_no_plain_model(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Split(Pass):
        """Halves a kernel and doubles what it gives, which changes no bit."""

        contract = Contract.EXACT

        def run(self, graph: Graph) -> None:
            halved = copy.deepcopy(graph.module("conv_in"))
            with torch.no_grad():
                halved.weight, halved.bias = (torch.nn.Parameter(p / 2) for p in (halved.weight, halved.bias))
            graph.add_module("conv_in", halved)
            graph.insert_after(graph.region("conv_in").output, lambda x: x * 2)

    unet = sdgraph.apply(build(), [Split()])
    unet.save_pretrained(tmp_path / "unet")
    check(unet, tmp_path / "unet", plain_exists=False)


def test_a_readme_of_ones_own_stays(tmp_path: Path) -> None:
    unet = sdgraph.apply(build(), "GRIAttention(4, pool=2)", verify=False)
    unet.save_pretrained(tmp_path / "unet")
    (tmp_path / "unet/README.md").write_text("my notes")
    with pytest.raises(SavedError, match=r"other files: README\.md"):
        unet.save_pretrained(tmp_path / "unet")
    assert (tmp_path / "unet/README.md").read_text() == "my notes"


READ = """
import sys
import torch
from diffusers import StableDiffusionPipeline

absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
options = {"requires_safety_checker": False, **absent}
try:
    StableDiffusionPipeline.from_pretrained(sys.argv[1], **options)
except ValueError as error:
    assert "import sdgraph before" in str(error), error
else:
    raise SystemExit("loaded without sdgraph")
import sdgraph
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], **options)
call = torch.load(sys.argv[2])
expected = call.pop("expected")
with torch.no_grad():
    assert torch.equal(pipe.unet(**call).sample, expected)
"""


@pytest.mark.long
def test_a_pipeline_names_the_module_to_import(tmp_path: Path) -> None:
    pipe = PIPELINES["text"][0]()
    pipe.unet = sdgraph.apply(pipe.unet, "GRIAttention(4, pool=2)", verify=False)
    pipe.save_pretrained(tmp_path / "pipe")
    assert json.loads((tmp_path / "pipe/model_index.json").read_text())["unet"] == ["sdgraph", "GraphUNet"]
    call = call_of(pipe.unet)
    torch.save({**call, "expected": answer(pipe.unet, call)}, tmp_path / "call")
    done = subprocess.run(
        [sys.executable, "-c", READ, tmp_path / "pipe", tmp_path / "call"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
