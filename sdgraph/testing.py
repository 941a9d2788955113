"""A check of passes, for tests: `check(pass, unet)`."""

from __future__ import annotations

import importlib
import tempfile
from typing import Any

from .compiler.passes import Pass, parse
from .compiler.rewrite import Rewrite
from .compiler.runner import run_pass
from .errors import ContractError, NoChangeError, SdgraphError, SpecError
from .frontend.capture import trace_code, undisturbed
from .ir.verify import check_invariants
from .options import checked
from .runtime.apply import apply
from .runtime.unet import GraphUNet

__all__ = ["check", "check_examples"]


def __dir__() -> list[str]:
    return __all__


@checked(SpecError)
def check(one: Pass, unet: Any = None, *, export: bool = False) -> GraphUNet | None:
    """Check the claims of a pass: its text form, its examples, and its contract on a UNet.

    Args:
        one: the pass.
        unet: a diffusers UNet or a traced one that the pass must apply to; None skips this check.
        export: whether to export the transformed UNet to ONNX as well, to a temporary folder; needs the extra `onnx`.
    Returns:
        The transformed UNet, for further checks; None without a UNet.
    Raises:
        SdgraphError: a claim does not hold; if the export fails, the error names the pass.
    Example:
        `check(PruneBlocks("bk-sdm-base"), unet)`
    """
    if export and unet is None:
        raise SpecError("there is no UNet to export", where="export", hint="pass the UNet that the pass applies to")
    if parse(str(one)) != (one,):
        raise ContractError(f"{one} does not parse back to itself", hint="use literal options")
    if isinstance(one, Rewrite):
        check_examples(one)
    if unet is None:
        return None
    changed = apply(unet, [one])
    check_invariants(changed.graph)
    if export:
        export_unet = importlib.import_module("sdgraph.exporters.onnx").export
        with tempfile.TemporaryDirectory() as folder:
            try:
                export_unet(changed, f"{folder}/unet", progress=False)
            except SdgraphError as error:
                error.came_through(str(one))
                raise
    return changed


def check_examples(one: Rewrite) -> None:
    """Run a rewrite on its examples; each must change, or be left alone, as it declares.

    Args:
        one: the rewrite.
    Raises:
        ContractError: an example does not behave as it declares.
    Example:
        `check_examples(MyRewrite())`
    """
    with undisturbed("check"):
        _check_examples(one)


def _check_examples(one: Rewrite) -> None:
    for i, example in enumerate(one.examples):
        graph = trace_code(example.code, **example.shapes)
        try:
            run_pass(one, graph, verify=True)
            changed = True
        except NoChangeError:
            changed = False
        if changed != example.changes:
            expected = "change" if example.changes else "stay as it is"
            raise ContractError(f"example {i} of {type(one).__name__} should {expected}, it did not", where=str(graph))
