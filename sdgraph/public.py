"""The public names of `sdgraph`, which loads this module when the first of them is asked for."""

from . import errors
from .compiler.matching import NoMatch
from .compiler.passes import Chain, Findings, Fixpoint, Pass, parse
from .compiler.report import NearMiss, PassReport, Report
from .compiler.rewrite import Example, Rewrite
from .contract import Contract
from .errors import SdgraphError
from .evaluation.evaluate import Evaluation, evaluate
from .frontend.capture import trace, trace_code
from .graph import Graph
from .inheritance.attach import Attachment, attach
from .ir.edits import Edit
from .ir.regions import Region
from .ir.sites import Site, inherit
from .ir.variants import per_call
from .ir.widths import Width
from .plan_search.fit_forecast import Fit, fit_forecast
from .plan_search.search import SearchResult, search
from .plan_search.switch_plan import SwitchPlan
from .redundancy.analysis import analyse, analyse_unet
from .redundancy.importance import Importance
from .redundancy.pruning_program import PruningChoice
from .redundancy.redundancy import JointRemoval, Redundancy, Removal
from .redundancy.width_times import WidthTimes
from .runtime.apply import apply
from .runtime.generation_state import GenerationState
from .runtime.masks_by_call import MasksByCall
from .runtime.switch import SwitchUNet, switch
from .runtime.unet import GraphUNet
from .spec import Spec
from .tuning.tune import tune
from .views.timetable import Timetable
from .views.widths import Widths

__all__ = [
    "Attachment",
    "Chain",
    "Contract",
    "Edit",
    "Evaluation",
    "Example",
    "Findings",
    "Fit",
    "Fixpoint",
    "GenerationState",
    "Graph",
    "GraphUNet",
    "Importance",
    "JointRemoval",
    "MasksByCall",
    "NearMiss",
    "NoMatch",
    "Pass",
    "PassReport",
    "PruningChoice",
    "Redundancy",
    "Region",
    "Removal",
    "Report",
    "Rewrite",
    "SdgraphError",
    "SearchResult",
    "Site",
    "Spec",
    "SwitchPlan",
    "SwitchUNet",
    "Timetable",
    "Width",
    "WidthTimes",
    "Widths",
    "analyse",
    "analyse_unet",
    "apply",
    "attach",
    "errors",
    "evaluate",
    "fit_forecast",
    "inherit",
    "parse",
    "per_call",
    "search",
    "switch",
    "trace",
    "trace_code",
    "tune",
]
