"""Passes. Each uses only public names of `sdgraph`, as a user's pass does."""

from .assemble import Assemble
from .bypass import Bypass
from .clean_up import CleanUp
from .fold import Fold
from .gri_attention import GRIAttention
from .hoist_invariants import HoistInvariants
from .inherit_features import InheritFeatures
from .me_cond_conv import MECondConv
from .overparameterize import Overparameterize
from .prune_blocks import PruneBlocks
from .prune_channels import PruneChannels
from .prune_to_budget import PruneToBudget
from .share_weights import ShareWeights

__all__ = [
    "Assemble",
    "Bypass",
    "CleanUp",
    "Fold",
    "GRIAttention",
    "HoistInvariants",
    "InheritFeatures",
    "MECondConv",
    "Overparameterize",
    "PruneBlocks",
    "PruneChannels",
    "PruneToBudget",
    "ShareWeights",
]


def __dir__() -> list[str]:
    return __all__
