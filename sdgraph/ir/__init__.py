"""The graph: nodes and their values, sizes, guards, weights, sites, regions, variants; the tracer; the editor.

It imports only the vocabulary: `errors`, `options`, `spec`, `schedules`, `forecasts`.
"""
