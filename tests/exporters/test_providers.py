"""Execution providers: which one is chosen, in which precision it computes, and its options."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

from sdgraph import errors
from sdgraph.exporters.onnx import export
from sdgraph.exporters.ort import providers
from sdgraph.exporters.ort.providers import CPU, CUDA, OPENVINO, choose
from sdgraph.exporters.ort.unet import ORTUNet

from ..models import answer, call_of
from .exports import CLOSE, Exported, inheriting, opened


def fake(capabilities: str) -> Any:
    return SimpleNamespace(
        ep_name=OPENVINO, ep_metadata={"ov_device": "CPU", "OPTIMIZATION_CAPABILITIES": capabilities}
    )


@pytest.fixture
def openvino() -> str:
    """OpenVINO's provider, where it is installed and serves the processor."""
    try:
        choose(OPENVINO, None, None, "float32")
    except errors.SdgraphError as error:
        pytest.skip(error.what)
    return OPENVINO


@pytest.mark.parametrize(
    ("device", "asked", "chosen"),
    [
        (fake("BF16 FP32"), {}, (OPENVINO, "float32")),  # faster, and no less precise
        (fake("FP32"), {}, (CPU, "float32")),
        (None, {}, (CPU, "float32")),
        (fake("BF16 FP32"), {"precision": "bfloat16"}, (OPENVINO, "bfloat16")),
        (fake("BF16 FP32"), {"name": CPU}, (CPU, "float32")),
        (fake("BF16 FP32"), {"name": OPENVINO}, (OPENVINO, "float32")),
        (fake("BF16 FP32"), {"dtype": "float16"}, (CPU, "float16")),
        (fake("BF16 FP32"), {"name": CPU, "precision": "float32"}, (CPU, "float32")),
    ],
)
def test_the_provider_follows_from_the_processor(
    monkeypatch: pytest.MonkeyPatch, device: Any, asked: dict[str, str], chosen: tuple[str, str]
) -> None:
    def found() -> Any:
        if device is None:
            raise errors.ExtraError("no device", where="provider", hint="another")
        return device

    monkeypatch.setattr(providers, "_device", found)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"name": None, "precision": None, "options": None, "dtype": "float32", **asked}
    provider = choose(**given)
    assert (provider.name, provider.precision) == chosen
    assert str(provider) == " in ".join(chosen)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"name": "OpenVINO"}, errors.SpecError, f"did you mean '{OPENVINO}'"),
        ({"name": "openvinoexecutionprovider"}, errors.SpecError, f"did you mean '{OPENVINO}'"),
        ({"name": "CPUExecutionProvide"}, errors.SpecError, f"did you mean '{CPU}'"),
        ({"name": CPU, "precision": "bfloat16"}, errors.SpecError, f"computes a float32 model in float32.*{OPENVINO}"),
        ({"name": OPENVINO, "precision": "bf16"}, errors.SpecError, "did you mean 'bfloat16'"),
        ({"name": OPENVINO, "precision": "float16"}, errors.SpecError, "one of float32, bfloat16"),
        ({"name": OPENVINO, "precision": "bfloat16"}, errors.SpecError, "(?s)does not multiply in bfloat16.*float32"),
        ({"name": OPENVINO, "options": {"num_of_threads": 1}}, errors.SpecError, "has no option 'num_of_threads'"),
        ({"name": OPENVINO, "options": {"INFERENCE_NUM_THREADS": 1}}, errors.SpecError, "intra_op_num_threads"),
        ({"name": OPENVINO, "options": {"INFERENCE_PRECISION_HINT": "bf16"}}, errors.SpecError, "precision="),
    ],
)
def test_what_a_provider_does_not_have(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], error: Any, message: str
) -> None:
    monkeypatch.setattr(providers, "_device", lambda: fake("FP32"))
    with pytest.raises(error, match=f"(?s){message}") as caught:
        choose(**{"name": None, "precision": None, "options": None, "dtype": "float32", **asked})
    assert caught.value.where
    assert caught.value.hint


