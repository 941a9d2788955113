"""Whatever is kept between calls knows what it was computed with: weights, modules, arithmetic."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn.utils import parametrizations, parametrize, vector_to_parameters

import sdgraph
from sdgraph import GraphUNet
from sdgraph.passes import HoistInvariants, InheritFeatures
from sdgraph.schedules import Drift, Uniform

from ..models import CROSS, ONE_LEVEL, build

SITE = "up_blocks.-1.resnets.-1"
KEYS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
PASSES = {
    "hoist": HoistInvariants(),
    "inherit": InheritFeatures(SITE, Uniform(3), part="entry"),
    "drift": InheritFeatures(SITE, Drift(0.5), part="entry"),
    "forecast": InheritFeatures(SITE, Uniform(3), forecast=1, part="entry"),
}


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def in_place(keys: nn.Linear) -> None:
    with torch.no_grad():
        keys.weight.mul_(2)


def by_data(keys: nn.Linear) -> None:
    keys.weight.data.mul_(2)


def other_data(keys: nn.Linear) -> None:
    keys.weight.data = keys.weight.data * 2


def by_set(keys: nn.Linear) -> None:
    with torch.no_grad():
        keys.weight.set_(keys.weight * 2)


def by_numpy(keys: nn.Linear) -> None:
    keys.weight.detach().numpy()[...] *= 2


def one_number_by_numpy(keys: nn.Linear) -> None:
    keys.weight.detach().numpy()[1, 1] += 2


def by_copy(keys: nn.Linear) -> None:
    keys.weight.data.copy_(keys.weight.data * 2)


def by_optimizer(keys: nn.Linear) -> None:
    keys.weight.requires_grad_(True).grad = torch.ones_like(keys.weight)
    torch.optim.SGD([keys.weight], lr=0.5).step()
    keys.weight.requires_grad_(False).grad = None


def by_average(keys: nn.Linear) -> None:
    average = EMAModel(keys.parameters())
    average.shadow_params[0].mul_(2)
    average.copy_to(keys.parameters())


def by_restoring(keys: nn.Linear) -> None:
    average = EMAModel(keys.parameters())
    average.store(keys.parameters())
    average.temp_stored_params[0].mul_(2)
    average.restore(keys.parameters())


def loaded(keys: nn.Linear) -> None:
    keys.load_state_dict({"weight": keys.weight * 2})


def assigned(keys: nn.Linear) -> None:
    keys.load_state_dict({"weight": keys.weight * 2}, assign=True)


def by_vector(keys: nn.Linear) -> None:
    vector_to_parameters(keys.weight.detach().flatten() * 2, keys.parameters())


def exchanged(keys: nn.Linear) -> None:
    keys.weight = nn.Parameter(keys.weight.detach() * 2, requires_grad=False)


def swapped(keys: nn.Linear) -> None:
    torch.utils.swap_tensors(keys.weight, nn.Parameter(keys.weight.detach() * 2, requires_grad=False))


def in_inference_mode(keys: nn.Linear) -> None:
    with torch.inference_mode():
        keys.weight.mul_(2)


def parametrized(keys: nn.Linear) -> None:
    parametrize.register_parametrization(keys, "weight", Twice())


def normalized(keys: nn.Linear) -> None:
    parametrizations.weight_norm(keys)
    keys.parametrizations.weight.original0.data.mul_(2)  # type: ignore[union-attr,index]


def with_bias(keys: nn.Linear) -> None:
    keys.bias = nn.Parameter(torch.ones(keys.out_features), requires_grad=False)


def hooked(keys: nn.Linear) -> None:
    keys.register_forward_hook(lambda module, args, output: output * 2)


def of_another_class(keys: nn.Linear) -> None:
    class Louder(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    keys.__class__ = Louder


def with_a_forward(keys: nn.Linear) -> None:
    plain = keys.forward
    keys.forward = lambda input: plain(input) * 2  # type: ignore[method-assign]


EDITS = [
    *(in_place, by_data, other_data, by_set, by_numpy, by_copy, by_optimizer, by_average, by_restoring, loaded),
    *(assigned, by_vector, exchanged, swapped, in_inference_mode, parametrized, normalized, with_bias, hooked),
    *(of_another_class, with_a_forward),
]


@pytest.fixture(scope="module")
def made() -> dict[str, GraphUNet]:
    unet = build(**ONE_LEVEL).requires_grad_(False)
    return {"": sdgraph.apply(unet, verify=False)} | {
        name: sdgraph.apply(unet, one, verify=False) for name, one in PASSES.items()
    }


def call(unet: Any, timestep: int, text: torch.Tensor, sample: torch.Tensor | None = None) -> torch.Tensor:
    if sample is None:
        sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(timestep))
    with torch.no_grad():
        return unet(sample, torch.tensor(timestep), text).sample  # type: ignore[no-any-return]


def assert_computed_anew(
    made: dict[str, GraphUNet],
    name: str,
    change: Callable[[Any], Any],
    told: bool = True,
    then: Any = contextlib.nullcontext,
) -> None:
    """A call after a change gives what it gives where nothing is kept."""
    inheriting, plain, text = copy.deepcopy(made[name]), copy.deepcopy(made[""]), torch.randn(2, 5, CROSS)
    timesteps = (900, 800, 700)
    with inheriting.expecting(timesteps) if told else contextlib.nullcontext():
        for timestep in timesteps[:2]:
            call(inheriting, timestep, text)
        change(inheriting)
        change(plain)
        with then():
            assert torch.equal(call(inheriting, 700, text), call(plain, 700, text))


@pytest.mark.law("A value that is kept between calls is dropped when its weights change.")
@pytest.mark.parametrize("edit", EDITS)
def test_invariants_follow_every_edit(made: dict[str, GraphUNet], edit: Callable[[Any], None]) -> None:
    """`HoistInvariants` is exact, however a weight that keys and values depend on was changed."""
    assert_computed_anew(made, "hoist", lambda unet: edit(unet.get_submodule(KEYS)))


@pytest.mark.parametrize("name", ["inherit", "drift", "forecast"])
@pytest.mark.parametrize("edit", [by_data, in_place, exchanged, swapped, hooked])
def test_inherited_features_follow_edits(made: dict[str, GraphUNet], name: str, edit: Callable[[Any], None]) -> None:
    assert_computed_anew(made, name, lambda unet: edit(unet.get_submodule(KEYS)))


def test_without_a_word_about_calls_too(made: dict[str, GraphUNet]) -> None:
    assert_computed_anew(made, "hoist", lambda unet: by_data(unet.get_submodule(KEYS)), told=False)


def test_an_edit_of_the_source_is_seen() -> None:
    """A result shares its weights with the source, and with other results."""
    source = build(**ONE_LEVEL).requires_grad_(False)
    hoisted = sdgraph.apply(source, HoistInvariants(), verify=False)
    text = torch.randn(2, 5, CROSS)
    for edit in (in_place, by_data):
        call(hoisted, 900, text)
        edit(source.get_submodule(KEYS))
        assert torch.equal(call(hoisted, 950, text), call(source, 950, text))


@pytest.mark.parametrize(
    ("first", "then"), [(torch.bfloat16, torch.float16), (torch.float16, None), (None, torch.bfloat16)]
)
def test_autocast_and_its_dtype(made: dict[str, GraphUNet], first: Any, then: Any) -> None:
    def casting(dtype: Any) -> Any:
        return torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()

    hoisted, text = copy.deepcopy(made["hoist"]), torch.randn(2, 5, CROSS)
    with casting(first):
        call(hoisted, 900, text)
    with casting(then):
        assert torch.equal(call(hoisted, 950, text), call(made[""], 950, text))


def test_what_did_not_change_is_inherited(made: dict[str, GraphUNet]) -> None:
    """A move to where it is, a mark on a module, a hook elsewhere: nothing is computed anew."""
    unet, text = copy.deepcopy(made["inherit"]), torch.randn(2, 5, CROSS)
    reused: list[frozenset[str]] = []
    compute = unet.backend.compute
    unet.backend.compute = lambda flat, sites, read: reused.append(sites) or compute(flat, sites, read)  # type: ignore[method-assign]
    with unet.expecting((900, 800, 700)):
        call(unet, 900, text)
        unet.to("cpu", torch.float32)
        nn.Linear(2, 2).register_forward_hook(lambda *_: None)
        call(unet, 800, text)
        vars(unet.conv_in)
        call(unet, 700, text)
    assert [len(sites) for sites in reused] == [0, 1, 1]


def test_weights_of_a_functional_call_are_all_used(made: dict[str, GraphUNet]) -> None:
    """Between ordinary calls too, and under transforms, of which nothing is kept."""
    hoisted, plain, text = copy.deepcopy(made["hoist"]), made[""], torch.randn(2, 5, CROSS)
    given = {name: parameter * 1.1 for name, parameter in plain.named_parameters()}
    sample, timestep = torch.randn(2, 4, 8, 8), torch.tensor(900)
    call(hoisted, 900, text)
    with torch.no_grad():
        expected, found = (
            torch.func.functional_call(u, given, (sample, timestep, text)).sample for u in (plain, hoisted)
        )
    assert torch.equal(expected, found)
    assert torch.equal(call(hoisted, 900, text), call(plain, 900, text))

    def total(unet: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(unet, weights, (sample, timestep, text)).sample.sum()  # type: ignore[no-any-return]

    slopes = [torch.func.grad(total, argnums=1)(unet, given) for unet in (plain, hoisted)]
    assert all(torch.equal(slopes[0][name], slopes[1][name]) for name in given)
    assert torch.equal(call(hoisted, 900, text), call(plain, 900, text))
