"""Pre- and postconditions of passes are checked, and an error names the pass, the condition and the place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import fx, nn

import sdgraph
from sdgraph import Chain, Contract, Graph, Pass, Rewrite
from sdgraph.errors import ContractError, PreconditionError
from sdgraph.testing import check

from ..models import build
from .sample_passes import Scale


def no_silu(graph: Graph) -> Iterator[fx.Node]:
    """No layer is activated by SiLU.

    Replace SiLU
    first.
    """
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(graph.module(str(node.target)), nn.SiLU):
            yield node


def mid_block_is_there(graph: Graph) -> list[str]:
    """The graph has a mid block."""
    return [] if "mid_block" in graph.paths() else ["mid_block"]


@dataclass(frozen=True)
class WithoutSilu(Scale):
    preconditions = (no_silu,)


@dataclass(frozen=True)
class KeepsTheMiddle(Pass):
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    preconditions = (mid_block_is_there,)
    postconditions = (mid_block_is_there,)
    remove: str = "mid_block.attentions.0"

    def run(self, graph: Graph) -> None:
        graph.bypass(self.remove)


@dataclass(frozen=True)
class WithoutBlocks(Scale):
    blocks: tuple[str, ...] = ("mid_block",)

    def blocks_are_gone(self, graph: Graph) -> list[str]:
        """The blocks were removed."""
        return [path for path in self.blocks if path in graph.paths()]

    preconditions = (blocks_are_gone,)


@dataclass(frozen=True)
class ReplacesSilu(Rewrite):
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    postconditions = (no_silu,)

    def pattern(self, x: fx.Proxy, silu: nn.SiLU) -> fx.Proxy:
        return silu(x)

    def replace(self, x: fx.Proxy, silu: nn.SiLU) -> fx.Proxy:
        return nn.functional.hardswish(x)


def test_a_precondition_is_checked_before_the_pass_runs(graph: Graph) -> None:
    with pytest.raises(
        PreconditionError, match=r"WithoutSilu\(\) needs no_silu: No layer is activated by SiLU\.\n"
    ) as caught:
        sdgraph.apply(graph, [WithoutSilu()], verify=False)
    assert "nonlinearity" in caught.value.where or "act" in caught.value.where
    assert " and " in caught.value.where  # the first places, and how many more there are
    assert caught.value.hint == "replace SiLU first"
    sdgraph.apply(graph, [ReplacesSilu(), WithoutSilu()], verify=False)


def test_a_condition_may_depend_on_options(graph: Graph) -> None:
    with pytest.raises(PreconditionError, match=r"needs blocks_are_gone: The blocks were removed\.") as caught:
        sdgraph.apply(graph, [WithoutBlocks(blocks=("mid_block", "up_blocks.9"))], verify=False)
    assert (caught.value.where, caught.value.hint) == ("mid_block", "")
    sdgraph.apply(graph, ["PruneBlocks('mid_block')", WithoutBlocks()], verify=False)
    sdgraph.apply(graph, [WithoutBlocks(blocks=("up_blocks.9",))], verify=False)


def test_a_postcondition_is_a_promise(graph: Graph) -> None:
    assert check(KeepsTheMiddle(), build()) is not None
    with pytest.raises(ContractError, match=r"promises mid_block_is_there: The graph has a mid block") as caught:
        check(KeepsTheMiddle("mid_block"), build())
    assert caught.value.where == "mid_block"
    with pytest.raises(PreconditionError, match="needs mid_block_is_there"):
        sdgraph.apply(graph, ["PruneBlocks('mid_block')", KeepsTheMiddle()], verify=False)


def test_those_of_the_parts_of_a_chain_hold_in_between(graph: Graph) -> None:
    sdgraph.apply(graph, [Chain((ReplacesSilu(), WithoutSilu()))], verify=False)
    with pytest.raises(PreconditionError, match="no_silu"):
        sdgraph.apply(graph, [Chain((Scale(), WithoutSilu()))], verify=False)
