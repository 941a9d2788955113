"""Passes: what one is, how it is run, checked against its contract and reported; local rewrites.

It imports `graph`, `ir`, `views` and the vocabulary; it knows no UNets.
"""
