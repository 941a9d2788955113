"""The shared parts of the benchmarks: models, methods, clocks, records of results, and their tables."""
