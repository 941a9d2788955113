"""A GraphUNet is a UNet2DConditionModel: what diffusers and its users do with one does the same, or names the hint.

The causes for which diffusers' own pipeline tests failed with sdgraph's UNet; benchmarks/drop_in.py runs those tests.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import T2IAdapter, UNet2DConditionModel
from diffusers.models import attention_processor as processors
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import CallError, ModeError, SavedError, SourceError
from sdgraph.runtime.lora import LORA
from sdgraph.runtime.refused import REFUSED

from .models import answer, build, call_of, load_ip_adapter
from .test_pipelines import PIPELINES, POOLED, PROMPT, SIZE, image, large, make, noise, plain

INHERITING = "InheritFeatures.deep_cache(interval=2)"

# What is inherited as it is, each looked at: it reads or writes the configuration, the tensors or the hub, and does not
# need the modules of a UNet.
INHERITED = {
    *("config", "config_name", "has_compatibles", "ignore_for_config", "register_to_config", "register_for_auto_class"),
    *("save_config", "load_config", "get_config_dict", "extract_init_dict", "to_json_file", "to_json_string"),
    *("device", "dtype", "num_parameters", "get_memory_footprint", "cuda", "half", "float", "push_to_hub"),
    *("text_encoder_name", "unet_name"),  # prefixes of the keys of LoRA
    *("active_adapters", "save_lora_adapter"),  # read the LoRA layers, which are the same
    "is_gradient_checkpointing",  # asks the modules, and none does
    "dequantize",  # refuses what was not quantized, and nothing is here
}


def public(*classes: type) -> set[str]:
    return {name for cls in classes for name in vars(cls) if not name.startswith("_")}


def test_nothing_of_diffusers_is_left_by_accident() -> None:
    """Whatever diffusers' class has is written anew here, or on the list above."""
    above = [cls for cls in UNet2DConditionModel.__mro__ if cls not in (torch.nn.Module, object)]
    ours = public(*(cls for cls in GraphUNet.__mro__ if cls.__module__.startswith("sdgraph.")))
    assert public(*above) - ours <= INHERITED
    assert ours.isdisjoint(INHERITED)


def test_what_is_refused_names_the_cure(traced: Any) -> None:
    _, graph = traced("sd15")
    for name in REFUSED.keys() & public(*UNet2DConditionModel.__mro__):
        with pytest.raises(ModeError, match=name) as caught:
            getattr(graph, name)()
        assert caught.value.hint
    with pytest.raises(ModeError, match="gradient checkpointing"):
        graph.enable_gradient_checkpointing()
    graph.disable_gradient_checkpointing()
    assert not graph.is_gradient_checkpointing
    with pytest.raises(ModeError, match=r"(?s)brought in.*leaf_level"):
        graph.enable_group_offload(torch.device("cpu"))


def test_it_is_a_unet_to_whoever_asks(traced: Any, caplog: pytest.LogCaptureFixture) -> None:
    unet, graph = traced("sd15")
    assert isinstance(graph, UNet2DConditionModel)
    assert graph.attn_processors.keys() == unet.attn_processors.keys()
    assert [type(p) for p in graph.attn_processors.values()] == [type(p) for p in unet.attn_processors.values()]
    for name in ("down_blocks", "up_blocks"):
        assert len(getattr(graph, name)) == len(getattr(unet, name))
        for mine, theirs in zip(getattr(graph, name), getattr(unet, name), strict=True):
            assert len(mine.resnets) == len(theirs.resnets)
    assert graph.encoder_hid_proj is None  # as in a UNet without image prompts
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = graph.nonsense


def both(change: Callable[[Any], Any], passes: str = "", **build_with: Any) -> tuple[Any, GraphUNet]:
    """A UNet and the graph of another such, each after the same change."""
    unet, graph = build(**build_with), sdgraph.apply(build(**build_with), passes)
    change(unet)
    change(graph)
    return unet, graph


