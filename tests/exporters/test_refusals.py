"""Refusals to export, to call and to run give the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch

import sdgraph
from sdgraph import errors
from sdgraph.exporters.onnx import export
from sdgraph.exporters.ort.unet import ORTUNet
from sdgraph.extra import require_onnx

from ..models import build, call_of
from ..pipelines import plain
from .exports import RESIDUALS, Exported

pytestmark = pytest.mark.slow


def test_what_cannot_be_exported_says_why(exported: Callable[..., Exported], tmp_path: Path) -> None:
    unet = exported("sd15").unet
    with pytest.raises(errors.ExportError, match=r"bfloat16.*Resize"):
        export(sdgraph.apply(build("sd15").bfloat16(), verify=False), tmp_path / "out")
    with pytest.raises(errors.ExportError, match=r"pass pipe\.unet"):
        export(plain("StableDiffusionPipeline", build("sd15")), tmp_path / "out")
    with pytest.raises(errors.SpecError, match="did you mean 'mid_block_additional_residual'"):
        export(unet, tmp_path / "out", inputs=["mid_block_residual"])
    with pytest.raises(errors.SpecError, match="18 to 20"):
        export(unet, tmp_path / "out", opset=23)
    (tmp_path / "file").touch()
    with pytest.raises(errors.ExportError, match="cannot write"):
        export(unet, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(errors.ExtraError, match=r"pip install -e '\.\[onnx\]'"):
        require_onnx()


def test_calls_that_are_not_covered(exported: Callable[..., Exported]) -> None:
    loaded = exported("sd15").load()
    call = call_of(loaded)
    for change, message in (
        ({"sample": call["sample"][:, :3]}, r"sample has shape \(2, 3, 8, 12\), expected \(2, 4, 8, 12\)"),
        ({"sample": call["sample"][0]}, r"sample has shape \(4, 8, 12\)"),
        ({"sample": call["sample"].half()}, "float16, the UNet is torch.float32"),
        ({"encoder_hidden_states": call["encoder_hidden_states"][:1]}, "encoder_hidden_states has shape"),
        ({"timestep": torch.tensor([1, 2, 3])}, r"timestep has shape \(3,\)"),
        ({"timestep": "7"}, "timestep is a str"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "not covered"),
        ({"class_labels": torch.tensor([1])}, "class_labels is not covered"),
        (dict.fromkeys(RESIDUALS, None) | {RESIDUALS[1]: torch.zeros(2, 32, 4, 6)}, "only one was given"),
        (
            {RESIDUALS[0]: (torch.zeros(2, 16, 8, 12),) * 4, RESIDUALS[1]: torch.zeros(2, 32, 4, 6)},
            "exported without down_block_additional_residuals",
        ),
    ):
        with pytest.raises(errors.CallError, match=message):
            loaded(**call | change)


def test_what_a_session_cannot_do(exported: Callable[..., Exported]) -> None:
    loaded = exported("sd15").load()
    assert loaded.to("cpu").to(torch.float32).to(device=torch.device("cpu"), dtype=torch.float32).eval() is loaded
    assert (loaded.config.in_channels, loaded.config["in_channels"], loaded.dtype) == (4, 4, torch.float32)
    assert loaded(**call_of(loaded), return_dict=False)[0].shape == (2, 4, 8, 12)
    with pytest.raises(errors.ModeError, match="export unet"):
        loaded.to(torch.float16)
    with pytest.raises(errors.ModeError, match="CUDAExecutionProvider"):
        loaded.to("cuda")
    with pytest.raises(errors.ModeError, match="source UNet"):
        _ = loaded.set_attn_processor
    assert not hasattr(loaded, "anything")


def test_unknown_provider(exported: Callable[..., Exported]) -> None:
    with pytest.raises(errors.SpecError, match=r"available: .*CPUExecutionProvider"):
        ORTUNet.from_pretrained(exported("sd15").directory, provider="CoreMLProvider")


@pytest.mark.skipif(
    torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs ONNX Runtime with CUDA on a machine without it",
)
def test_a_provider_that_does_not_start_is_no_silent_cpu(exported: Callable[..., Exported]) -> None:
    with pytest.raises(errors.ExtraError, match="does not start"):
        ORTUNet.from_pretrained(exported("sd15").directory, provider="CUDAExecutionProvider")
