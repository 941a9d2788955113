"""The exported folder: its manifest, the checks of untrusted files, and its table of contents.

It imports `sdgraph` alone.
"""