def test_a_plugin_that_is_missing_or_serves_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_ep_devices", list)
    monkeypatch.setitem(__import__("sys").modules, providers.PLUGIN, None)
    for precision in (None, "bfloat16"):
        with pytest.raises(errors.ExtraError, match=r"(?s)cannot be imported.*\[openvino\]"):
            choose(OPENVINO, precision, None, "float32")
    monkeypatch.setattr(providers, "imported", lambda *_: SimpleNamespace(get_library_path=lambda: "x.so"))
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *_: None)
    with pytest.raises(errors.ExtraError, match=f"(?s)it serves Intel's.*{CPU}"):
        choose(OPENVINO, None, None, "float32")
    monkeypatch.delattr(onnxruntime, "get_ep_devices")
    with pytest.raises(errors.ExtraError, match=r"takes no plugins"):
        choose(OPENVINO, None, None, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("threads", [0, -1, True, 1.5, None])
def test_threads_are_a_number(exported: Callable[..., Exported], provider: str, threads: Any) -> None:
    with pytest.raises(errors.SpecError, match="intra_op_num_threads"):
        opened(exported("sd15").directory, provider, session_options={"intra_op_num_threads": threads})


@pytest.mark.slow
def test_sessions_in_several_threads(exported: Callable[..., Exported], provider: str) -> None:
    """Several UNets over one file of weights, and several threads of each."""
    made = exported("sd15")
    loaded = [made.load(provider=provider, session_options={"intra_op_num_threads": 1}) for _ in range(2)]
    assert [each.backend.threads for each in loaded] == [1, 1]
    calls = [call_of(made.unet, B=B, H=H, seed=B) for B in (1, 2, 3) for H in (8, 9)]
    expected = [answer(made.unet, call) for call in calls]
    results: list[tuple[int, torch.Tensor]] = []

    def work(number: int) -> None:
        order = range(len(calls)) if number % 2 else reversed(range(len(calls)))
        results.extend((index, answer(loaded[number % 2], calls[index])) for index in order)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 * len(calls)
    for index, result in results:
        torch.testing.assert_close(result, expected[index], **CLOSE)


@pytest.mark.slow
def test_bfloat16_is_less_precise_and_says_so(exported: Callable[..., Exported], openvino: str) -> None:
    made = exported("sd15")
    exact, rounded = (made.load(provider=openvino, precision=each) for each in ("float32", "bfloat16"))
    call = call_of(made.unet, B=2, H=16, W=16)
    expected = answer(made.unet, call)
    assert "OpenVINOExecutionProvider in bfloat16" in repr(rounded)
    assert exact.dtype == rounded.dtype == torch.float32  # of its inputs and outputs
    span = expected.max() - expected.min()
    mine, its = ((answer(each, call) - expected).square().mean().sqrt() / span for each in (exact, rounded))
    assert mine < 1e-5 < its < 2e-2


@pytest.mark.slow
def test_a_report_has_the_parity_of_a_provider(openvino: str, tmp_path: Any) -> None:
    """An export is compared on the CPU in float32, and also where it is to run, at the precision that it will have."""
    unet = inheriting("drift")
    report = export(
        unet, tmp_path / "drift", calls=4, provider=openvino, precision="bfloat16", overwrite=True, progress=False
    )
    on = {(c.provider, c.precision): c for c in report.comparisons}
    assert set(on) == {(CPU, "float32"), (openvino, "bfloat16")}
    assert on[openvino, "bfloat16"].difference > on[CPU, "float32"].difference
    assert all(c.holds for c in report.comparisons)
    assert f"{openvino} in bfloat16" in str(report)
    with pytest.raises(errors.ParityError, match=f"(?s)OUT OF BOUNDS.*{openvino} in bfloat16"):
        export(unet, tmp_path / "strict", calls=4, provider=openvino, precision="bfloat16", rtol=1e-6, progress=False)
    assert not (tmp_path / "strict").exists()


def test_an_export_with_a_provider_that_is_not_there(tmp_path: Any, exported: Callable[..., Exported]) -> None:
    with pytest.raises(errors.SpecError, match="did you mean"):
        export(exported("sd15").unet, tmp_path / "out", provider="OpenVINO", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_bundle_of_cuda_runs_by_definition(tmp_path: Any, openvino: str) -> None:
    unet = inheriting("drift")
    export(unet, tmp_path / "cuda", target="cuda", calls=1, progress=False)
    call = call_of(unet)
    torch.testing.assert_close(answer(opened(tmp_path / "cuda", openvino), call), answer(unet, call), **CLOSE)


@pytest.mark.slow
def test_options_of_a_caller(exported: Callable[..., Exported], openvino: str, tmp_path: Any) -> None:
    made, kept = exported("sd15"), tmp_path / "compiled"
    call = call_of(made.unet)
    for _ in range(2):  # compiled, and read again
        loaded = made.load(provider=openvino, provider_options={"CACHE_DIR": kept})
        torch.testing.assert_close(answer(loaded, call), answer(made.unet, call), **CLOSE)
    assert list(kept.iterdir())
    with pytest.raises(errors.SavedError, match="NONSENSE"):
        made.load(provider=openvino, provider_options={"NONSENSE": 1})
    with pytest.raises(errors.SpecError, match=f"{openvino} and a SessionOptions do not go together"):
        made.load(provider=openvino, session_options=onnxruntime.SessionOptions())


def test_the_default_is_said(exported: Callable[..., Exported], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "sdgraph"):
        loaded = ORTUNet.from_pretrained(exported("sd15").directory)
    provider = loaded.backend.provider
    assert provider in (CPU, CUDA, OPENVINO)
    assert f"on {provider} in float32, {torch.get_num_threads()} threads" in caplog.text
    assert f"ORTUNet({provider} in float32" in repr(loaded)
