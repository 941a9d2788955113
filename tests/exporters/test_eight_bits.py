"""`Quantize`: what is computed in 8 bits, how close its images are, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from scenes import models

import sdgraph
from sdgraph import errors
from sdgraph.cli import main
from sdgraph.exporters.bundle.inspect import contents
from sdgraph.exporters.onnx import Calibration, ExportReport, Quantize, export
from sdgraph.exporters.onnx.parity import Quantization
from sdgraph.exporters.onnx.quantize import latent_psnr, path_of, with_quality
from sdgraph.exporters.onnx.sensitivity import Layer, cheapest
from sdgraph.exporters.ort import providers
from sdgraph.spec import read

from ..models import ONE_LEVEL, build
from .exports import opened

PROMPTS = ["a red circle", "two blue squares", "a green triangle", "a red square"]
STEPS = {"num_inference_steps": 3, "height": 64, "width": 64}
KEPT = ("conv_in", "conv_out", "*time_emb*")
PLAN = "InheritFeatures('up_blocks.-1.resnets.-1', Uniform(3), part='entry')"

pytestmark = pytest.mark.skipif(
    bool(providers.processor_flags()) and providers.processor_flags().isdisjoint(providers.EIGHT_BITS),
    reason="the processor has no VNNI",
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A pipeline with a tiny UNet that reads the scenes' words."""
    torch.manual_seed(0)
    words = models.tokenizer()
    unet = build(**{**ONE_LEVEL, "cross_attention_dim": models.TEXT_WIDTH})
    made = models.pipeline(words, models.text_encoder(words), models.vae(), unet)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def in_eight_bits(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    """A bundle in 8 bits of two variants, and its report."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    unet = sdgraph.apply(pipe.unet, PLAN, verify=False)
    calibration = Calibration(pipe, PROMPTS, **STEPS)
    quantize = Quantize(keep=KEPT)
    return folder, export(unet, folder, quantize=quantize, calibration=calibration, calls=3, progress=False)


def fused(path: Path, tmp_path: Path) -> Counter[str]:
    """The operators of a model after the CPU provider has optimised it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=[providers.CPU])
    optimised = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    return Counter(node.op_type for node in optimised.graph.node)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_chosen_layer_runs_in_eight_bits(in_eight_bits: tuple[Path, ExportReport], tmp_path: Path) -> None:
    folder, report = in_eight_bits
    assert report.quantization is not None
    operators = fused(folder / "model.onnx", tmp_path)
    whole = sum(operators[name] for name in ("QLinearConv", "MatMulIntegerToFloat", "QGemm", "QLinearMatMul"))
    assert whole == report.quantization.layers["static"]
    assert operators["Conv"] + operators["FusedConv"] + operators["NhwcFusedConv"] == 2  # conv_in and conv_out


@pytest.mark.slow
def test_images_are_close_and_variants_share_their_weights(in_eight_bits: tuple[Path, ExportReport]) -> None:
    folder, report = in_eight_bits
    assert report.quantization is not None
    assert report.quantization.worst > 25
    assert report.file_bytes < 0.5 * report.weight_bytes + 1e6  # most of it is the graphs of a tiny UNet
    unet = opened(folder)
    kernels = [
        {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}["offset"]
            for tensor in onnx.load(folder / variant.file, load_external_data=False).graph.initializer
            if tensor.data_type == onnx.TensorProto.INT8 and tensor.external_data
        }
        for variant in unet.manifest.variants
    ]
    assert len(kernels) == 2
    assert kernels[1].items() <= kernels[0].items()


@pytest.mark.slow
def test_the_strategy_is_kept_and_parses(in_eight_bits: tuple[Path, ExportReport]) -> None:
    folder, report = in_eight_bits
    kept = opened(folder).manifest.quantization
    assert read(kept, Quantize) == Quantize(keep=KEPT)
    assert f"8 bits: {kept}" in contents(folder, 3)
    assert f"8 bits: {kept}" in str(report)


