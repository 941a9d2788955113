"""A call that the graph does not cover is refused before anything runs: which argument, where, and the hint.

Calls that are covered are compared with the source in test_trace.py.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import sdgraph
from sdgraph.errors import CallError, ModeError
from sdgraph.runtime.torch_backend import TorchBackend

from ..models import answer, build, call_of, load_ip_adapter

RESIDUALS = [torch.randn(2, c, h, w) for c, h, w in ((16, 8, 12), (16, 8, 12), (16, 4, 6), (32, 4, 6))]
MID = torch.randn(2, 32, 4, 6)
ADAPTER = [RESIDUALS[0], RESIDUALS[3]]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # a wrong shape
    ("sd15", {"sample": torch.randn(2, 5, 8, 12)}, r"sample has shape \(2, 5, 8, 12\), expected \(2, 4, 8, 12\)"),
    ("sd15", {"sample": torch.randn(4, 8, 12)}, "sample has shape"),
    ("sd15", {"sample": torch.randn(2, 4, 8, 12, 1)}, "sample has shape"),
    ("sd15", {"sample": torch.randn(0, 4, 8, 12)}, "sample has shape"),
    ("sd15", {"sample": torch.randn(2, 4, 0, 12)}, "sample has shape"),
    ("sd15", {"encoder_hidden_states": torch.randn(2, 5, 25)}, "encoder_hidden_states has shape"),
    ("sd15", {"encoder_hidden_states": torch.randn(2, 0, 24)}, "encoder_hidden_states has shape"),
    ("sd15", {"encoder_hidden_states": torch.randn(5, 24)}, "encoder_hidden_states has shape"),
    ("inpaint", {"sample": torch.randn(2, 4, 8, 12)}, r"expected \(2, 9, 8, 12\)"),
    # batches that disagree
    ("sd15", {"encoder_hidden_states": torch.randn(1, 5, 24)}, r"encoder_hidden_states has shape \(1, 5, 24\)"),
    ("sd15", {"encoder_hidden_states": torch.randn(4, 5, 24)}, r"expected \(2, 5, 24\)"),
    ("sd15", {"timestep": torch.tensor([1, 2, 3])}, r"timestep has shape \(3,\)"),
    ("sd15", {"timestep": torch.tensor([[1], [2]])}, r"timestep has shape \(2, 1\)"),
    ("upscaler", {"class_labels": torch.tensor([1, 2, 3])}, "class_labels has shape"),
    ("class-concat", {"class_labels": torch.randn(1, 10)}, "class_labels has shape"),
    ("lcm", {"timestep_cond": torch.randn(3, 12)}, "timestep_cond has shape"),
    ("lcm", {"timestep_cond": torch.randn(2, 13)}, "timestep_cond has shape"),
    # a wrong dtype or type
    ("sd15", {"sample": torch.randn(2, 4, 8, 12).half()}, "sample is torch.float16, the UNet is torch.float32"),
    ("sd15", {"sample": torch.ones(2, 4, 8, 12, dtype=torch.int64)}, "sample is torch.int64"),
    ("sd15", {"encoder_hidden_states": torch.randn(2, 5, 24).double()}, "encoder_hidden_states is torch.float64"),
    ("upscaler", {"class_labels": torch.tensor([1.0, 2.0])}, "class_labels is torch.float32"),
    ("sd15", {"sample": np.zeros((2, 4, 8, 12), np.float32)}, "sample is a ndarray, not a tensor"),
    ("sd15", {"timestep": "10"}, "timestep is a str"),
    ("sd15", {"timestep": True}, "timestep is a bool"),
    ("sd15", {"timestep": [1, 2]}, "timestep is a list"),
    ("sd15", {"encoder_hidden_states": torch.empty(2, 5, 24, device="meta")}, "is on meta, sample is on cpu"),
    # what the configuration requires
    ("sd15", {"sample": None}, "sample is missing"),
    ("sd15", {"timestep": None}, "timestep is missing"),
    ("sd15", {"encoder_hidden_states": None}, "encoder_hidden_states is missing"),
    ("upscaler", {"class_labels": None}, "class_labels is missing"),
    ("sdxl", {"added_cond_kwargs": None}, r"added_cond_kwargs\['text_embeds'\] is missing"),
    ("sdxl", {"added_cond_kwargs": {"text_embeds": torch.randn(2, 16)}}, r"\['time_ids'\] is missing"),
    # what it does not know
    ("sd15", {"class_labels": torch.tensor([1, 2])}, "class_labels is not covered"),
    ("sd15", {"timestep_cond": torch.randn(2, 12)}, "timestep_cond is not covered"),
    ("sd15", {"attention_mask": torch.ones(2, 96)}, "attention_mask is not covered"),
    ("sd15", {"encoder_attention_mask": torch.ones(2, 5)}, r"(?s)encoder_attention_mask.*inputs=\('encoder_att"),
    ("sd15", {"added_cond_kwargs": {"text_embeds": torch.randn(2, 16)}}, "added_cond_kwargs is not covered"),
    ("sd15", {"added_cond_kwargs": [1]}, "(?s)added_cond_kwargs is a list.*pass a dict"),
    ("sd15", {"cross_attention_kwargs": {"scale": 0.5}}, r"(?s)cross_attention_kwargs\['scale'\].*fuse LoRA"),
    ("sd15", {"cross_attention_kwargs": {"gligen": {}}}, r"cross_attention_kwargs\['gligen'\]"),
    ("sd15", {"cross_attention_kwargs": {"ip_adapter_masks": []}}, r"cross_attention_kwargs\['ip_adapter_masks'\]"),
    ("sd15", {"cross_attention_kwargs": "scale"}, "cross_attention_kwargs is a str"),
    # residuals
    ("sd15", {"down_block_additional_residuals": RESIDUALS[:3], "mid_block_additional_residual": MID}, "has 3 tensors"),
    (
        "sd15",
        {"down_block_additional_residuals": [*RESIDUALS, MID], "mid_block_additional_residual": MID},
        "has 5 tensors, the UNet this graph comes from takes 4",
    ),
    ("sd15", {"mid_block_additional_residual": MID}, "two parts and only one"),
    (
        "sd15",
        {"down_block_additional_residuals": RESIDUALS, "down_intrablock_additional_residuals": ADAPTER},
        "two parts and only one",
    ),
    ("sd15", {"down_intrablock_additional_residuals": [*ADAPTER, MID, MID]}, "has 4 tensors"),
    ("sd15", {"down_intrablock_additional_residuals": RESIDUALS[0]}, "(?s)is a Tensor.*list or tuple"),
    ("sd15", {"down_intrablock_additional_residuals": [ADAPTER[1], ADAPTER[0]]}, "residual_0 has shape"),
    ("sd15", {"down_intrablock_additional_residuals": [r.half() for r in ADAPTER]}, "residual_0 is torch.float16"),
    (
        "sd15",
        {"down_block_additional_residuals": [r[:1] for r in RESIDUALS], "mid_block_additional_residual": MID[:1]},
        r"down_block_additional_residual_0 has shape \(1, 16, 8, 12\)",
    ),
]


@pytest.mark.parametrize(("name", "changes", "words"), REFUSED, ids=[words[:40] for _, _, words in REFUSED])
def test_refused(name: str, changes: dict[str, Any], words: str, traced: Any, monkeypatch: Any) -> None:
    unet, graph = traced(name)
    call = {**call_of(unet), **changes}

    def ran(*args: Any) -> None:
        raise AssertionError("the graph ran")

    monkeypatch.setattr(TorchBackend, "module", ran)
    with pytest.raises(CallError, match=words) as caught:
        graph(**call)
    assert caught.value.where
    assert caught.value.hint


@pytest.mark.parametrize(
    ("added", "words"),
    [
        (None, r"image_embeds'\]\[0\] is missing"),
        ({"image_embeds": torch.randn(2, 1, 14)}, "must be a list of 2 tensors"),
        ({"image_embeds": [torch.randn(2, 1, 14)]}, r"image_embeds'\]\[1\] is missing"),
        ({"image_embeds": [torch.randn(2, 1, 14)] * 3}, "must be a list of 2 tensors"),
        ({"image_embeds": [torch.randn(2, 14)] * 2}, "image_embeds_0 has shape"),
        ({"image_embeds": [torch.randn(1, 1, 14)] * 2}, "image_embeds_0 has shape"),
        ({"image_embeds": [torch.randn(2, 1, 14)] * 2, "hint": torch.randn(2)}, r"\['hint'\] is not covered"),
    ],
)
def test_image_prompts_refused(added: Any, words: str, ip_adapted: Any) -> None:
    call = {**call_of(ip_adapted), "added_cond_kwargs": added}
    with pytest.raises(CallError, match=words):
        ip_adapted(**call)


@pytest.fixture(scope="module")
def ip_adapted() -> sdgraph.GraphUNet:
    return sdgraph.GraphUNet(sdgraph.trace(load_ip_adapter(build(), "base", "base")))


def test_harmless_arguments(traced: Any) -> None:
    unet, graph = traced("sd15")
    call = call_of(unet)
    expected = answer(unet, call)
    for more in (
        {"cross_attention_kwargs": {}},
        {"cross_attention_kwargs": {"scale": 1.0}},
        {"added_cond_kwargs": {}},
        {"added_cond_kwargs": {"image_embeds": None}},
        {"down_intrablock_additional_residuals": []},
        {"timestep": np.int64(7)},
    ):
        assert torch.equal(expected, answer(graph, {**call, **more})), more


def test_positional_arguments_and_return_values(traced: Any) -> None:
    unet, graph = traced("upscaler")
    call = call_of(unet)
    order = ("sample", "timestep", "encoder_hidden_states", "class_labels")
    with torch.no_grad():
        expected = unet(*(call[name] for name in order), return_dict=False)
        found = graph(*(call[name] for name in order), return_dict=False)
        named = graph(**call)
    assert isinstance(found, tuple)
    assert len(found) == 1
    assert torch.equal(expected[0], found[0])
    assert type(named) is type(unet(**call))
    assert torch.equal(named.sample, named[0])


def test_one_label_and_one_condition_for_the_whole_batch(traced: Any) -> None:
    for name, argument in (("upscaler", "class_labels"), ("lcm", "timestep_cond")):
        unet, graph = traced(name)
        call = call_of(unet, B=3)
        call[argument] = call[argument][:1]
        assert torch.equal(answer(unet, call), answer(graph, call))


def test_the_condition_of_an_lcm_stays_optional(traced: Any) -> None:
    unet, graph = traced("lcm")
    call = call_of(unet)
    del call["timestep_cond"]
    assert torch.equal(answer(unet, call), answer(graph, call))


def test_arguments_are_left_alone(traced: Any) -> None:
    """diffusers pops from the list of adapter residuals, and adds to tensors in place."""
    _, graph = traced("sdxl")
    call = call_of(graph)
    call["down_intrablock_additional_residuals"] = [torch.randn(2, 16, 4, 6), torch.randn(2, 32, 4, 6)]
    kept = copy.deepcopy(call)
    answer_ = graph(**call).sample
    assert len(call["down_intrablock_additional_residuals"]) == 2
    flat = [*_tensors(call)]
    assert all(torch.equal(a, b) for a, b in zip(flat, _tensors(kept), strict=True))
    assert answer_.data_ptr() not in {t.data_ptr() for t in flat}


def _tensors(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(item)


UNET_ONLY = {
    "enable_xformers_memory_efficient_attention": {},
    "disable_xformers_memory_efficient_attention": {},
    "enable_gradient_checkpointing": {},
    "load_attn_procs": {"pretrained_model_name_or_path_or_dict": {}},
    "save_attn_procs": {"save_directory": "x"},
    "set_attention_backend": {"backend": "native"},
}


@pytest.mark.parametrize("name", UNET_ONLY)
def test_what_a_unet_can_and_a_graph_cannot_is_refused(name: str, traced: Any) -> None:
    unet, graph = traced("sd15")
    assert hasattr(unet, name)
    with pytest.raises(ModeError) as caught:
        getattr(graph, name)(**UNET_ONLY[name])
    assert caught.value.hint
    hasattr(graph, name)  # never raises
    assert getattr(graph, "no_such_attribute", None) is None


def test_no_method_of_a_unet_is_missing_without_a_word(traced: Any) -> None:
    """Whatever diffusers offers on a UNet either is here or says why not."""
    unet, graph = traced("sd15")
    public = {n for n in dir(type(unet)) if not n.startswith("_")}
    silent = []
    for name in public:
        try:
            getattr(graph, name)
        except ModeError:
            continue
        except AttributeError:
            silent.append(name)
    assert not sorted(silent)
