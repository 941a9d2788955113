"""Text, tables and figures of a graph and of the calls of a generation.

It imports `inheritance`, `ir` and the vocabulary; it edits nothing.
"""
