"""Every edit of a graph is an event, and `replace` replaces nodes, several at once, and regions."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from sdgraph import Edit, Graph
from sdgraph.compiler.numerics import example, run
from sdgraph.errors import EditError, ShapeError
from sdgraph.ir.verify import check_invariants
from sdgraph.schedules import Uniform


@pytest.fixture
def own(graph: Graph) -> Graph:
    return graph.copy()


def conv(graph: Graph) -> torch.fx.Node:
    return next(node for node in graph.nodes if node.target == "mid_block.resnets.0.conv1")


def test_a_node_is_replaced_with_what_only_it_was_computed_from(own: Graph) -> None:
    division = next(node for node in own.nodes if node.target is operator.truediv)
    addition = division.args[0]
    with own.recording() as recording:
        new = own.replace(division, torch.add, *addition.args)
    path = own.module_path(new)
    assert division._erased
    assert addition._erased
    assert recording.edits == [
        Edit("replaced", path, (division.name,), (new.name,)),
        Edit("erased", path, (addition.name,)),
    ]
    own.propagate()
    check_invariants(own)


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def test_a_layer_is_replaced_by_a_module_at_its_path(own: Graph) -> None:
    flat = example(own)
    before = run(own, flat)
    node = conv(own)
    with own.recording() as recording:
        new = own.replace(node, Holder(own.module(str(node.target))))
    assert torch.equal(run(own, flat), before)
    assert own.module_path(new) == "mid_block.resnets.0.conv1.inner"
    assert [edit.kind for edit in recording.edits] == ["replaced"]
    own.propagate()
    check_invariants(own)


def test_several_nodes_are_replaced_by_code_of_as_many_values(own: Graph) -> None:
    flat = example(own)
    before = run(own, flat)
    path = next(path for path in own.paths() if path.endswith("attn1"))
    pair = tuple(node for node in own.region(path).nodes if str(node.target).endswith(("to_q", "to_k")))
    weights = [own.module(str(node.target)).weight for node in pair]

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x @ weights[0].T, x @ weights[1].T

    with own.recording("a pass") as recording:
        new = own.replace(pair, both, path=path)
    assert torch.allclose(run(own, flat), before, rtol=1e-4, atol=1e-5)
    (edit,) = recording.edits
    assert (edit.nodes, edit.by) == (tuple(n.name for n in pair), tuple(n.name for n in new))
    assert {removed.by for removed in own.removals} == {"a pass"}
    with pytest.raises(EditError, match="must return 2 values"):
        own.replace(tuple(new), torch.sin, own.region(path).inputs[0], path=path)


def test_a_value_that_is_read_by_its_replacement_stays(own: Graph) -> None:
    node = conv(own)
    new = own.replace(node, lambda x: x * 2.0, node)
    assert not node._erased
    assert list(node.users) == [new]


def test_another_shape_is_refused(own: Graph) -> None:
    with pytest.raises(ShapeError, match="the new value is"):
        own.replace(conv(own), lambda x: x[:, :1])


def test_every_edit_is_an_event(own: Graph) -> None:
    with own.recording("a pass") as recording:
        added = own.add_parameter("scale", torch.ones(()))
        made = own.insert(lambda x, y: (x * y).sin(), own.region("conv_out").inputs[0], added, path="conv_out")
        own.erase(made)
        own.eliminate_dead_code()
        own.inherit(own.region("mid_block.resnets.0").output, "kept", Uniform(2))
        own.share(conv(own), "mid_block.resnets.1.conv1")
        own.bypass("mid_block.attentions.0")
    texts = [str(edit) for edit in recording.edits]
    product = texts[1].removeprefix("conv_out: inserted ").partition(",")[0]
    assert texts[:5] == [
        "(top level): inserted scale",
        f"conv_out: inserted {product}, {made.name}",
        f"conv_out: erased {made.name}",
        "(top level): erased scale",
        f"conv_out: erased {product}",
    ]
    assert "mid_block.resnets.0.conv1 -> mid_block.resnets.1.conv1" in texts
    assert "erased mid_block.attentions.0" in texts
    own.insert(torch.sin, own.output)
    assert recording.edits[-1].kind == "erased"  # what happens outside is not recorded
