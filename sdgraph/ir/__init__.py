"""What a graph is: nodes and their values, sizes, guards, inputs, weights, sites, regions, costs; specialisation; and
the tracer that turns ordinary PyTorch code into nodes.

It imports only the vocabulary: `errors`, `spec`, `schedules`.
"""
