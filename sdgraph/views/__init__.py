"""Reading a graph: as text, as a diagram, in tables.

It imports `ir` and the vocabulary; it edits nothing.
"""
