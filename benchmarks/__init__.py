"""Measurements: each module here is a command, `python -m benchmarks.NAME`, run from the root of the repository.

`benchmarks/measuring` holds what the commands share, and `benchmarks/results` their results.
"""