def assert_same(unet: Any, graph: Any, **call: Any) -> torch.Tensor:
    expected = answer(unet, call_of(unet) | call)
    assert torch.equal(expected, answer(graph, call_of(unet) | call))
    assert torch.equal(answer(unet, call_of(unet, H=9) | call), answer(graph, call_of(unet, H=9) | call))
    return expected


FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
SETTINGS: dict[str, Callable[[Any], Any]] = {
    "default": lambda u: u.set_default_attn_processor(),
    "processor": lambda u: u.set_attn_processor(processors.AttnProcessor()),
    "fused": lambda u: u.fuse_qkv_projections(),
    "freeu": lambda u: u.enable_freeu(**FREEU),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("passes", ["", pytest.param("CleanUp, HoistInvariants", marks=pytest.mark.slow)])
def test_settings(setting: str, passes: str, tmp_path: Path) -> None:
    unet, graph = both(SETTINGS[setting], passes)
    changed = assert_same(unet, graph)
    if setting == "fused":
        assert any(name.endswith("to_qkv.weight") for name in graph.state_dict())
    else:
        assert not torch.equal(changed, answer(build(), call_of(unet)))
    graph.save_pretrained(tmp_path / "unet")
    assert_same(unet, GraphUNet.from_pretrained(tmp_path / "unet"))
    assert [str(p) for p in graph.graph.passes] == [str(p) for p in sdgraph.parse(passes)]


def test_settings_are_taken_back() -> None:
    def there_and_back(unet: Any) -> None:
        unet.fuse_qkv_projections()
        unet.unfuse_qkv_projections()
        unet.enable_freeu(**FREEU)
        unet.disable_freeu()

    unet, graph = both(there_and_back)
    assert_same(unet, graph)
    assert graph.state_dict().keys() == build().state_dict().keys()
    assert [block.s1 for block in graph.up_blocks] == [None, None]


def test_settings_that_change_nothing_trace_nothing() -> None:
    graph = sdgraph.apply(build())
    before = graph.graph
    graph.set_attn_processor(processors.AttnProcessor2_0())
    graph.set_attn_processor({path: processors.AttnProcessor2_0() for path in graph.attn_processors})
    graph.disable_freeu()
    graph.unfuse_qkv_projections()
    assert graph.graph is before


def test_settings_leave_the_weights_and_the_source_alone() -> None:
    unet = build()
    state = copy.deepcopy(unet.state_dict())
    graph = sdgraph.apply(unet)
    parameters = dict(graph.named_parameters())
    graph.set_default_attn_processor()
    graph.fuse_qkv_projections()
    now = dict(graph.named_parameters())
    kept = [name for name in parameters if name in now]
    assert len(kept) > 100
    assert all(now[name] is parameters[name] for name in kept)  # an optimizer goes on with them
    assert type(next(iter(unet.attn_processors.values()))) is processors.AttnProcessor2_0
    assert all(torch.equal(state[name], value) for name, value in unet.state_dict().items())


def test_settings_that_cannot_be_traced_change_nothing() -> None:
    unet = build()
    graph = sdgraph.apply(unet)
    before = graph.graph
    with pytest.raises(SourceError, match=r"(?s)SlicedAttnProcessor.*set_default_attn_processor"):
        graph.set_attn_processor(processors.SlicedAttnProcessor(2))
    assert graph.graph is before
    assert_same(unet, graph)
    pruned = sdgraph.apply(unet, "PruneBlocks('mid_block')")
    with_edits = pruned.graph.copy()
    with_edits.bypass("down_blocks.0.attentions.0")
    with pytest.raises(ModeError, match=r"(?s)edits outside of passes.*source UNet"):
        GraphUNet(with_edits).enable_freeu(**FREEU)


def test_settings_of_a_pruned_unet() -> None:
    unet = build()
    graph = sdgraph.apply(unet, "PruneBlocks('mid_block')")
    graph.enable_freeu(**FREEU)
    unet.enable_freeu(**FREEU)
    assert_same(sdgraph.apply(unet, "PruneBlocks('mid_block')"), graph)


def test_attention_slicing_says_that_it_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pipe = PIPELINES["text"][0]()
    expected = make(pipe, PIPELINES["text"][1])
    pipe.unet = sdgraph.apply(pipe.unet)
    pipe.enable_attention_slicing()
    assert "slicing changes nothing" in caplog.text
    assert torch.equal(expected, make(pipe, PIPELINES["text"][1]))


# -- image prompts ---------------------------------------------------------------------------------------------------


def test_image_prompts_are_loaded_scaled_and_unloaded() -> None:
    pipes = [plain("StableDiffusionPipeline", build(), image_encoder=None) for _ in range(2)]
    pipes[1].unet = sdgraph.apply(pipes[1].unet, "CleanUp")
    call = {**PROMPT, **SIZE}
    before = make(pipes[0], call)
    for pipe in pipes:
        load_ip_adapter(pipe.unet, "base")
    prompted = {**call, "ip_adapter_image_embeds": [noise(2, 1, 14, seed=6)]}
    loaded = make(pipes[0], prompted)
    assert torch.equal(loaded, make(pipes[1], prompted))
    for pipe in pipes:
        pipe.set_ip_adapter_scale(0.3)
    twin = copy.deepcopy(pipes[1].unet)
    scaled = make(pipes[0], prompted)
    assert not torch.equal(loaded, scaled)
    assert torch.equal(scaled, make(pipes[1], prompted))
    pipes[1].set_ip_adapter_scale(1.0)
    assert torch.equal(loaded, make(pipes[1], prompted))
    for pipe in pipes:
        pipe.set_ip_adapter_scale(0.0)  # which takes the adapter out of the computation, and not out of the UNet
    assert torch.equal(make(pipes[0], prompted), make(pipes[1], prompted))
    for pipe in pipes:
        pipe.set_ip_adapter_scale(0.3)
    assert torch.equal(scaled, make(pipes[1], prompted))
    pipes[1].unet = twin  # which has a scale of its own
    assert torch.equal(scaled, make(pipes[1], prompted))
    pipes[1].unload_ip_adapter()
    assert torch.equal(before, make(pipes[1], call))


# -- LoRA ------------------------------------------------------------------------------------------------------------


def adapter(*targets: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """A state dict as LoRA is distributed."""
    unet = build()
    unet.add_adapter(LoraConfig(r=2, target_modules=list(targets)))
    torch.manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return {f"unet.{name}": value for name, value in get_peft_model_state_dict(unet).items()}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("passes", ["", "CleanUp, HoistInvariants", INHERITING])
def test_lora(passes: str) -> None:
    """Loaded, scaled by call, mixed, switched off, fused, unloaded: at each step the same as in diffusers."""
    # diffusers before 0.37 does not apply the scale of a call to conv_in, so that one is not in the first
    weights = adapter("to_q", "to_v", "conv1", "proj"), adapter("to_k", "conv2", "conv_in", seed=2)
    unet, graph = build(), sdgraph.apply(build(), passes)
    plain = assert_same(unet, graph)
    seen = [plain]

    def step(change: Callable[[Any], Any], **call: Any) -> None:
        change(unet)
        change(graph)
        seen.append(assert_same(unet, graph, **call))

    first = {"pretrained_model_name_or_path_or_dict": weights[0]}
    step(lambda u: u.load_lora_adapter(**copy.deepcopy(first), prefix="unet", adapter_name="one"))
    step(lambda u: None, cross_attention_kwargs={"scale": 0.5})
    step(lambda u: u.load_lora_adapter(dict(weights[1]), prefix="unet", adapter_name="two"))
    step(lambda u: u.set_adapters(["one", "two"], [0.7, 0.4]))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    step(lambda u: u.disable_lora())
    assert torch.equal(seen[-1], plain)
    step(lambda u: u.enable_lora())
    step(lambda u: u.delete_adapters("two"))
    step(lambda u: u.set_adapters("one", 0.8))
    step(lambda u: u.fuse_lora())
    step(lambda u: u.unload_lora())
    assert graph.state_dict().keys() == build().state_dict().keys()
    assert torch.equal(answer(sdgraph.apply(graph), call_of(unet)), seen[-1])


def test_lora_through_the_pipeline() -> None:
    pipes = [PIPELINES["text"][0]() for _ in range(2)]
    pipes[1].unet = sdgraph.apply(pipes[1].unet)
    call = PIPELINES["text"][1]
    images = []
    for pipe in pipes:
        pipe.load_lora_weights(adapter("to_q", "to_v"), adapter_name="one")
        pipe.set_adapters("one", 0.6)
        images.append([make(pipe, call)])
        pipe.set_adapters("one", {"unet": {"down": 0.4, "up": {"block_1": 0.9}}})
        images[-1].append(make(pipe, call))
        pipe.unload_lora_weights()
        images[-1].append(make(pipe, call))
    assert all(torch.equal(a, b) for a, b in zip(*images, strict=True))
    assert not torch.equal(images[0][0], images[0][2])


def test_lora_leaves_the_source_alone_and_is_not_forgotten(tmp_path: Path) -> None:
    unet = build()
    state = copy.deepcopy(unet.state_dict())
    graph = sdgraph.apply(unet)
    graph.load_lora_adapter(adapter("to_q"), prefix="unet")
    for verb in (sdgraph.apply, copy.deepcopy, GraphUNet.to_diffusers, lambda g: g.save_pretrained(tmp_path / "no")):
        with pytest.raises(ModeError, match=r"(?s)LoRA is loaded.*fuse_lora"):
            verb(graph)
    graph.fuse_lora()
    assert all(torch.equal(state[name], value) for name, value in unet.state_dict().items())


def test_lora_and_passes() -> None:
    """What a pass removed takes its LoRA with it, as fusing before would; of what it rewrote, LoRA is refused."""
    pruned = sdgraph.apply(build(), "PruneBlocks('mid_block')")
    pruned.load_lora_adapter(adapter("to_q", "conv1"), prefix="unet")
    fused = build()
    fused.load_lora_adapter(adapter("to_q", "conv1"), prefix="unet")
    fused.fuse_lora()
    expected = sdgraph.apply(fused, "PruneBlocks('mid_block')")
    call = call_of(fused)
    assert torch.allclose(answer(expected, call), answer(pruned, call), atol=1e-5)
    rewritten = sdgraph.apply(build(), "MECondConv(where='up_blocks.*.resnets.*.conv1', experts=2, donors='copies')")
    before = answer(rewritten, call)
    with pytest.raises(ModeError, match=r"(?s)rewritten.*conv1.*fuse"):
        rewritten.load_lora_adapter(adapter("conv1"), prefix="unet")
    assert torch.equal(before, answer(rewritten, call))
    assert not any("lora" in name for name, _ in rewritten.named_parameters())


def test_every_verb_of_lora_is_covered() -> None:
    mixin = next(cls for cls in UNet2DConditionModel.__mro__ if cls.__name__ == "PeftAdapterMixin")
    assert public(mixin) <= {*LORA, *REFUSED, *INHERITED, "load_lora_adapter"}


# -- saving, loading, averaging, exporting ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple[UNet2DConditionModel, GraphUNet]:
    unet = build()
    return unet, sdgraph.apply(unet, "CleanUp")


def test_pickle_is_not_written_and_that_is_said(pair: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair[1].save_pretrained(tmp_path / "unet", safe_serialization=False)
    assert "safe_serialization=False" in caplog.text
    assert {p.suffix for p in (tmp_path / "unet").iterdir()} == {".json", ".safetensors"}
    assert_same(pair[0], GraphUNet.from_pretrained(tmp_path / "unet"))


def test_shards(pair: Any, tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    pair[1].save_pretrained(folder, max_shard_size="200KB", variant="fp16")
    shards = sorted(folder.glob("diffusion_pytorch_model.fp16-*-of-*.safetensors"))
    assert len(shards) > 1
    assert (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    assert_same(pair[0], GraphUNet.from_pretrained(folder, variant="fp16"))
    with pytest.raises(SavedError, match=r"no variant 'bf16'"):
        GraphUNet.from_pretrained(folder, variant="bf16")
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1] + b"x")
    with pytest.raises(SavedError, match="not the one that was saved"):
        GraphUNet.from_pretrained(folder)


def test_pipelines_pass_the_options_on(tmp_path: Path) -> None:
    pipe = PIPELINES["text"][0]()
    pipe.unet = sdgraph.apply(pipe.unet)
    pipe.save_pretrained(tmp_path, safe_serialization=False, variant="fp16", max_shard_size="200KB")
    names = {path.name for path in (tmp_path / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names
    assert not any(name.endswith(".bin") for name in names)


def test_an_index_that_names_a_foreign_file_is_refused(pair: Any, tmp_path: Path) -> None:
    import hashlib
    import json

    folder = tmp_path / "unet"
    pair[1].save_pretrained(folder, max_shard_size="200KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"] = dict.fromkeys(found["weight_map"], "../other.safetensors")
    index.write_text(json.dumps(found))
    recipe = json.loads((folder / "sdgraph.json").read_text())
    recipe["files"][index.name] = hashlib.sha256(index.read_bytes()).hexdigest()
    (folder / "sdgraph.json").write_text(json.dumps(recipe))
    with pytest.raises(SavedError, match=r"without a checksum|may lead out of the folder"):
        GraphUNet.from_pretrained(folder)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "cpu", torch.device("cpu"), {"": "cpu"}], ids=str)
def test_device_maps_of_one_device(pair: Any, tmp_path: Path, device_map: Any) -> None:
    pair[1].save_pretrained(tmp_path / "unet")
    assert_same(pair[0], GraphUNet.from_pretrained(tmp_path / "unet", device_map=device_map))


def test_device_maps_of_several_devices_are_refused(pair: Any, tmp_path: Path) -> None:
    pair[1].save_pretrained(tmp_path / "unet")
    with pytest.raises(SavedError, match=r"(?s)cpu, meta.*one device"):
        GraphUNet.from_pretrained(tmp_path / "unet", device_map={"conv_in": "cpu", "conv_out": "meta"})


@pytest.mark.parametrize("passes", ["", "PruneBlocks('mid_block')"])
def test_moving_averages(passes: str, tmp_path: Path) -> None:
    graph = sdgraph.apply(build(), passes)
    average = EMAModel(graph.parameters(), model_cls=GraphUNet, model_config=graph.config)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.add_(0.1)
    average.step(graph.parameters())
    average.step(graph.parameters())
    average.save_pretrained(tmp_path / "average")
    back = EMAModel.from_pretrained(tmp_path / "average", GraphUNet)
    assert back.optimization_step == 2
    assert len(back.shadow_params) == len(list(graph.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(average.shadow_params, back.shadow_params, strict=True))
    average.copy_to(graph.parameters())
    call = call_of(graph)
    assert torch.equal(answer(graph, call), answer(GraphUNet.from_pretrained(tmp_path / "average"), call))


@pytest.mark.parametrize("passes", ["", "HoistInvariants", INHERITING])
def test_torch_export(passes: str) -> None:
    graph = sdgraph.apply(build(), passes)
    call = call_of(graph, timestep=torch.tensor([7]))
    free = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim.AUTO}
    sizes = {0: free[0], 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(
        graph,
        tuple(call.values()),
        dynamic_shapes={"sample": sizes, "timestep": None, "encoder_hidden_states": free},
    )
    other = call_of(graph, B=3, H=16, W=8, L=9, timestep=torch.tensor([3]))
    assert torch.equal(program.module()(*other.values()).sample, answer(graph, other))


def test_torch_export_of_one_timestep_per_call() -> None:
    graph = sdgraph.apply(build(), "MECondConv(where='up_blocks.*.resnets.*.conv1', experts=2, donors='copies')")
    call = call_of(graph, timestep=torch.tensor([7, 3]))
    with pytest.raises(CallError, match=r"(?s)one timestep per call.*shape \(1,\)"):
        torch.export.export(graph, tuple(call.values()))


def test_group_offloading_by_leaves() -> None:
    cpu = torch.device("cpu")
    unet, graph = build(), sdgraph.apply(build())
    try:
        build().enable_group_offload(cpu, offload_device=cpu, offload_type="leaf_level")
    except AttributeError:
        pytest.skip("this diffusers offloads groups only where there is an accelerator")
    graph.enable_group_offload(cpu, offload_device=cpu, offload_type="leaf_level")
    assert_same(unet, graph)


# -- pipelines -------------------------------------------------------------------------------------------------------


def test_a_pipeline_takes_it_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build_pipe, call = PIPELINES["text"]
    pipe = build_pipe()
    pipe.save_pretrained(tmp_path)
    expected = make(pipe, call)
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
    diffusers.utils.logging.enable_propagation()
    try:
        loaded = diffusers.StableDiffusionPipeline.from_pretrained(
            tmp_path, unet=sdgraph.apply(pipe.unet), requires_safety_checker=False, **absent
        )
    finally:
        diffusers.utils.logging.disable_propagation()
    said = capfd.readouterr()
    assert "Expected types for unet" not in said.out + said.err
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(expected, make(loaded, call))


def test_from_pipe(pipe: Any) -> None:
    """diffusers asks for the very class here, and says that another is to be passed by hand."""
    pipe = type(pipe)(**{**pipe.components, "unet": sdgraph.apply(pipe.unet)}, requires_safety_checker=False)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, unet=pipe.unet)
    assert other.unet is pipe.unet
    assert diffusers.StableDiffusionImg2ImgPipeline(**pipe.components).unet is pipe.unet


@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning")
@pytest.mark.parametrize("passes", ["", INHERITING.replace("2", "1")])
@pytest.mark.parametrize("kind", ["light_adapter", "full_adapter"])
def test_t2i_adapters(kind: str, passes: str) -> None:
    """A light adapter has a residual more than there are down blocks, of another shape than the mid block's."""
    torch.manual_seed(3)
    made = T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type=kind)
    pipe = plain("StableDiffusionAdapterPipeline", build(), adapter=made.eval())
    call = {**PROMPT, **SIZE, "image": image(1, 3, 32, 48)}
    expected = torch.as_tensor(make(pipe, call))
    pipe.unet = sdgraph.apply(pipe.unet, passes)
    assert torch.equal(expected, torch.as_tensor(make(pipe, call)))


def test_a_residual_beyond_the_down_blocks_that_fits_is_added(traced: Any) -> None:
    unet, graph = traced("sd15")
    call = call_of(unet, B=2, H=8, W=12)
    first, second = noise(2, 16, 8, 12), noise(2, 32, 4, 6)
    fitting, other = noise(2, 32, 4, 6, seed=1), noise(2, 32, 2, 3)
    answers = []
    for beyond in ([], [fitting], [other]):
        call["down_intrablock_additional_residuals"] = [first, second, *beyond]
        answers.append(answer(unet, call))
        assert torch.equal(answers[-1], answer(graph, call))
    assert not torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("passes", ["", "CleanUp, HoistInvariants"])
def test_the_latent_upscaler(passes: str) -> None:
    from .test_trace import KARRAS

    pipe = plain(
        "StableDiffusionPipeline", build(**KARRAS)
    )  # the upscaler's own pipeline needs a tokenizer; its UNet is called the same way
    call = {**PROMPT, "height": 64, "width": 32}
    expected = make(pipe, call)
    pipe.unet = sdgraph.apply(pipe.unet, passes)
    assert torch.equal(expected, make(pipe, call))


def test_large_pipelines_with_settings() -> None:
    pipe = large("StableDiffusionXLPipeline", build("sdxl"))
    call = {**PROMPT, **POOLED, **SIZE}
    unet = pipe.unet
    pipe.unet = sdgraph.apply(unet)
    for change in (lambda u: u.enable_freeu(**FREEU), lambda u: u.set_default_attn_processor()):
        change(unet)
        change(pipe.unet)
    found = make(pipe, call)
    pipe.unet = unet
    assert torch.equal(make(pipe, call), found)


def test_loggers_are_quiet_by_default(pair: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pair[1].save_pretrained(tmp_path / "unet")
        GraphUNet.from_pretrained(tmp_path / "unet")
    assert not [r for r in caplog.records if r.name == "sdgraph"]
