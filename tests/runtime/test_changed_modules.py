"""The modules that run are those that are copied, converted and saved, whatever is done to them; a change that
would be lost is refused."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import ModeError, SdgraphError

from ..models import ONE_LEVEL, answer, build, call_of

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")  # weight_norm, and quantisation in PyTorch itself

LEAF, NORM, BLOCK = "mid_block.resnets.0.conv1", "mid_block.resnets.0.norm1", "mid_block.resnets.0"
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
TOPS = ("conv_in", "conv_out", "time_embedding.linear_1")
MODEL = {"block_out_channels": (16,), "down_block_types": ONE_LEVEL["down_block_types"],
         "up_block_types": ONE_LEVEL["up_block_types"]}  # fmt: skip


def louder(unet: Any, path: str) -> Any:
    new = copy.deepcopy(unet.get_submodule(path))
    new.weight.data.mul_(1.5)
    return new


def put(how: str, path: str) -> Callable[[Any], None]:
    """Exchange a module by one of the ways that PyTorch has."""

    def change(unet: Any) -> None:
        above, _, name = path.rpartition(".")
        parent, new = unet.get_submodule(above), louder(unet, path)
        if how == "set_submodule":
            unet.set_submodule(path, new)
        elif how == "setattr":
            setattr(parent, name, new)
        elif how == "register_module":
            parent.register_module(name, new)
        else:
            parent._modules[name] = new

    return change


def at(path: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def changed(unet: Any) -> None:
        with torch.no_grad():
            change(unet.get_submodule(path))

    return changed


def times(output: Any) -> Any:
    return tuple(map(times, output)) if isinstance(output, tuple) else output * 1.5


def whole(unet: Any, args: Any, output: Any) -> Any:
    return type(output)(sample=output.sample * 1.5)


def own_forward(module: Any) -> None:
    plain = type(module).forward
    module.forward = types.MethodType(lambda self, *args, **more: times(plain(self, *args, **more)), module)


def own_class(module: Any) -> None:
    plain = type(module)
    module.__class__ = type("Own", (plain,), {"forward": lambda self, *a, **m: times(plain.forward(self, *a, **m))})


def own_processor(attention: Any) -> None:
    attention.processor = lambda attn, hidden_states, *args, **more: hidden_states


def put_layer(layers: Any) -> None:
    layers[0] = build(seed=3, **MODEL).mid_block.resnets[0]


class Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1.5


ACT = {  # what acts in copies, and in saved and converted models too
    **{f"{how} {path}": put(how, path) for how in ("setattr", "set_submodule", "register_module", "dict")
       for path in (LEAF, "conv_in")},
    **{f"setattr {path}": put("setattr", path) for path in TOPS},
    "a parameter": at(LEAF, lambda leaf: setattr(leaf, "weight", nn.Parameter(leaf.weight * 1.5))),
    "a parameter at the top": at("conv_in", lambda leaf: setattr(leaf, "bias", nn.Parameter(leaf.bias + 1))),
    "data": at(LEAF, lambda leaf: setattr(leaf.weight, "data", leaf.weight * 1.5)),
    "pruned for good": at(LEAF, lambda leaf: prune.remove(prune.l1_unstructured(leaf, "weight", 0.5), "weight")),
}  # fmt: skip
MAYBE = {  # what acts in a call or is refused, and is not lost by anything
    "hook": at(LEAF, lambda leaf: leaf.register_forward_hook(lambda module, args, output: output * 1.5)),
    "hook at the top": at("conv_in", lambda leaf: leaf.register_forward_pre_hook(lambda module, args: (args[0] * 2,))),
    "hook of the whole": at("", lambda unet: unet.register_forward_hook(whole)),
    "hook of a block": at(BLOCK, lambda block: block.register_forward_hook(lambda module, args, output: times(output))),
    "hook in a block's list": at(BLOCK, lambda block: block._forward_hooks.update({9: lambda m, a, o: times(o)})),
    "forward": at(LEAF, own_forward),
    "forward of a block": at(BLOCK, own_forward),
    "forward in a block's dict": at(BLOCK, lambda block: vars(block).update(forward=lambda *args: args[0] * 0)),
    "class": at(LEAF, own_class),
    "class of a block": at(BLOCK, own_class),
    "padding": at(LEAF, lambda leaf: setattr(leaf, "padding_mode", "circular")),
    "epsilon": at(NORM, lambda norm: setattr(norm, "eps", 0.1)),
    "groups": at(NORM, lambda norm: setattr(norm, "num_groups", 2)),
    "another activation": at(BLOCK, lambda block: setattr(block, "nonlinearity", nn.GELU())),
    "another leaf around it": lambda unet: unet.set_submodule(LEAF, nn.Sequential(unet.get_submodule(LEAF), nn.ReLU())),
    "no bias": at(LEAF, lambda leaf: setattr(leaf, "bias", None)),
    "parametrization": at(LEAF, lambda leaf: parametrize.register_parametrization(leaf, "weight", Scaled())),
    "pruning mask": at(LEAF, lambda leaf: prune.l1_unstructured(leaf, "weight", 0.5)),
    "weight norm": at(LEAF, lambda leaf: nn.utils.weight_norm(leaf).weight_g.mul_(2)),
    "quantised": lambda unet: torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, torch.qint8, inplace=True),
    "processor": at(ATTENTION, own_processor),
    "set_processor": at(ATTENTION, lambda attention: attention.set_processor(lambda attn, states, *a, **m: states)),
    "scale of a block": at(BLOCK, lambda block: setattr(block, "output_scale_factor", 2.0)),
    "a block": lambda unet: setattr(unet, "mid_block", copy.deepcopy(build(seed=3, **MODEL).mid_block)),
    "a layer of a list": lambda unet: put_layer(unet.mid_block.resnets),
    "no block": lambda unet: setattr(unet, "mid_block", None),
    "a layer less": lambda unet: unet.mid_block.attentions.__delitem__(0),
}  # fmt: skip


def saved(unet: GraphUNet, folder: Path) -> GraphUNet:
    unet.save_pretrained(folder)
    return GraphUNet.from_pretrained(folder)


def traced_anew(unet: GraphUNet) -> GraphUNet:
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    unet.disable_freeu()
    return unet


GO_ON: dict[str, Callable[[GraphUNet, Path], Any]] = {
    "called": lambda unet, folder: unet,
    "copied": lambda unet, folder: copy.deepcopy(unet),
    "CleanUp": lambda unet, folder: sdgraph.apply(unet, "CleanUp", verify=False),
    "saved": saved,
    "converted": lambda unet, folder: unet.to_diffusers(),
    "traced anew": lambda unet, folder: traced_anew(unet),
}


@pytest.fixture(scope="module")
def traced() -> GraphUNet:
    return sdgraph.apply(build(**MODEL), verify=False)


def equal_or_refused(
    traced: GraphUNet, change: Callable[[Any], Any], go_on: Callable[[GraphUNet], Any], called: bool
) -> bool:
    """Say whether a changed GraphUNet answers as the changed source does; False if it is refused."""
    source, unet = build(**MODEL), copy.deepcopy(traced)
    call = call_of(source)
    if called:
        answer(unet, call)
    try:
        change(unet)
        found = answer(go_on(unet), call)
    except SdgraphError as error:
        return not (error.where and error.hint)
    change(source)
    assert torch.equal(answer(source, call), found)
    return True


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", ACT)
def test_what_is_exchanged_acts(traced: GraphUNet, name: str, called: bool, tmp_path: Path) -> None:
    for verb in ("called", "copied"):
        assert equal_or_refused(traced, ACT[name], lambda unet, v=verb: GO_ON[v](unet, tmp_path), called)


@pytest.mark.slow
@pytest.mark.parametrize("verb", list(GO_ON)[2:])
@pytest.mark.parametrize("name", ["setattr conv_in", f"dict {LEAF}", "a parameter", "data", "pruned for good"])
def test_what_is_exchanged_is_kept(traced: GraphUNet, name: str, verb: str, tmp_path: Path) -> None:
    assert equal_or_refused(traced, ACT[name], lambda unet: GO_ON[verb](unet, tmp_path / "unet"), called=True)


@pytest.mark.law("Every change of the modules of a result acts or is refused.")
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", MAYBE)
def test_any_change_acts_or_is_refused(traced: GraphUNet, name: str, called: bool, tmp_path: Path) -> None:
    for verb in ("called", "copied"):
        equal_or_refused(traced, MAYBE[name], lambda unet, v=verb: GO_ON[v](unet, tmp_path), called)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAYBE)
def test_no_change_is_lost(traced: GraphUNet, name: str, tmp_path: Path) -> None:
    for verb in list(GO_ON)[2:]:
        equal_or_refused(traced, MAYBE[name], lambda unet, v=verb: GO_ON[v](unet, tmp_path / "unet"), called=True)


def test_hooks_of_leaves_and_of_the_whole_act(traced: GraphUNet) -> None:
    for name in ("hook", "hook at the top", "hook of the whole", "forward", "class", "padding", "quantised"):
        assert equal_or_refused(traced, MAYBE[name], lambda unet: unet, called=True)


@pytest.mark.parametrize(
    ("set_it", "where"),
    [
        (lambda unet: unet.mid_block.register_forward_hook(print), "mid_block"),
        (lambda unet: unet.mid_block.resnets[0].register_forward_pre_hook(print), BLOCK),
        (lambda unet: setattr(unet.mid_block, "forward", print), "mid_block"),
        (lambda unet: unet.get_submodule(ATTENTION).set_processor(None), ATTENTION),
        (lambda unet: setattr(unet, "mid_block", nn.Identity()), "mid_block"),
        (lambda unet: unet.up_blocks.append(nn.Identity()), "up_blocks.1"),
        (lambda unet: unet.mid_block(torch.zeros(1)), "mid_block"),
    ],
)
def test_what_would_never_act_is_refused_at_once(traced: GraphUNet, set_it: Callable[[Any], Any], where: str) -> None:
    with pytest.raises(ModeError) as caught:
        set_it(copy.deepcopy(traced))
    assert caught.value.where == where
    assert "leaves" in caught.value.hint


def test_marks_on_blocks_are_nobodys_business(traced: GraphUNet) -> None:
    unet = copy.deepcopy(traced)
    for path, module in unet.named_modules():
        module.mark = path
    unet.extra = nn.Linear(2, 2)
    assert torch.equal(answer(unet, call_of(unet)), answer(traced, call_of(unet)))
    with pytest.raises(ModeError, match=r"extra\.weight"):
        unet.save_pretrained("/nowhere")


def test_compiled_variants_follow_hooks(traced: GraphUNet) -> None:
    unet, plain = copy.deepcopy(traced), copy.deepcopy(traced)
    unet.compile(backend="eager")
    call = call_of(unet)
    assert torch.equal(answer(unet, call), answer(plain, call))
    for changed in (unet, plain):
        changed.conv_in.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(answer(unet, call), answer(plain, call))
    for changed in (unet, plain):
        changed.conv_out = louder(changed, "conv_out")
    assert torch.equal(answer(unet, call), answer(plain, call))
