"""sdgraph: a graph-transformation compiler for diffusion UNets."""

import importlib
from typing import TYPE_CHECKING, Any

from . import errors
from .calibration.fit import Fit, fit_forecast
from .calibration.search import search
from .compiler.base import Findings, Pass
from .compiler.chain import Chain, Fixpoint
from .compiler.matching import NoMatch
from .compiler.parse import parse
from .compiler.report import NearMiss, PassReport, Report
from .compiler.rewrite import Example, Rewrite
from .contract import Contract
from .errors import SdgraphError
from .evaluation.evaluate import Evaluation, evaluate
from .frontend.capture import trace, trace_code
from .graph import Graph
from .inheritance.attach import attach
from .ir.region import Region
from .ir.sites import Site, inherit
from .ir.specialize import per_call
from .runtime.apply import apply
from .runtime.unet import GraphUNet
from .spec import Spec
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .tuning.tune import tune

__all__ = [
    "Chain",
    "Contract",
    "Evaluation",
    "Example",
    "Findings",
    "Fit",
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
    "Site",
    "Spec",
    "apply",
    "attach",
    "errors",
    "evaluate",
    "fit_forecast",
    "inherit",
    "parse",
    "per_call",
    "search",
    "trace",
    "trace_code",
    "tune",
]


def __getattr__(name: str) -> Any:
    """`sdgraph.tune` and the packages below are loaded when first asked for."""
    if name == "tune":
        return importlib.import_module(f"{__name__}.tuning").tune
    if name in ("exporters", "passes", "testing", "tuning"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
