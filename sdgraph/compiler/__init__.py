"""Passes: their base class, combinations and text, the runner with its checks, reports, local rewrites.

It imports `graph`, `ir`, `views` and the vocabulary; it knows no UNets.
"""
