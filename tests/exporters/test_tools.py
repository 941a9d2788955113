"""The tools of the ecosystem read the files of an export: checkers, shape inference, quantisation, conversion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from sdgraph.exporters.bundle.example_calls import random_call

from .exports import Exported

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:onnxruntime")]


def call(made: Exported, **sizes: int) -> dict[str, np.ndarray[Any, Any]]:
    given = random_call(made.unet, made.load().manifest, {"B": 2, "H": 16, "W": 24, "L": 7} | sizes)
    return {name: value.numpy() for name, value in given.items()}


def answer(model: Path, given: dict[str, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    kinds = {value.name: np.float16 if "float16" in value.type else None for value in session.get_inputs()}
    given = {name: value if kinds[name] is None else value.astype(kinds[name]) for name, value in given.items()}
    return session.run(None, given)[0].astype(np.float32)  # type: ignore[no-any-return]


class OneCall(CalibrationDataReader):  # type: ignore[misc]
    """The data of a static quantisation: a call."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.left = [given]

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


# `auto_merge`, because the symbolic inference of ONNX Runtime does not know that halving a size twice and rounding up
# each time is a quarter rounded up.
def preprocessed(source: Path, target: Path, given: dict[str, Any]) -> None:
    quant_pre_process(source, target, auto_merge=True)


def preprocessed_as_external_data(source: Path, target: Path, given: dict[str, Any]) -> None:
    quant_pre_process(source, target, auto_merge=True, save_as_external_data=True)


def quantised_dynamically(source: Path, target: Path, given: dict[str, Any]) -> None:
    quantize_dynamic(source, target)


def quantised_statically(source: Path, target: Path, given: dict[str, Any]) -> None:
    # as ONNX Runtime's guide does it; the products of matrices, which are the same whatever the size
    ready = target.with_name("ready.onnx")
    quant_pre_process(source, ready, auto_merge=True)
    quantize_static(ready, target, OneCall(given), QuantFormat.QDQ, op_types_to_quantize=["MatMul", "Gemm"])


def converted_to_float16(source: Path, target: Path, given: dict[str, Any]) -> None:
    onnx.save(convert_float_to_float16(onnx.load(source)), target)


def inferred(source: Path, target: Path, given: dict[str, Any]) -> None:
    onnx.shape_inference.infer_shapes_path(source, target, check_type=True, strict_mode=True, data_prop=True)
    for file in source.parent.glob("*.data"):
        (target.parent / file.name).symlink_to(file)


# Each with the largest error, as a share of the largest value.
TOOLS: dict[Callable[[Path, Path, dict[str, Any]], None], float] = {
    preprocessed: 1e-4,
    preprocessed_as_external_data: 1e-4,
    quantised_dynamically: 0.2,
    quantised_statically: 0.2,
    converted_to_float16: 0.02,
}


@pytest.mark.parametrize("name", ["pruned", pytest.param("deep cache", marks=pytest.mark.long)])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_reads_the_model_and_writes_one_that_runs(
    exported: Callable[..., Exported], tool: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where quant_pre_process writes external data
    made = exported(name)
    given = call(made)
    tool(made.directory / "model.onnx", tmp_path / "new.onnx", given)
    for sizes in ({}, {"B": 3, "H": 8, "W": 8, "L": 5}):
        given = call(made, **sizes)
        expected = answer(made.directory / "model.onnx", given)
        found = answer(tmp_path / "new.onnx", given)
        assert np.abs(found - expected).max() <= TOOLS[tool] * np.abs(expected).max()


@pytest.mark.parametrize("name", ["controlled", pytest.param("half", marks=pytest.mark.long), "deep cache"])
def test_every_file_is_valid_and_its_shapes_are_inferred(
    exported: Callable[..., Exported], name: str, tmp_path: Path
) -> None:
    made = exported(name)
    for file in made.directory.glob("*.onnx"):
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(file, load_external_data=False)
        stored = {tensor.name for tensor in model.graph.initializer}
        assert not stored & {value.name for value in model.graph.value_info}, "a second account of a tensor's shape"
        inferred(file, tmp_path / file.name, {})
        again = onnx.load(tmp_path / file.name, load_external_data=False)
        assert [value.name for value in again.graph.output] == [value.name for value in model.graph.output]
        for data in tmp_path.glob("*.data"):
            data.unlink()


@pytest.mark.parametrize("rows", [1, 3])
def test_one_timestep_stands_for_the_batch(exported: Callable[..., Exported], rows: int) -> None:
    made = exported("sd15")
    given = call(made, B=3)
    given["timestep"] = np.array([7.0, 500.0, 31.0][:rows], np.float32)
    found = answer(made.directory / "model.onnx", given)
    with torch.no_grad():
        tensors = {key: torch.from_numpy(value) for key, value in given.items()}
        expected = made.unet(**tensors).sample.numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
