"""Sessions: fixed sizes, shared kernels, settings of the caller."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnxruntime
import pytest
import torch

from sdgraph.errors import CallError, SpecError
from sdgraph.exporters.bundle.external_data import SharedWeights

from ..models import answer, call_of
from .exports import Exported, opened

pytestmark = pytest.mark.slow


def test_sizes_that_are_fixed_on_loading(exported: Callable[[str], Exported], provider: str) -> None:
    unet, directory, _ = exported("deep cache")
    running = opened(directory, provider, free_dims={"batch": 2, "height": 8, "width": 12})
    call = call_of(unet, L=77)
    torch.testing.assert_close(answer(running, call), answer(unet, call), rtol=1e-4, atol=1e-5)
    with pytest.raises(CallError, match="height is 9, and this UNet was loaded for 8"):
        running(**call_of(unet, L=77, H=9))
    with pytest.raises(SpecError, match="did you mean 'height'"):
        opened(directory, free_dims={"heigth": 8})


def test_sessions_share_the_kernels_of_convolutions_and_products(exported: Callable[[str], Exported]) -> None:
    _, directory, _ = exported("deep cache")
    shared = SharedWeights(directory, torch.device("cpu"))
    whole, inherit = (shared.of(directory / name) for name in ("variant_0.onnx", "variant_1.onnx"))
    assert {name for name in inherit if name in whole}
    assert all(inherit[name].data_ptr() == whole[name].data_ptr() for name in inherit if name in whole)
    graph = onnx.load(directory / "variant_0.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert all((value.numpy() == stored[name]).all() for name, value in whole.items())
    assert sum(stored[name].nbytes for name in whole) > 0.9 * sum(each.nbytes for each in stored.values())
    changeable = {name for node in graph.node if node.op_type in ("Mul", "Add", "Concat") for name in node.input}
    assert not changeable & {*whole}
    assert changeable & {*stored}


def test_settings_of_sessions(exported: Callable[[str], Exported]) -> None:
    unet, directory, _ = exported("deep cache")
    call = call_of(unet, L=77)
    own = onnxruntime.SessionOptions()
    own.intra_op_num_threads = 1
    frugal = {"session.disable_prepacking": 1, "enable_cpu_mem_arena": False}
    for settings in (own, {"intra_op_num_threads": 1}, frugal):
        running = opened(directory, session_options=settings)
        again = opened(directory, session_options=settings)  # nothing is put into options that are the caller's
        for each in (running, again):
            torch.testing.assert_close(answer(each, call), answer(unet, call), rtol=1e-4, atol=1e-5)
    with pytest.raises(SpecError, match=r"(?s)no option 'intra_op_threads'.*did you mean 'intra_op_num_threads'"):
        opened(directory, session_options={"intra_op_threads": 1})
    with pytest.raises(SpecError, match="intra_op_num_threads does not take 'two'"):
        opened(directory, session_options={"intra_op_num_threads": "two"})
    with pytest.raises(SpecError, match="str is no mapping"):
        opened(directory, session_options="disable_prepacking")
    with pytest.raises(SpecError, match="free_dims and a SessionOptions do not go together"):
        opened(directory, session_options=own, free_dims={"batch": 2})
