"""Passes. Each uses only public names of `sdgraph`, as a user's pass does."""

from .bypass import Bypass
from .clean_up import CleanUp
from .gri_attention import GRIAttention
from .hoist_invariants import HoistInvariants
from .inherit_features import InheritFeatures
from .me_cond_conv import MECondConv
from .prune_blocks import PruneBlocks

__all__ = ["Bypass", "CleanUp", "GRIAttention", "HoistInvariants", "InheritFeatures", "MECondConv", "PruneBlocks"]
