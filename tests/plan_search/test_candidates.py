"""Candidates: a proposal costs and does what its passes do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import SpecError
from sdgraph.forecasts import Fitted, Polynomial
from sdgraph.passes import Bypass, CleanUp, HoistInvariants, InheritFeatures
from sdgraph.plan_search.candidates import Candidates, Proposal, ProposedCall
from sdgraph.schedules import Explicit, SamplingRun, Uniform

from ..models import build

RUN = SamplingRun(8, solver="DDIM")


@pytest.fixture(scope="module")
def source(traced: Callable[[str], tuple[object, GraphUNet]]) -> GraphUNet:
    return traced("sd15")[1]


@pytest.fixture(scope="module")
def options(source: GraphUNet) -> Candidates:
    """A shallow site, a deep one behind it, and a module to bypass behind both."""
    shallow, deep = InheritFeatures.damped(), InheritFeatures.damped(branch=1)
    return Candidates({"": source}, {"": [shallow, deep, Bypass("mid_block")]})


def test_a_site_behind_another_makes_no_difference(options: Candidates) -> None:
    assert [choice.reused for choice in options.choices()] == [
        frozenset(),
        frozenset({0}),
        frozenset({1}),
        frozenset({2}),
    ]
    assert str(options.simplified(Proposal.read("* 0+1:0.5 1+2:0.5 0+2:0.5 * 2:0.5"))) == "* 0:0 1:0 0:0.5 * 2:0"


def test_a_damping_counts_from_the_second_refresh(options: Candidates) -> None:
    proposal = options.simplified(Proposal.read("* 0:0.5 * 0:0.5 1:0.5 0:0.5 2:0.5 1:0.5"))
    assert options.damped_calls(proposal) == (3, 4, 5, 7)
    assert str(proposal) == "* 0:0 * 0:0.5 1:0.5 0:0.5 2:0 1:0.5"


def test_the_passes_of_a_plan(options: Candidates) -> None:
    chain = options.chains(Proposal.read("* 0:0 * 0:0.5 * 0:0.5 * 0:0.5"), RUN)[""]
    assert chain.passes == (InheritFeatures.damped(2),)
    chain = options.chains(Proposal.read("* 0:0 * 0:0.5 0:0.75 * 2:0 *"), RUN)[""]
    inherit, bypass = chain.passes
    assert isinstance(inherit, InheritFeatures)
    assert isinstance(bypass, Bypass)
    assert inherit.schedule == Explicit((0, 2, 5, 6, 7), 8)
    assert inherit.forecast == Fitted(
        ((), (1.0,), (), (-0.25, 1.25), (-0.75, 1.75), (), (), ()), "DDIM", Polynomial(1, 0.75)
    )
    assert bypass.schedule == Explicit((0, 2, 5, 7), 8)
    assert sdgraph.parse(str(chain)) == (chain,)
    assert options.chains(Proposal.read("* * * *"), SamplingRun(4))[""].passes == ()
    assert options.chains(Proposal.read("* 1:0 * 1:0"), SamplingRun(4))[""].passes == (
        InheritFeatures.deep_cache(2, 1),
    )


def test_plans_cost_and_do_what_their_passes_do(options: Candidates, source: GraphUNet) -> None:
    rng = np.random.default_rng(0)
    kinds = options.choices()
    for _ in range(6):
        drawn = [replace(kinds[rng.integers(len(kinds))], damping=0.5) for _ in range(7)]
        proposal = options.simplified(Proposal((ProposedCall(), *drawn)))
        alone = sdgraph.apply(source, options.chains(proposal, RUN)[""], verify=False)
        assert (
            options.cost(proposal, RUN, lambda member, reused: options.members[member].unet.graph.call_macs(reused))
            == alone.graph.timetable(8).macs
        )


def test_the_plan_of_schedules_that_were_given(source: GraphUNet) -> None:
    given = [InheritFeatures.damped(2, damping=0.75), Bypass("mid_block", Uniform(3))]
    (own,) = Candidates({"": source}, {"": given}).own_proposals(SamplingRun(7))
    assert str(own) == "* 0:0 1:0 0:0.75 1:0 0:0.75 *"


@pytest.mark.parametrize("one", [CleanUp(), HoistInvariants()])
def test_passes_without_sites_to_schedule(source: GraphUNet, one: sdgraph.Pass) -> None:
    with pytest.raises(SpecError, match="has no sites to give a schedule"):
        Candidates({"": source}, {"": [one]})


def test_no_candidates() -> None:
    with pytest.raises(SpecError, match="there are no candidates"):
        Candidates({"": sdgraph.apply(build(), (), verify=False)}, {"": []})
