"""What an exported folder is: its manifest, the check of files that come from anywhere, and what it holds.

It imports `sdgraph` alone.
"""
