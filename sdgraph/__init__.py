"""sdgraph: a graph-transformation compiler for diffusion UNets."""

import importlib
from typing import Any

from . import errors
from .apply import apply
from .attach import attach
from .capture import trace, trace_code
from .contract import Contract
from .errors import SdgraphError
from .evaluate import Evaluation, evaluate
from .graph import Graph
from .pass_ import Chain, Findings, Fixpoint, Pass
from .region import Region
from .report import NearMiss, PassReport, Report
from .rewrite import Example, NoMatch, Rewrite
from .search import search
from .spec import Spec, parse
from .unet import GraphUNet

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "Contract",
    "Evaluation",
    "Example",
    "Findings",
    "Fixpoint",
    "Graph",
    "GraphUNet",
    "NearMiss",
    "NoMatch",
    "Pass",
    "PassReport",
    "Region",
    "Report",
    "Rewrite",
    "SdgraphError",
    "Spec",
    "apply",
    "attach",
    "errors",
    "evaluate",
    "parse",
    "search",
    "trace",
    "trace_code",
]


def __getattr__(name: str) -> Any:
    """`sdgraph.passes`, `sdgraph.exporters` and `sdgraph.testing` are loaded when first asked for."""
    if name in ("exporters", "passes", "testing"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
