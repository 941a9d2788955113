"""Every invariant of a graph holds for traced graphs and for what our passes leave, and each is seen when it breaks."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import sdgraph
from sdgraph import Graph, inherit
from sdgraph.errors import ContractError
from sdgraph.ir.guards import Guard
from sdgraph.ir.verify import INVARIANTS, check_invariants
from sdgraph.schedules import Uniform


def read_before(graph: Graph) -> None:
    graph.nodes[len(graph.inputs)].prepend(graph.output)


def rename_an_input(graph: Graph) -> None:
    graph.inputs = (replace(graph.inputs[0], name="latents"), *graph.inputs[1:])


def return_two(graph: Graph) -> None:
    graph.fx.output_node().args = ((graph.output, graph.output),)


def exchange_a_target(graph: Graph) -> None:
    next(node for node in graph.nodes if node.target is operator.add).target = operator.sub


def lose_a_weight(graph: Graph) -> None:
    graph.weights.keep_only({"conv_in"})


def keep_a_weight(graph: Graph) -> None:
    graph.weights.put("extra", nn.Linear(2, 2))


def leave_dead_code(graph: Graph) -> None:
    graph.insert(torch.sin, graph.output)


def name_a_site_twice(graph: Graph) -> None:
    site = graph.inherit(graph.region("mid_block").outputs[0], "mid_block", Uniform(2))
    with graph.fx.inserting_after(site):
        other = graph.fx.call_function(inherit, (site, "mid_block"))
    other.meta["nn_module_stack"] = {}
    graph.infer(other)
    site.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
    graph.propagate()


def require_what_does_not_hold(graph: Graph) -> None:
    graph.guards = (*graph.guards, Guard("H == 1", True, "a test"))


BREAKS: dict[str, Callable[[Graph], None]] = {
    "operands_come_first": read_before,
    "inputs_are_placeholders": rename_an_input,
    "one_tensor_is_returned": return_two,
    "values_are_current": exchange_a_target,
    "weights_are_there": lose_a_weight,
    "weights_are_read": keep_a_weight,
    "nothing_is_dead": leave_dead_code,
    "sites_have_names": name_a_site_twice,
    "guards_hold": require_what_does_not_hold,
}


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda invariant: invariant.__name__)
def test_a_broken_invariant_is_seen_and_named(invariant: Callable[..., object], graph: Graph) -> None:
    broken = graph.copy()
    check_invariants(broken)
    BREAKS[invariant.__name__](broken)
    rule = str(invariant.__doc__).removesuffix(".")
    with pytest.raises(ContractError, match="the graph breaks an invariant") as caught:
        check_invariants(broken)
    assert rule in str(caught.value)
    assert caught.value.where


def test_passes_leave_graphs_whose_invariants_hold(graph: Graph) -> None:
    passes = "CleanUp, PruneBlocks('mid_block.attentions.0'), GRIAttention(4, pool=2), HoistInvariants"
    check_invariants(sdgraph.apply(graph, passes, verify=False).graph)
