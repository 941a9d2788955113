"""optimum runs `model.onnx` of an exported directory, of a UNet that inherits features too.

optimum-onnx 0.1 wants transformers below 4.58, older than the one that the other tests run with: these need a
separate environment, see docs/deploying.md.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

import sdgraph
from sdgraph.exporters.onnx import export

from ..pipelines import PIPELINES, make

with warnings.catch_warnings(action="ignore"):
    try:
        from optimum.onnxruntime import ORTStableDiffusionPipeline
    except ImportError as error:
        pytest.skip(f"optimum-onnx cannot be imported: {error}", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Decode(torch.nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's decoder, as optimum expects it."""
    folder = tmp_path_factory.mktemp("vae_decoder")
    vae = PIPELINES["text"][0]().vae
    sizes = {0: "batch", 2: "height", 3: "width"}
    torch.onnx.export(
        Decode(vae),
        (torch.zeros(2, 4, 6, 10),),
        folder / "model.onnx",
        dynamo=True,
        dynamic_shapes=(sizes,),
        input_names=["latent_sample"],
        output_names=["sample"],
        verbose=False,
    )
    model = onnx.load(folder / "model.onnx")
    for dim in model.graph.output[0].type.tensor_type.shape.dim:
        dim.dim_param = dim.dim_param.replace("*", " * ")  # optimum splits sizes at spaces
    onnx.save(model, folder / "model.onnx")
    vae.save_config(folder)
    return folder / "model.onnx"


@pytest.mark.parametrize("passes", ["CleanUp", "HoistInvariants, InheritFeatures.deep_cache(2)"])
@pytest.mark.parametrize("binding", [False, True])
def test_optimums_images_are_ours(passes: str, binding: bool, decoder: Path, tmp_path: Path) -> None:
    pipe, call = PIPELINES["text"][0](), PIPELINES["text"][1]
    expected = make(pipe, call)
    export(sdgraph.apply(pipe.unet, passes, verify=False), tmp_path / "unet", calls=4, progress=False)
    sessions = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in (tmp_path / "unet" / "model.onnx", decoder)
    ]
    theirs = ORTStableDiffusionPipeline(
        unet_session=sessions[0],
        vae_decoder_session=sessions[1],
        scheduler=pipe.scheduler,
        tokenizer=None,
        use_io_binding=binding,
    )
    theirs.set_progress_bar_config(disable=True)
    torch.testing.assert_close(torch.as_tensor(make(theirs, call)), expected, rtol=1e-3, atol=1e-3)