@pytest.mark.slow
def test_a_processor_without_vnni_does_not_load_it(
    in_eight_bits: tuple[Path, ExportReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "processor_flags", lambda: frozenset(("sse2", "avx2")))
    with pytest.raises(errors.SpecError, match="no VNNI"):
        opened(in_eight_bits[0])


def test_a_gpu_is_sent_to_tensorrt() -> None:
    with pytest.raises(errors.SpecError, match="TensorRT"):
        providers.require_eight_bits(providers.CUDA)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "cuda"}, "TensorRT"),
        ({"layout": "single"}, "layout='variants'"),
        ({"dtype": torch.float16}, "float16 has no 8 bits"),
        ({"calibration": None}, "quantize without calibration"),
        ({"quantize": None}, "calibration without quantize"),
    ],
)
def test_a_request_that_has_no_eight_bits_is_refused(
    pipe: Any, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    unet = sdgraph.apply(pipe.unet, PLAN, verify=False)
    both: dict[str, Any] = {"quantize": Quantize(), "calibration": Calibration(pipe, PROMPTS)}
    with pytest.raises(errors.SpecError, match=match):
        export(unet, tmp_path / "out", progress=False, **(both | options))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("prompts", "match"), [([], "no prompts"), (["a red circle"], "one prompt cannot both")])
def test_calibration_needs_prompts(pipe: Any, prompts: list[str], match: str) -> None:
    with pytest.raises(errors.SpecError, match=match):
        Calibration(pipe, prompts)


@pytest.mark.slow
def test_values_that_are_not_finite_are_refused(bundle: Path) -> None:
    from sdgraph.exporters.bundle.manifest_file import read_manifest
    from sdgraph.exporters.onnx.quantize import CalibratingSessions

    sessions = CalibratingSessions(bundle, read_manifest(bundle), Quantize())
    given = opened(bundle).random_inputs({"B": 1, "H": 8, "W": 8, "L": 7})
    given["sample"] = given["sample"] * float("nan")
    with pytest.raises(errors.SpecError, match="is not finite at a calibration call"):
        sessions.compute(given, frozenset(), lambda site: given[site])


def test_images_below_the_bound_are_refused() -> None:
    reference = torch.linspace(0, 1, 16).reshape(1, 1, 4, 4)
    off = reference + 0.1
    assert latent_psnr(off, reference)[0] == pytest.approx(20, abs=0.1)
    found = Quantization("Quantize()", {"static": 1})
    assert with_quality(Quantize(psnr=19), found, off, reference).prompts == 1
    for latents in (off, off * float("nan")):
        with pytest.raises(errors.ParityError, match="worst held-out prompt"):
            with_quality(Quantize(psnr=30), found, latents, reference)


def test_text_without_prompts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(Path("examples/scenes/model"))
    for words, says in (
        (["--quantize", "Quantize()"], "8 bits need prompts"),
        (["--prompts", str(tmp_path / "p.txt")], "--prompts are for 8 bits"),
        (["--quantize", "Quantize('floats')", "--prompts", "p.txt"], "Quantize"),
    ):
        assert main(["export", model, "--out", str(tmp_path / "out"), *words]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.long
def test_layers_go_back_to_float_until_the_goal_is_reached(
    pipe: Any, in_eight_bits: tuple[Path, ExportReport], tmp_path: Path
) -> None:
    pytest.importorskip("scipy")
    before = in_eight_bits[1].quantization
    assert before is not None
    unet = sdgraph.apply(pipe.unet, PLAN, verify=False)
    quantize = Quantize(keep=KEPT, goal=before.psnr + 2)
    calibration = Calibration(pipe, PROMPTS, **STEPS)
    after = export(
        unet, tmp_path / "out", quantize=quantize, calibration=calibration, calls=3, progress=False
    ).quantization
    assert after is not None
    assert 0 < after.layers["static"] < before.layers["static"]
    assert after.psnr > before.psnr
    strategy = read(after.strategy, Quantize)
    assert isinstance(strategy, Quantize)
    assert strategy.goal is None
    assert set(KEPT) < set(strategy.keep)


def test_the_layers_that_stay_save_the_least_for_their_error() -> None:
    pytest.importorskip("scipy")
    layers = [Layer("dear", 1.0, 1.0), Layer("cheap", 0.1, 1.0), Layer("idle", 0.1, 0.0), Layer("quick", 0.5, 4.0)]
    assert cheapest(layers, 2.0) in ((), ("idle",))
    assert set(cheapest(layers, 0.65)) - {"idle"} == {"dear"}
    assert set(cheapest(layers, 0.2)) - {"idle"} == {"dear", "quick"}


@pytest.mark.parametrize(
    "weight", ["mid_block.attn2.to_k.weight", "mid_block.attn2.to_k.weight.T", "mid_block.attn2.to_k.weight_"]
)
def test_a_layer_has_the_path_of_its_module(weight: str) -> None:
    node = onnx.helper.make_node("MatMul", ["x", weight], ["y"])
    assert path_of(node) == "mid_block.attn2.to_k"
    assert Quantize().mode(node, path_of(node)) == "float"
